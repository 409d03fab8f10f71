"""What a checkpoint must be to be resumed; runs that are resumed with others: test_resuming."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from clipsys.errors import TrainingError
from clipsys.training.checkpoints import FOLDER, Checkpoints
from clipsys.training.engine.repartition import SavedBy
from clipsys.training.manifest import (
    MANIFEST_NAME,
    Manifest,
    describe_files,
    list_files,
    read_manifest,
)

_PART = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
_FILES = {"mp_rank_00_model_states.pt": b"m" * 64, _PART: b"p" * 32, "model/a.json": b"{}"}


def _write_checkpoint(folder: Path, step: int) -> Path:
    """A checkpoint with a manifest that fits; its files hold anything."""
    path = folder / f"step-{step:08d}"
    for name, content in _FILES.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    Manifest(step, 2, 1, "fp32", describe_files(path, list_files(path))).write(path)
    (folder / "latest").write_text(path.name + "\n")
    return path


@pytest.fixture
def newest(tmp_path: Path) -> Path:
    """The newer of two checkpoints of a run."""
    _write_checkpoint(tmp_path / FOLDER, 6)
    return _write_checkpoint(tmp_path / FOLDER, 12)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)


_DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: (path / _PART).unlink(), f"{_PART} is missing"),
    "short": (
        lambda path: (path / _PART).write_bytes(b"p" * 31),
        f"{_PART} has 31 bytes instead of 32",
    ),
    "altered": (lambda path: _flip(path / _PART), f"{_PART} is altered"),
    "surplus": (
        lambda path: (path / _PART.replace("1", "2", 1)).write_bytes(b"p"),
        "zero_pp_rank_2_mp_rank_00_optim_states.pt does not belong to it",
    ),
    "manifest": (
        lambda path: (path / MANIFEST_NAME).write_bytes(b'{"format": "clipsys-check'),
        f"{MANIFEST_NAME}: not a whole manifest",
    ),
    "manifest of bytes": (
        lambda path: (path / MANIFEST_NAME).write_bytes(b"\xff\x00"),
        f"{MANIFEST_NAME}: not a whole manifest",
    ),
}


@pytest.mark.parametrize("damage", _DAMAGES)
def test_a_damaged_file_is_named_and_so_is_the_checkpoint_before(newest: Path, damage: str) -> None:
    act, message = _DAMAGES[damage]
    act(newest)
    with pytest.raises(TrainingError) as raised:
        Checkpoints(newest.parents[1], keep=2).check(newest.name)
    assert str(raised.value).startswith(f"{newest}: the checkpoint is not whole: {message}")
    assert "the one before it, step-00000006, is whole" in str(raised.value)
    assert f"echo step-00000006 > {newest.parent / 'latest'}" in str(raised.value)


def test_a_checkpoint_that_is_whole_says_who_saved_it(newest: Path) -> None:
    (newest / ".nfs0001").write_bytes(b"")  # a file system's own
    assert Checkpoints(newest.parents[1], keep=2).check(newest.name) == SavedBy(2, 1, "fp32")


def test_where_no_checkpoint_is_whole_none_is_offered(newest: Path) -> None:
    for path in newest.parent.glob(f"*/{_PART}"):
        path.unlink()
    with pytest.raises(TrainingError, match="no checkpoint before it is whole, start a new run"):
        Checkpoints(newest.parents[1], keep=2).check(newest.name)


@pytest.mark.parametrize("content", [b"", b"step-000", b"step-00000099\n", b"\xff\xfe", b"../run"])
def test_a_damaged_pointer_is_named_with_what_is_there(newest: Path, content: bytes) -> None:
    pointer = newest.parent / "latest"
    pointer.write_bytes(content)
    with pytest.raises(TrainingError) as raised:
        Checkpoints(newest.parents[1], keep=2).latest()
    assert str(raised.value).startswith(f"{pointer}: names ")
    assert "there are: step-00000006, step-00000012" in str(raised.value)


def test_a_manifest_is_read_as_it_was_written(newest: Path) -> None:
    manifest = read_manifest(newest)
    assert manifest is not None
    assert manifest.files == describe_files(newest, list_files(newest))
    assert read_manifest(newest / "model") is None


def test_old_checkpoints_go_but_not_those_after_the_one_resumed_from(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 20):
        _write_checkpoint(tmp_path / FOLDER, step)
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints._forget_old("step-00000008")
    left = sorted(path.name for path in (tmp_path / FOLDER).glob("step-*"))
    assert left == ["step-00000006", "step-00000008", "step-00000020"]
    shutil.rmtree(tmp_path / FOLDER)


def test_without_a_pointer_the_newest_checkpoint_counts(newest: Path) -> None:
    (newest.parent / "latest").unlink()
    assert Checkpoints(newest.parents[1], keep=2).latest() == newest.name


def test_a_folder_in_the_place_of_the_pointer_is_named(newest: Path) -> None:
    pointer = newest.parent / "latest"
    pointer.unlink()
    pointer.mkdir()
    with pytest.raises(TrainingError, match=r"latest: cannot be read \(Is a directory\)"):
        Checkpoints(newest.parents[1], keep=2).latest()


def test_a_checkpoint_under_the_name_of_another_is_refused(newest: Path) -> None:
    shutil.rmtree(newest)
    newest.with_name("step-00000006").rename(newest)
    with pytest.raises(TrainingError, match=r"checkpoint\.json says that it is step-00000006"):
        Checkpoints(newest.parents[1], keep=2).check(newest.name)


@pytest.mark.parametrize("field", ["step", "world_size", "zero_stage", "precision"])
def test_a_manifest_with_a_value_of_another_type_is_not_whole(newest: Path, field: str) -> None:
    path = newest / MANIFEST_NAME
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, field: [2]}))
    with pytest.raises(TrainingError, match="not a whole manifest"):
        read_manifest(newest)
