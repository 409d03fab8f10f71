"""Who may read what was written is decided by the umask, as for every other program's files."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import clipsys
from clipsys.models.open_clip_models import build_model, save_model
from clipsys.retrieval import Collection
from clipsys.training.export import export_model
from clipsys.ui.thumbnails import ThumbnailCache
from tests.conftest import TINY_MODEL, write_training_shards
from tests.tiny_models import hf_text_config, write_text_model
from tests.training.runs import train, write_recipe


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def _assert_modes(folder: Path, mask: int) -> None:
    paths = [folder, *folder.rglob("*")]
    assert len(paths) > 4
    for path in paths:
        full = 0o777 if path.is_dir() else 0o666
        mode = stat.S_IMODE(path.stat().st_mode)
        # SQLite gives its files 0644 at most.
        assert mode in {full & ~mask, 0o644 & ~mask if full == 0o666 else full & ~mask}, (
            f"{path} has mode {mode:o} under umask {mask:o}"
        )


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_models_and_collections_have_the_modes_of_the_umask(
    mask: int, tmp_path: Path, image_folder: Path
) -> None:
    out = tmp_path / "out"
    with _umask(mask):
        out.mkdir()
        config = hf_text_config(write_text_model(tmp_path / "text", "roberta"))
        save_model(build_model(config), out / "text-model")
        save_model(build_model(TINY_MODEL), out / "model")
        encoder = clipsys.load(out / "model", precision="fp32")
        with Collection.create(out / "photos", encoder, model=str(out / "model")) as photos:
            photos.add(image_folder)
            photos.search("a dog", k=3)
            photos.build_index()
            ThumbnailCache(out / "photos" / "thumbnails").paths(list(photos.items()))
        write_training_shards(out / "shards", 8)
    _assert_modes(out, mask)


def test_a_run_and_its_export_have_the_modes_of_the_umask(tmp_path: Path) -> None:
    with _umask(0o027):
        shards = write_training_shards(tmp_path / "shards", 16)
        recipe = write_recipe(tmp_path / "out", shards, schedule={"epochs": 1})
        outcome = train(recipe)
        assert outcome.returncode == 0, outcome.stderr
        export_model(tmp_path / "out" / "run", tmp_path / "out" / "export")
    _assert_modes(tmp_path / "out", 0o027)
