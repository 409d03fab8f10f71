"""Ending long work early, by Ctrl-C or by SIGTERM: in order, within a bounded time, with advice.

SIGTERM always ends the work. As a rule an exception does it, which lets the work tidy up. Where the
process does not come to that within `GRACE_S`, because a read of a network file system does not
return for instance, a thread that waits for the signal ends it: what is committed is safe.

Ctrl-C is SIGINT, which a shell sets to be ignored for the background jobs of a script, so that it
reaches what is in the foreground alone. This is respected: such a process goes on. SIGTERM ends it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType

#: Seconds that the work has for tidying up after SIGTERM: the batch in flight, the last commit.
GRACE_S = 20.0
#: Seconds for which interrupted work waits for threads that are still reading.
_THREADS_GRACE_S = 2.0

_abandoned: list[threading.Thread] = []


class Interruption(KeyboardInterrupt):
    """Somebody ended the work. The command line shows the message and exits with the status.

    Attributes:
        status: 128 and the number of the signal, as shells have it.
    """

    def __init__(self, message: str, status: int = 128 + signal.SIGINT) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def ending_in_order(how_to_go_on: Callable[[], str]) -> Iterator[None]:
    """Lets SIGTERM end what is inside as Ctrl-C does: by an exception, so that it can tidy up.

    Without this SIGTERM ends the process at once. What is in a collection is safe then too, but the
    batch in flight is lost, and no message says so.

    Args:
        how_to_go_on: asked after the work has tidied up; what was kept, and the next command.

    Raises:
        Interruption: the user interrupts; it replaces the KeyboardInterrupt and has that message.
    """

    def terminate(number: int, _: FrameType | None) -> None:
        raise Interruption("terminated", 128 + number)

    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, terminate) if in_main_thread else None
    try:
        with _ended_at_last() if in_main_thread else contextlib.nullcontext():
            yield
    except KeyboardInterrupt as interrupt:
        status = interrupt.status if isinstance(interrupt, Interruption) else 128 + signal.SIGINT
        word = "terminated" if status == 128 + signal.SIGTERM else "interrupted"
        raise Interruption(f"{word}: {how_to_go_on()}", status) from interrupt
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def bounded_threads(num_threads: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """Threads that are waited for at the end, but not for long after an interruption.

    One that still reads then is left behind; `leave_if_abandoned` ends the process without it.
    """
    threads: list[threading.Thread] = []
    pool = ThreadPoolExecutor(
        num_threads, name, initializer=lambda: threads.append(threading.current_thread())
    )
    try:
        yield pool
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        deadline = time.monotonic() + _THREADS_GRACE_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        _abandoned.extend(thread for thread in threads if thread.is_alive())
        raise
    finally:
        pool.shutdown(wait=not _are_alive(threads), cancel_futures=True)


def leave_if_abandoned(status: int) -> None:
    """Ends the process at once where threads that were left behind would keep it from ending."""
    if _are_alive(_abandoned):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _are_alive(threads: list[threading.Thread]) -> bool:
    return any(thread.is_alive() and thread in _abandoned for thread in threads)


@contextmanager
def _ended_at_last() -> Iterator[None]:
    """Ends the process where SIGTERM came and the work inside is not over after `GRACE_S`.

    Python runs a signal's handler between two of its instructions, so never while the main thread
    is inside a system call that does not return. The number of the signal is written into a socket
    all the same.
    """
    woken, wakes = socket.socketpair()
    wakes.setblocking(False)
    before = signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    over = threading.Event()

    def watch() -> None:
        while numbers := woken.recv(64):
            if signal.SIGTERM in numbers and not over.wait(GRACE_S):
                text = f"terminated: the work did not end within {GRACE_S:.0f} s, since a read "
                os.write(2, f"{text}does not return; what was committed is safe\n".encode())
                os._exit(128 + signal.SIGTERM)

    watcher = threading.Thread(target=watch, name="clipsys-termination", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        wakes.close()
        watcher.join()
        woken.close()
