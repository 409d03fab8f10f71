"""Runs the micro-batches in worker processes, in order, and ends with the trainer.

Worker w of n prepares the micro-batches w, w + n, w + 2n, …; torch's DataLoader takes them in turn.
Batches come through shared memory, or, where that is too small, through the workers' pipes. A
worker that dies, or all of them giving nothing for too long, ends the run with the reason.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from clipsys.errors import ClipsysError, TrainingError
from clipsys.processes.pool import process_context, start_worker
from clipsys.training.data.batches import SampleShare, TrainingBatches
from clipsys.training.data.samples import Batch

_logger = logging.getLogger(__name__)

#: Micro-batches that each worker prepares ahead.
_PREFETCH = 2
#: Where Linux keeps the memory that processes share; other systems have no such limit.
SHARED_MEMORY = Path("/dev/shm")
#: The share of its free space that a run takes: others use it too.
_SHARE_TAKEN = 0.8


def load_batches(
    dataset: TrainingBatches | SampleShare,
    workers: int,
    *,
    timeout_s: float = 540.0,
    shared_memory: Path = SHARED_MEMORY,
) -> Generator[Batch, None, None]:
    """Runs a dataset in worker processes (0: in this one) and gives its batches in order.

    Closing the generator ends the processes.

    Args:
        dataset: the micro-batches.
        workers: processes.
        timeout_s: longest wait for a batch.
        shared_memory: the folder whose free space decides how batches are handed over.

    Raises:
        TrainingError: a worker has died, or no batch came in time.
        ClipsysError: what a worker has raised on purpose.
    """
    if workers == 0:
        yield from dataset
        return
    by_pipe = not _fits_shared_memory(dataset, workers, shared_memory)
    context = process_context()
    lifeline, held = context.Pipe(duplex=False)
    before = set(multiprocessing.active_children())
    with warnings.catch_warnings():
        # The number of workers is the recipe's business, also beyond that of the cores.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader: DataLoader[Batch | _PlainBatch | ClipsysError] = DataLoader(
            _WorkerItems(dataset, lifeline, by_pipe=by_pipe),
            batch_size=None,
            sampler=range(len(dataset)),
            num_workers=workers,
            prefetch_factor=_PREFETCH,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context=context,
            worker_init_fn=_start,
        )
        items = iter(loader)
    processes = [one for one in multiprocessing.active_children() if one not in before]
    with lifeline, held, _Watch(processes, timeout_s) as watch:
        while True:
            try:
                with watch.waiting():
                    item = next(items, None)
            except (RuntimeError, OSError, EOFError) as error:
                raise watch.reason(error) from error
            if item is None:
                return
            if isinstance(item, ClipsysError):
                raise item
            yield item.batch() if isinstance(item, _PlainBatch) else item


def _fits_shared_memory(dataset: TrainingBatches | SampleShare, workers: int, folder: Path) -> bool:
    """Whether the batches that are prepared ahead, by all ranks of this machine, have room."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # Besides those that wait, one is being made by each worker and one is being trained on.
    needed = ranks * (workers * (_PREFETCH + 1) + 1) * dataset.batch_bytes
    try:
        status = os.statvfs(folder)
    except (OSError, AttributeError):  # macOS and Windows have no such folder
        return True
    free = status.f_bavail * status.f_frsize
    if needed <= _SHARE_TAKEN * free:
        return True
    _logger.info(
        "%s has %s MB free, and the batches that the decoding processes prepare ahead need %s MB: "
        "they are copied through pipes, which is slower; more shared memory (docker run "
        "--shm-size=%dm) or a smaller data.micro_batch_size avoids it",
        folder,
        f"{free / 1e6:,.0f}",
        f"{needed / 1e6:,.0f}",
        int(needed / _SHARE_TAKEN / (1 << 20)) + 1,
    )
    return False


@dataclass(frozen=True)
class _PlainBatch:
    """The fields of a batch with arrays, which are pickled by value, in place of tensors.

    Tensors would go through shared memory.
    """

    fields: dict[str, Any]

    @classmethod
    def of(cls, batch: Batch) -> _PlainBatch:
        return cls({name: _array(value) for name, value in vars(batch).items()})

    def batch(self) -> Batch:
        batch = Batch(**{name: _tensor(value) for name, value in self.fields.items()})
        return batch.pin_memory() if torch.cuda.is_available() else batch


def _array(value: object) -> object:
    if isinstance(value, tuple):
        return tuple(map(_array, value))
    return value.numpy() if isinstance(value, torch.Tensor) else value


def _tensor(value: object) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_tensor, value))
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


class _WorkerItems(Dataset["Batch | _PlainBatch | ClipsysError"]):
    """What runs in a worker: gives deliberate errors as items.

    torch would wrap an error into a page of traceback.
    """

    def __init__(
        self, dataset: TrainingBatches | SampleShare, lifeline: Connection, *, by_pipe: bool
    ) -> None:
        self.dataset = dataset
        self.lifeline = lifeline
        self.by_pipe = by_pipe

    def __getitem__(self, number: int) -> Batch | _PlainBatch | ClipsysError:
        try:
            batch = self.dataset[number]
        except ClipsysError as error:
            return error
        return _PlainBatch.of(batch) if self.by_pipe else batch


def _start(worker: int) -> None:
    info = torch.utils.data.get_worker_info()
    assert info is not None and isinstance(info.dataset, _WorkerItems)
    start_worker(info.dataset.lifeline)


class _Watch:
    """Ends workers that give nothing for too long, so that the wait for them ends too."""

    def __init__(self, processes: Sequence[BaseProcess], timeout_s: float) -> None:
        self._processes, self._timeout_s = processes, timeout_s
        self._since: float | None = None
        self._is_stuck = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="loader-watch", daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        self._thread.join()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for a batch."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def reason(self, error: Exception) -> Exception:
        """What to raise for an error of torch's loader: why the workers gave no batch."""
        if self._is_stuck:
            return TrainingError(
                f"the decoding processes gave no batch for {self._timeout_s:g} s (data.timeout_s); "
                "the shards may lie on a drive that does not answer; go on with --resume"
            )
        # A lost connection may be seen before the end of the process behind it.
        ended = connection.wait([process.sentinel for process in self._processes], timeout=2.0)
        if not ended and "DataLoader worker" not in str(error):
            return error
        codes = [process.exitcode for process in self._processes if process.exitcode]
        how = f"ended with status {codes[0]}" if codes else "ended"
        if codes and codes[0] < 0:
            how = f"was killed by {signal.Signals(-codes[0]).name}"
        return TrainingError(
            f"a decoding process {how}: too little memory, too little shared memory "
            f"({SHARED_MEMORY}), or another program that ended it; lower data.workers or "
            "data.micro_batch_size, and go on with --resume"
        )

    def _run(self) -> None:
        while not self._closed.wait(min(1.0, self._timeout_s / 4)):
            since = self._since
            if since is not None and time.monotonic() - since > self._timeout_s:
                self._is_stuck = True
                for process in self._processes:
                    process.kill()
                return
