"""How batches come from worker processes, and what happens when they do not come."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clipsys.errors import TrainingError
from clipsys.training.data import loader
from clipsys.training.data.loader import load_batches
from clipsys.training.data.samples import Batch
from tests.training.data.test_batches import _dataset, _same


def _begun(shards: str, timeout_s: float) -> tuple[Iterator[Batch], int]:
    """A loader that has given a batch, and one of its processes."""
    before = set(multiprocessing.active_children())
    batches = load_batches(_dataset(shards, epochs=500), 2, timeout_s=timeout_s)
    next(batches)
    (worker, *_) = (one for one in multiprocessing.active_children() if one not in before)
    assert worker.pid is not None
    return batches, worker.pid


def test_a_worker_that_is_killed_ends_the_run_with_the_reason(shards: str) -> None:
    batches, worker = _begun(shards, 540)
    os.kill(worker, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(TrainingError, match="a decoding process was killed by SIGKILL: too little"):
        list(batches)
    assert time.monotonic() - started < 30


def test_a_worker_that_is_stuck_ends_the_run_with_the_reason(shards: str) -> None:
    batches, worker = _begun(shards, 1.0)
    os.kill(worker, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(TrainingError, match=r"gave no batch for 1 s \(data\.timeout_s\)"):
        list(batches)
    assert time.monotonic() - started < 30


def test_where_shared_memory_is_small_batches_come_through_pipes(
    shards: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    expected = list(_dataset(shards))
    status = os.statvfs(tmp_path)
    small = os.statvfs_result((*status[:4], 1, *status[5:]))  # one block is free
    monkeypatch.setattr(os, "statvfs", lambda folder: small)
    plain: list[object] = []
    batch = loader._PlainBatch.batch
    monkeypatch.setattr(loader._PlainBatch, "batch", lambda self: plain.append(self) or batch(self))
    assert _same(list(load_batches(_dataset(shards), 1)), expected)
    assert len(plain) == len(expected)
    assert "MB free, and the batches that the decoding processes prepare ahead need" in caplog.text
    assert "--shm-size=" in caplog.text


def test_the_need_counts_every_rank_of_the_machine(
    shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = _dataset(shards)
    free = 4 * dataset.batch_bytes / 0.8  # of one rank: one worker with three batches, and one
    status = os.statvfs_result((1, 1, 0, 0, int(free) + 2, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda folder: status)
    assert loader._fits_shared_memory(dataset, 1, Path("x"))
    assert not loader._fits_shared_memory(dataset, 2, Path("x"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert not loader._fits_shared_memory(dataset, 1, Path("x"))


def test_systems_without_such_a_folder_need_none(
    shards: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert loader._fits_shared_memory(_dataset(shards), 1, tmp_path / "gone")
    monkeypatch.delattr(os, "statvfs")
    assert loader._fits_shared_memory(_dataset(shards), 1, Path("/dev/shm"))
