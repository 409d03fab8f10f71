from __future__ import annotations

import errno
from pathlib import Path

import pytest

from clipsys.errors import ConfigError, TrainingError
from clipsys.files.drive_faults import drive_errors_explained, drive_fault


def _write(folder: Path, error: Exception) -> None:
    unfinished = folder / "unfinished"
    unfinished.mkdir()
    with drive_errors_explained(folder, TrainingError, "make room", unfinished=unfinished):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 1665216 vs 16"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_drive_is_named_with_the_remedy(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(TrainingError) as caught:
        _write(tmp_path, error)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert str(caught.value).endswith("MB are free); make room")
    assert not (tmp_path / "unfinished").exists()


@pytest.mark.parametrize("error", [ValueError("x"), OSError(errno.ENOENT, "gone"), ConfigError("")])
def test_another_error_passes(tmp_path: Path, error: Exception) -> None:
    assert drive_fault(error) is None
    with pytest.raises(type(error)) as caught:
        _write(tmp_path, error)
    assert caught.value is error
    assert (tmp_path / "unfinished").exists()


def test_a_place_that_cannot_be_used_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with (
        pytest.raises(TrainingError, match=r"metrics\.jsonl: cannot be used \(Is a directory\)"),
        drive_errors_explained(tmp_path, TrainingError, "make room"),
    ):
        (tmp_path / "metrics.jsonl").open("a")


def test_an_error_about_another_place_passes(tmp_path: Path) -> None:
    with (
        pytest.raises(FileNotFoundError),
        drive_errors_explained(tmp_path / "run", TrainingError, "make room"),
    ):
        (tmp_path / "data").open()
