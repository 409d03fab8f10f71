"""Figures on the disk: found again, never trusted, never an error."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from clipsys.inference.threads import Arrangement
from clipsys.probe import cache
from clipsys.probe.figures import Figures

FIGURES = Figures({"fp32": 1.0, "bf16": 4.0}, "bf16", (), Arrangement(2))
MACHINE = {"torch": "2.15.0", "work": "vit", "threads": "2"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "clipsys" / "probe"


def test_figures_are_found_again_for_the_same_machine_alone(folder: Path) -> None:
    assert cache.read(MACHINE) is None
    cache.write(MACHINE, FIGURES)
    assert cache.read(dict(reversed(MACHINE.items()))) == FIGURES
    for name in MACHINE:
        assert cache.read({**MACHINE, name: "another"}) is None
    (path,) = folder.iterdir()
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert json.loads(path.read_text())["measured"] == MACHINE


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[1, 2]",
        lambda text: text.replace('"bf16"', '"int4"', 1),
        lambda text: text.replace('"version": 1', '"version": 0'),
        lambda text: text.replace('"precision": "bf16"', '"precision": "fp16"'),
        lambda text: text.replace("2.15.0", "2.14.0"),
        lambda text: "[" * 100_000,
        lambda text: "\udcff",
    ],
)
def test_a_damaged_file_counts_for_nothing(folder: Path, damage) -> None:
    cache.write(MACHINE, FIGURES)
    (path,) = folder.iterdir()
    damaged = damage(path.read_text())
    path.write_bytes(damaged.encode("utf-8", "surrogateescape"))
    assert cache.read(MACHINE) is None
    cache.write(MACHINE, FIGURES)
    assert cache.read(MACHINE) == FIGURES


def test_a_folder_that_cannot_be_written_to_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "clipsys").write_text("a file where the folder would be")
    cache.write(MACHINE, FIGURES)
    assert cache.read(MACHINE) is None


def test_a_full_disk_leaves_nothing_half_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    cache.write(MACHINE, FIGURES)
    assert list(folder.iterdir()) == []


def test_a_relative_cache_folder_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the XDG specification says."""
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache.folder() == Path("/home/someone/.cache/clipsys/probe")
