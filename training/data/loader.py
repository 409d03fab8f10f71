"""Runs the micro-batches in worker processes, in order, and ends with the trainer.

Worker w of n prepares the micro-batches w, w + n, w + 2n, …; torch's DataLoader takes them in turn.
"""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection

import torch
from torch.utils.data import DataLoader, Dataset

from clipsys.errors import ClipsysError
from clipsys.processes.pool import start_worker
from clipsys.training.data.batches import TrainingBatches
from clipsys.training.data.samples import Batch

#: Micro-batches that each worker prepares ahead.
_PREFETCH = 2


def load_batches(dataset: TrainingBatches, workers: int) -> Iterator[Batch]:
    """Runs a dataset in worker processes (0: in this one) and gives its batches in order."""
    if workers == 0:
        yield from dataset
        return
    # Not fork: a child of a process with OpenMP and gloo threads can hang.
    context = multiprocessing.get_context("forkserver")
    lifeline, held = context.Pipe(duplex=False)
    with warnings.catch_warnings():
        # The number of workers is the recipe's business, also beyond that of the cores.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader: DataLoader[Batch | ClipsysError] = DataLoader(
            _WorkerItems(dataset, lifeline),
            batch_size=None,
            sampler=range(len(dataset)),
            num_workers=workers,
            prefetch_factor=_PREFETCH,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context=context,
            worker_init_fn=_start,
        )
        items = iter(loader)
    with lifeline, held:
        for item in items:
            if isinstance(item, ClipsysError):
                raise item
            yield item


class _WorkerItems(Dataset["Batch | ClipsysError"]):
    """What runs in a worker: gives deliberate errors as items.

    torch would wrap an error into a page of traceback.
    """

    def __init__(self, dataset: TrainingBatches, lifeline: Connection) -> None:
        self.dataset = dataset
        self.lifeline = lifeline

    def __getitem__(self, number: int) -> Batch | ClipsysError:
        try:
            return self.dataset[number]
        except ClipsysError as error:
            return error


def _start(worker: int) -> None:
    info = torch.utils.data.get_worker_info()
    assert info is not None and isinstance(info.dataset, _WorkerItems)
    start_worker(info.dataset.lifeline)
