"""All samples divided among ranks: each once, in batches of one size, the same number on each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clipsys.images.preprocessing import Preprocessing
from clipsys.models.open_clip_models import build_model
from clipsys.training.data.batches import NO_SAMPLE, TrainingBatches
from clipsys.training.data.config import DataConfig
from clipsys.training.data.further_texts import StatedNegatives
from clipsys.training.data.ordering import sample_order
from clipsys.training.data.samples import Batch, Decoder
from clipsys.training.data.shard_set import open_shards
from tests.conftest import TINY_MODEL, write_training_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_training_shards(tmp_path_factory.mktemp("shards"), 30, shard_bytes=40_000)


def _batches(shards: str, subset: Any = None) -> TrainingBatches:
    config = DataConfig(train=shards)
    decoder = Decoder(
        Preprocessing((32, 32)), build_model(TINY_MODEL).tokenizer, "random", "image", None,
        10_000, 3, further=StatedNegatives("family", 2),
    )  # fmt: skip
    shard_set = open_shards(config)
    order = sample_order(config, shard_set, 3, windows=None, subset=subset)
    return TrainingBatches(
        shard_set, order, decoder, batch_size=8, micro_batch_size=4, rank=0, world_size=1, epochs=2,
        pixel_cache_bytes=1 << 24,
    )  # fmt: skip


def _share(batches: TrainingBatches, rank: int, world_size: int, draw: int = 0) -> list[Batch]:
    return list(batches.shares(draw, 5, rank, world_size))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_have_every_sample_once_in_as_many_batches(shards: str, world_size: int) -> None:
    batches = _batches(shards)
    shares = [_share(batches, rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    rows = [batch for share in shares for batch in share]
    assert {len(batch.samples_B) for batch in rows} == {5}
    numbers = torch.cat([batch.samples_B for batch in rows])
    assert sorted(numbers[numbers != NO_SAMPLE].tolist()) == list(range(30))
    for batch in rows:
        # No texts but the caption: those are of training.
        assert len(batch.texts) == 1 and batch.further_groups_BT is None
        for number, caption, key in zip(
            batch.samples_B.tolist(), batch.captions, batch.keys, strict=True
        ):
            expected = {"": 0} if number == NO_SAMPLE else {f"picture number {number}": 0,
                                                            f"image {number}": 0}  # fmt: skip
            assert caption in expected
            assert key == ("" if number == NO_SAMPLE else f"{number:04d}")


def test_each_pass_draws_captions_anew_and_the_same_again(shards: str) -> None:
    batches = _batches(shards)
    first, again, other = (
        [caption for batch in _share(batches, 0, 1, draw) for caption in batch.captions]
        for draw in (0, 0, 6)
    )
    assert first == again != other


def test_samples_that_are_left_out_of_training_are_left_out(shards: str) -> None:
    counts = open_shards(DataConfig(train=shards)).counts
    subset = tuple(tuple(range(0, count, 3)) for count in counts)
    batches = _batches(shards, subset)
    starts = [sum(counts[:number]) for number in range(len(counts))]
    expected = [start + one for start, of in zip(starts, subset, strict=True) for one in of]
    numbers = torch.cat([batch.samples_B for batch in _share(batches, 0, 1)])
    assert numbers[numbers != NO_SAMPLE].tolist() == expected


def test_one_that_cannot_be_used_is_an_empty_row(tmp_path: Path) -> None:
    shards = write_training_shards(tmp_path, 6, with_captions=False)
    (batch, _) = _share(_batches_of_six(shards), 0, 1)
    assert batch.samples_B.tolist() == [NO_SAMPLE] * 5
    assert batch.image_BCHW is not None and not batch.image_BCHW.any()
    assert [one.reason for one in batch.skipped] == ["no caption"] * 5


def _batches_of_six(shards: str) -> TrainingBatches:
    config = DataConfig(train=shards, batch_size=2)
    decoder = Decoder(
        Preprocessing((32, 32)), build_model(TINY_MODEL).tokenizer, "first", "pair", None, 10_000, 3
    )
    shard_set = open_shards(config)
    order = sample_order(config, shard_set, 3, windows=None, subset=None)
    return TrainingBatches(shard_set, order, decoder, batch_size=2, rank=0, world_size=1, epochs=1)
