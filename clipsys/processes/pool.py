"""Work in other processes, results in order, nothing left behind.

`ordered_map` is ``map`` in processes: it takes items only a little ahead of what is consumed, so a
stream of any length fits in memory. `process_context` says how processes are started here,
`start_worker` ties a process to the one that started it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.connection import Connection
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

#: Items that wait for each worker, so that none is idle while results are written.
_AHEAD = 4


def ordered_map(
    function: Callable[[_Item], _Result], items: Iterable[_Item], workers: int
) -> Iterator[_Result]:
    """``function(item)`` of each item, in their order, computed in worker processes.

    Args:
        function: picklable, as are items and results; an error of one item ends the map.
        items: taken ``4 * workers`` ahead.
        workers: processes; below 2 everything happens in this one.
    """
    if workers < 2:
        yield from map(function, items)
        return
    context = process_context()
    lifeline, held = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=start_worker, initargs=(lifeline,)
    )
    waiting: deque[Future[_Result]] = deque()
    with lifeline, held:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= workers * _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def process_context() -> multiprocessing.context.BaseContext:
    """How worker processes are started.

    Not by fork: a child of a process with threads (OpenMP, gloo) can hang.
    """
    known = multiprocessing.get_all_start_methods()  # Windows knows spawn only
    return multiprocessing.get_context("forkserver" if "forkserver" in known else "spawn")


def start_worker(lifeline: Connection) -> None:
    """Begins a worker process: quiet about damaged images, and ended with its parent.

    Watching the parent's number does not do: under forkserver that is the server's, which in turn
    waits for its children. A pipe whose other end only the parent holds is closed however the
    parent goes.
    """
    # As in the parent (`clipsys.cli`): damaged images are counted; Pillow's warnings add nothing.
    warnings.filterwarnings("ignore", module=r"PIL\.")

    def wait() -> None:
        with contextlib.suppress(EOFError, OSError):
            lifeline.recv_bytes()  # nothing is ever sent
        os._exit(0)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()
