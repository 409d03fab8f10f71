"""Searching a collection without torch, and every reason to load the model after all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import clipsys
from clipsys.errors import ClipsysError
from clipsys.models.open_clip_models import WEIGHTS_NAME, build_model, save_model
from clipsys.retrieval import Collection
from clipsys.retrieval.encoders.light import FILE_NAME, MAX_TEXTS, open_light
from tests.conftest import TINY_MODEL
from tests.retrieval.colours import paint_folder
from tests.tiny_models import hf_text_config, write_text_model


@pytest.fixture
def model(tmp_path: Path, model_folder: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


@pytest.fixture
def collection(tmp_path: Path, model: Path) -> Path:
    pictures = paint_folder(tmp_path / "pictures", num_images=12)
    with Collection.create(tmp_path / "c", clipsys.load(model)) as made:
        made.add(pictures, show_progress=False)
    return tmp_path / "c"


def is_light(collection: Path) -> bool:
    with Collection.open(collection) as opened:
        return open_light(collection, opened.encoder_pin) is not None


def test_cold_search_imports_no_torch_and_finds_the_same(collection: Path, model: Path) -> None:
    script = (
        "import sys; from clipsys.retrieval import Collection\n"
        f"with Collection.open({str(collection)!r}, few_searches=True) as photos:\n"
        "    hits = photos.search('a red square - blue', k=5)\n"
        "    print([[hit.id, hit.score] for hit in hits])\n"
        "for name in ('torch', 'open_clip', 'faiss', 'pyarrow', 'gradio'):\n"
        "    assert name not in sys.modules, name\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    with Collection.open(collection, clipsys.load(model, precision="fp32")) as opened:
        expected = opened.search("a red square - blue", k=5)
    found = json.loads(done.stdout)
    assert [item_id for item_id, _ in found] == [hit.id for hit in expected]
    np.testing.assert_allclose([s for _, s in found], [hit.score for hit in expected], atol=1e-4)


def test_cold_search_with_a_bert_like_tower_is_light_too(tmp_path: Path) -> None:
    build = build_model(hf_text_config(write_text_model(tmp_path / "source", "bert")))
    save_model(build, tmp_path / "m")
    pictures = paint_folder(tmp_path / "pictures", num_images=6)
    with Collection.create(tmp_path / "c", clipsys.load(tmp_path / "m")) as made:
        made.add(pictures, show_progress=False)
        expected = made.search("a red square", k=3)
    assert json.loads((tmp_path / "c" / FILE_NAME).read_text())["kind"] == "bert"
    with Collection.open(tmp_path / "c") as opened:
        found = opened.search("a red square", k=3)
        assert opened._encoder.loaded is None, "torch's model was not needed"
    assert [hit.id for hit in found] == [hit.id for hit in expected]
    (tmp_path / "m" / "tokenizer.json").touch()
    assert not is_light(tmp_path / "c")


def test_record_names_the_files_and_the_difference(collection: Path, model: Path) -> None:
    record = json.loads((collection / FILE_NAME).read_text())
    assert record["weights"]["path"] == str(model / WEIGHTS_NAME)
    assert record["largest_difference"] <= 1e-5


@pytest.mark.parametrize(
    "change",
    [
        lambda c, m: (c / FILE_NAME).unlink(),
        lambda c, m: (c / FILE_NAME).write_text("{"),
        lambda c, m: (c / FILE_NAME).write_text("[]"),
        lambda c, m: (c / FILE_NAME).write_text(
            (c / FILE_NAME).read_text().replace('"version": 1', '"version": 0')
        ),
        lambda c, m: (m / WEIGHTS_NAME).touch(),
        lambda c, m: os.utime(m / WEIGHTS_NAME, ns=(0, 0)),
    ],
    ids=["deleted", "damaged", "another form", "another version", "touched", "older"],
)
def test_record_that_does_not_hold_is_written_again(
    collection: Path, model: Path, change: Callable[[Path, Path], object]
) -> None:
    assert is_light(collection)
    change(collection, model)
    assert not is_light(collection)
    with Collection.open(collection) as opened:
        assert len(opened.search("red", k=3)) == 3
        assert opened._encoder.loaded is not None
    assert is_light(collection)


def test_replaced_weights_are_refused_and_not_searched_with(collection: Path, model: Path) -> None:
    save_model(build_model(TINY_MODEL), model, overwrite=True)
    with (
        Collection.open(collection) as opened,
        pytest.raises(ClipsysError, match="its vectors are of model"),
    ):
        opened.search("red")
    assert not is_light(collection)


def test_another_model_is_searched_by_its_own_tower(
    collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(build_model(TINY_MODEL), tmp_path / "other")
    other = clipsys.load(tmp_path / "other")
    with Collection.open(collection) as reader:
        before = reader.search("red", k=5)
        with Collection.open(collection) as opened:
            opened.migrate(other, show_progress=False)
        assert reader.search("red", k=5) == before
        assert reader._encoder.loaded is None
    with Collection.open(collection) as opened:
        found = opened.search("red", k=5)
        assert opened._encoder.loaded is None, (
            "the new model's tower is remembered by the migration"
        )
    with Collection.open(collection, other) as opened:
        expected = opened.search("red", k=5)
        assert [hit.id for hit in found] == [hit.id for hit in expected]
        scores = [hit.score for hit in found]
        np.testing.assert_allclose(scores, [hit.score for hit in expected], atol=1e-4)
        monkeypatch.setattr("clipsys.retrieval.writing.writer.GRACE_S", 0.0)
        opened.compact()
    assert not (collection / FILE_NAME).exists()
    assert (collection / "edition-1" / FILE_NAME).exists()


def test_images_and_great_batches_load_the_model(collection: Path, tmp_path: Path) -> None:
    picture = tmp_path / "pictures" / "0000.png"
    for ask in (
        lambda c: c.search(image=picture),
        lambda c: c.search_batch([f"text {n}" for n in range(MAX_TEXTS + 1)]),
    ):
        with Collection.open(collection) as opened:
            ask(opened)
            assert opened._encoder.loaded is not None
    with Collection.open(collection) as opened:
        opened.search("item:1 + red")
        assert opened._encoder.loaded is None


def test_tower_that_numpy_does_not_understand_is_left_to_torch(tmp_path: Path) -> None:
    text = {**TINY_MODEL["text_cfg"], "no_causal_mask": True, "pool_type": "last"}
    save_model(build_model({**TINY_MODEL, "text_cfg": text, "custom_text": True}), tmp_path / "m")
    pictures = paint_folder(tmp_path / "pictures", num_images=3)
    with Collection.create(tmp_path / "c", clipsys.load(tmp_path / "m")) as made:
        made.add(pictures, show_progress=False)
        assert len(made.search("red")) == 3
    assert not (tmp_path / "c" / FILE_NAME).exists()


def test_folder_that_cannot_be_written_to_is_no_error(
    collection: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (collection / FILE_NAME).unlink()

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("clipsys.retrieval.encoders.light.durable.replace", refuse)
    with Collection.open(collection) as opened:
        assert len(opened.search("red", k=3)) == 3
    assert not (collection / FILE_NAME).exists()
