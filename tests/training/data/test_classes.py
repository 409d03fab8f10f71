"""The classes of the training data: found in the samples, or listed; and samples without images."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from clipsys.errors import ConfigError, DataError
from clipsys.images.preprocessing import Preprocessing
from clipsys.models.open_clip_models import build_model
from clipsys.training.data.batches import TrainingBatches
from clipsys.training.data.classes import class_names
from clipsys.training.data.config import DataConfig
from clipsys.training.data.ordering import sample_order
from clipsys.training.data.samples import Decoder
from clipsys.training.data.shard_set import open_shards
from tests.conftest import TINY_MODEL


def _write(folder: Path, samples: list[dict[str, str]]) -> DataConfig:
    """Texts without images in one shard."""
    path = folder / "texts-000.tar"
    with tarfile.open(path, "w") as tar:
        for number, members in enumerate(samples):
            for ending, text in members.items():
                info = tarfile.TarInfo(f"{number:05d}.{ending}")
                info.size = len(text.encode())
                tar.addfile(info, io.BytesIO(text.encode()))
    return DataConfig(train=str(path), cache_dir=str(folder / "cache"), batch_size=4)


def _names(config: DataConfig) -> tuple[str, ...]:
    return class_names(config, open_shards(config))


def test_numbers_are_ordered_by_value_and_words_by_letters(tmp_path: Path) -> None:
    config = _write(tmp_path, [{"txt": "a", "cls": label} for label in ("10", "9", "2", "9")])
    assert _names(config) == ("2", "9", "10")
    config = _write(tmp_path, [{"txt": "a", "json": f'{{"topic": "{t}"}}'} for t in ("b", "10")])
    assert _names(config.model_copy(update={"label_key": "topic"})) == ("10", "b")


def test_listed_classes_are_taken_as_they_are(tmp_path: Path) -> None:
    config = _write(tmp_path, [{"txt": "a", "cls": "x"}])
    file = tmp_path / "classes.txt"
    file.write_text("x\n\ny\n", encoding="utf-8")
    assert _names(config.model_copy(update={"classes": ["y", "x"]})) == ("y", "x")
    assert _names(config.model_copy(update={"classes": str(file)})) == ("x", "y")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["x", "y", "x"], "data.classes: 'x' is listed twice; name each class once"),
        (["x"], "data.classes lists 1 class; expected two or more"),
        ("missing.txt", r"data.classes: missing.txt cannot be read \(.*No such file"),
    ],
)
def test_faults_of_a_list_are_named(classes: Any, message: str, tmp_path: Path) -> None:
    config = _write(tmp_path, [{"txt": "a", "cls": "x"}])
    with pytest.raises(ConfigError, match=message):
        _names(config.model_copy(update={"classes": classes}))


def test_one_class_or_none_is_refused_with_the_reason(tmp_path: Path) -> None:
    config = _write(tmp_path, [{"txt": "a", "cls": "x"}, {"txt": "b", "cls": "x"}])
    with pytest.raises(DataError, match="the samples have 1: every label is 'x'"):
        _names(config)
    config = _write(tmp_path, [{"txt": "a"}])
    with pytest.raises(DataError, match=r"have 0: .*#00000: the objective needs a label"):
        _names(config)


def test_texts_without_images_become_batches_with_class_numbers(tmp_path: Path) -> None:
    samples = [{"txt": f"text {n}", "cls": "ab"[n % 2]} for n in range(7)]
    config = _write(tmp_path, [*samples, {"txt": "text 7", "cls": "unknown"}])
    shard_set = open_shards(config)
    decoder = Decoder(
        Preprocessing((32, 32)), build_model(TINY_MODEL).tokenizer, "first", "label", None, 1000,
        seed=0, needs_image=False, class_numbers={"a": 0, "b": 1},
    )  # fmt: skip
    batches = TrainingBatches(
        shard_set, sample_order(config, shard_set, 0), decoder, batch_size=8, rank=0, world_size=1,
        epochs=2, pixel_cache_bytes=1 << 30,
    )  # fmt: skip
    batch = batches[0]
    assert batch.image_BCHW is None
    assert batch.present_BT is None
    assert batch.texts[0].shape == (8, build_model(TINY_MODEL).tokenizer.context_length)
    assert batch.classes_B is not None
    known = batch.samples_B != 7
    assert torch.equal(batch.classes_B[known], batch.samples_B[known] % 2)
    (skipped,) = batch.skipped
    assert skipped.reason == "label not in data.classes"
    # A sample that cannot be used is replaced by a neighbour, its class and its group too.
    assert all(
        torch.equal(a == b, c == d)
        for a, b, c, d in zip(
            *(batch.classes_B.roll(n) for n in (0, 1)),
            *(batch.groups_B.roll(n) for n in (0, 1)),
            strict=True,
        )
    )
