"""What ranks leave behind when they fail, and what their launcher makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipsys.errors import DataError, TrainingError
from clipsys.training.distributed.rank_errors import (
    ERROR_FILE,
    PARENT,
    as_error,
    read_reports,
    reporting,
)


def _fail(monkeypatch: pytest.MonkeyPatch, folder: Path, rank: int, error: Exception) -> Path:
    path = folder / f"rank-{rank}.json"
    monkeypatch.delenv(PARENT, raising=False)
    monkeypatch.setenv(ERROR_FILE, str(path))
    monkeypatch.setenv("RANK", str(rank))
    with pytest.raises(type(error)), reporting():
        raise error
    return path


def test_torchrun_reads_the_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    path = _fail(monkeypatch, tmp_path, 1, TrainingError("the disk is full"))
    failure = ProcessFailure(local_rank=1, pid=7, exitcode=1, error_file=str(path))
    assert failure.message == "TrainingError: the disk is full"
    assert failure.timestamp_isoformat()


def test_an_error_raised_on_purpose_is_the_cause_whenever_it_came(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _fail(monkeypatch, tmp_path, 0, RuntimeError("Connection closed by peer"))
    _fail(monkeypatch, tmp_path, 2, DataError("no image"))
    _fail(monkeypatch, tmp_path, 1, TrainingError("later"))
    cause, later, lost = read_reports(tmp_path)
    assert isinstance(as_error(cause), DataError) and str(as_error(cause)) == "no image"
    assert (later["rank"], lost["rank"]) == (1, 0)
    error = as_error(lost)
    assert type(error) is TrainingError
    assert str(error) == "rank 0: RuntimeError: Connection closed by peer"


def test_a_rank_that_waited_in_vain_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _fail(monkeypatch, tmp_path, 0, RuntimeError("[gloo] Timed out waiting 600000ms for recv"))
    (report,) = read_reports(tmp_path)
    assert "rank 0: waited in vain for another rank, which is stuck" in str(as_error(report))
