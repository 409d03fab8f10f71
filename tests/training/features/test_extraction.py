"""Stored features: blocks that are complete or absent, samples that cannot be used, faults."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clipsys.config import load_settings
from clipsys.errors import TrainingError
from clipsys.shards.samples import Sample
from clipsys.shards.writing import write_shards
from clipsys.training.data.order import SampleOrder
from clipsys.training.data.shard_set import open_shards
from clipsys.training.features import store
from clipsys.training.features.batches import BatchShape, FeatureBatches, FeatureTable
from clipsys.training.features.extraction import FeatureSource, stored_features
from clipsys.training.features.store import BlockStore
from clipsys.training.features.trunks import Trunks
from clipsys.training.model.initial import initial_model
from clipsys.training.objectives import make_objective
from clipsys.training.recipe import Recipe
from clipsys.training.run_data import make_decoder
from tests.conftest import encode_png
from tests.two_towers import tower_sections

_BROKEN = 5


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """20 samples with 1 to 3 captions; one image is broken, and one sample has no caption."""
    rng = np.random.default_rng(0)
    samples = []
    for number in range(20):
        image = encode_png(rng.integers(0, 255, (40, 40, 3), np.uint8))
        captions = tuple(f"a {word} {number}" for word in ("cat", "dog", "star")[: 1 + number % 3])
        if number == _BROKEN:
            image = image[:60]
        samples.append(Sample(f"{number:02d}", image, "png", captions if number != 11 else ()))
    folder = tmp_path_factory.mktemp("pairs")
    write_shards(samples, folder, shard_bytes=40_000)
    return str(folder / "*.tar")


@pytest.fixture
def source(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, towers: Path
) -> tuple[FeatureSource, Any]:
    monkeypatch.setattr(store, "SMALL_BLOCK", 8)
    recipe = load_settings(
        Recipe,
        {
            "model": tower_sections(towers),
            "data": {"train": shards, "batch_size": 4},
            "features": {"folder": str(tmp_path / "features"), "views": 2, "batch_size": 3},
        },
    )
    objective = make_objective(recipe.objective)
    parts = initial_model(recipe.model)
    shard_set = open_shards(recipe.data)
    decoder = make_decoder(recipe, objective, parts, ())
    numbers = range(shard_set.num_samples)
    made = FeatureSource(
        recipe.features, recipe.augmentation, decoder, shard_set, numbers, recipe.seed,
        recipe.data.shard_cache,
    )  # fmt: skip
    return made, parts


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("towers")
    tower_sections(folder)
    return folder


def _compute(source: FeatureSource, parts: Any) -> tuple[BlockStore, BlockStore]:
    trunks = Trunks(
        parts, torch.device("cpu"), stored=("image", "text"), precision="fp32", channels_last=False
    )
    return stored_features(source, trunks, parts, precision="fp32")


def test_only_missing_blocks_are_computed_again(source: tuple[FeatureSource, Any]) -> None:
    images, _ = _compute(*source)
    blocks = sorted(images.folder.glob("*.npy"))
    assert [path.name for path in blocks] == ["00000.npy", "00001.npy", "00002.npy"]
    before = [path.read_bytes() for path in blocks]
    stamps = [path.stat().st_mtime_ns for path in blocks]
    (images.folder / "00001.npz").unlink()  # what a kill leaves: features without their record
    blocks[1].write_bytes(b"half")
    _compute(*source)
    assert [path.read_bytes() for path in blocks] == before
    changed = [path.stat().st_mtime_ns != stamp for path, stamp in zip(blocks, stamps, strict=True)]
    assert changed == [False, True, False]


def test_every_caption_has_features_in_the_order_of_its_sample(
    source: tuple[FeatureSource, Any],
) -> None:
    made, parts = source
    _, texts = _compute(made, parts)
    info = texts.info(0)
    assert info["counts"].tolist() == [1, 2, 3, 1, 2, 3, 1, 2]
    row = int(info["counts"][:4].sum()) + 1  # the second caption of sample 4
    with torch.no_grad():
        text = parts.model.text
        tokens = parts.tokenizer(["a dog 4"])
        mask = (tokens != text.config.pad_token_id).long()
        hidden = text.transformer(input_ids=tokens, attention_mask=mask)
        expected = text.pooler(hidden, mask)[0].numpy()
    assert np.abs(texts.features(0)[row] - expected).max() < 1e-3 * np.abs(expected).max() + 1e-4


def test_a_sample_that_cannot_be_used_is_replaced_and_reported(
    source: tuple[FeatureSource, Any],
) -> None:
    made, parts = source
    stores = _compute(made, parts)
    table = FeatureTable(*stores, made.numbers, views=2, shard_set=made.shard_set)
    order = SampleOrder(made.shard_set.counts, 0)
    batches = FeatureBatches(
        table, order, BatchShape(4, 4, 0, 1),
        views=2, captions="random", positives="image", seed=0, epochs=1,
    )  # fmt: skip
    found = list(batches.from_step(0))
    skipped = [one for batch in found for one in batch.skipped]
    assert {one.key for one in skipped} == {"05", "11"}
    assert all(one.reason and one.shard.endswith(".tar") for one in skipped)
    numbers = torch.cat([batch.samples_B for batch in found]).tolist()
    assert len(numbers) == 20 and not {_BROKEN, 11} & set(numbers)
    for batch in found:  # a twin is a positive of the one that it stands for
        for row, number in enumerate(batch.samples_B.tolist()):
            first = batch.samples_B.tolist().index(number)
            assert batch.groups_B[row] == batch.groups_B[first]


def test_other_weights_data_or_augmentation_have_other_features(
    source: tuple[FeatureSource, Any],
) -> None:
    made, parts = source
    first, texts = _compute(made, parts)
    flipped = replace(made, augmentation=made.augmentation.model_copy(update={"flip": 1.0}))
    other, same_texts = _compute(flipped, parts)
    assert other.folder != first.folder
    assert same_texts.folder == texts.folder
    with torch.no_grad():
        parts.model.visual.trunk.conv_stem.weight.mul_(2)
        parts.model.visual.head.proj.weight.mul_(2)
    third, again = _compute(made, parts)
    assert third.folder not in (first.folder, other.folder)
    assert again.folder == texts.folder


def test_a_damaged_block_is_named_with_the_remedy(source: tuple[FeatureSource, Any]) -> None:
    images, _ = _compute(*source)
    (images.folder / "00001.npy").write_bytes(b"no array")
    with pytest.raises(
        TrainingError, match=r"00001\.npy: stored features cannot be read .* remove"
    ):
        images.features(1)
