"""A few of the training samples, and labels that are wrong on purpose."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from clipsys.errors import TrainingError
from clipsys.images.preprocessing import Preprocessing
from clipsys.shards.samples import Sample
from clipsys.shards.writing import write_shards
from clipsys.training.data.batches import TrainingBatches
from clipsys.training.data.config import DataConfig
from clipsys.training.data.order import SampleOrder
from clipsys.training.data.ordering import sample_order
from clipsys.training.data.samples import Decoder
from clipsys.training.data.shard_set import open_shards
from clipsys.training.data.subset import LabelNoise, Subset, draw_subset
from tests.conftest import write_training_shards

_COUNTS = (30, 0, 50, 20)
#: 70 a, 25 b, 4 c, 1 d.
_FLAT = ["a"] * 20 + ["b"] * 10 + ["a"] * 46 + ["c"] * 4 + ["a"] * 4 + ["b"] * 15 + ["d"]
_LABELS: list[list[Any]] = [_FLAT[:30], [], _FLAT[30:80], _FLAT[80:]]


def _drawn(subset: Subset) -> Counter[str]:
    return Counter(
        labels[one] for labels, kept in zip(_LABELS, subset, strict=True) for one in kept
    )


@pytest.mark.parametrize(
    ("number", "shares"),
    [
        (100, {"a": 70, "b": 25, "c": 4, "d": 1}),
        (20, {"a": 13, "b": 5, "c": 1, "d": 1}),
        (8, {"a": 4, "b": 2, "c": 1, "d": 1}),
        (4, {"a": 1, "b": 1, "c": 1, "d": 1}),
    ],
)
def test_labels_keep_their_shares_and_each_has_one(number: int, shares: dict[str, int]) -> None:
    for seed in range(5):
        subset = draw_subset(_COUNTS, number, seed, _LABELS)
        found = _drawn(subset)
        assert found.total() == number and set(found) == set(shares)
        # A class that is given one more than its share costs others some of theirs.
        assert all(abs(found[label] - share) <= 1 for label, share in shares.items()), found
        assert all(list(kept) == sorted(set(kept)) for kept in subset)


def test_fewer_samples_than_classes_are_drawn_by_share() -> None:
    found = _drawn(draw_subset(_COUNTS, 2, 0, _LABELS))
    assert found.total() == 2 and found["a"] >= 1


def test_the_seed_and_nothing_else_decides() -> None:
    draws = [draw_subset(_COUNTS, 20, seed, _LABELS) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    chances: Counter[tuple[int, int]] = Counter()
    for seed in range(400):
        for shard, kept in enumerate(draw_subset(_COUNTS, 20, seed)):
            chances.update((shard, one) for one in kept)
    assert len(chances) == 100 and all(40 < count < 125 for count in chances.values())


def test_samples_without_a_label_are_not_drawn() -> None:
    labels = [[None if one == "a" else one for one in of_shard] for of_shard in _LABELS]
    assert _drawn(draw_subset(_COUNTS, 30, 0, labels)) == {"b": 25, "c": 4, "d": 1}
    with pytest.raises(TrainingError, match="is 31, but the shards hold only 30 samples with a l"):
        draw_subset(_COUNTS, 31, 0, labels)
    with pytest.raises(TrainingError, match=r"num_samples is 101, but .* 100 samples; lower"):
        draw_subset(_COUNTS, 101, 0)


@pytest.mark.parametrize("shuffle_shards", [None, 2])
def test_an_epoch_has_each_sample_of_the_subset_once(shuffle_shards: int | None) -> None:
    subset = draw_subset(_COUNTS, 20, 0)
    order = SampleOrder(tuple(map(len, subset)), 0, shuffle_shards, subset=subset)
    expected = {(shard, one) for shard, kept in enumerate(subset) for one in kept}
    for epoch in range(3):
        samples = order.samples(epoch, 0, 20)
        assert len(samples) == 20 and set(samples) == expected


def test_the_fingerprint_of_an_order_is_that_of_older_runs_unless_a_subset_is_drawn() -> None:
    whole, subset = SampleOrder((3, 3), 0), ((0, 1, 2), (0, 1, 2))
    assert "subset" not in repr(whole)
    others = {SampleOrder((3, 3), 0, subset=one).fingerprint() for one in (subset, ((0,), (1,)))}
    assert len(others | {whole.fingerprint()}) == 3


def test_noise_gives_the_share_of_samples_another_label_each_as_likely() -> None:
    noise = LabelNoise(0.3, 0, ("a", "b", "c"))
    found = Counter(noise.of("a", number) for number in range(4000))
    assert abs(found["a"] / 4000 - 0.7) < 0.03
    assert abs(found["b"] - found["c"]) < 150
    assert [noise.of("b", 5) for _ in range(3)] == [noise.of("b", 5)] * 3
    other = LabelNoise(0.3, 1, noise.classes)
    assert any(noise.of("a", n) != other.of("a", n) for n in range(20))
    # A larger share keeps what a smaller one has replaced.
    more = LabelNoise(0.6, 0, noise.classes)
    assert all(more.of("a", n) == noise.of("a", n) for n in range(99) if noise.of("a", n) != "a")


def test_a_label_that_is_no_class_is_left_as_it_is() -> None:
    assert LabelNoise(0.99, 0, ("a", "b")).of("unknown", 3) == "unknown"


def test_noise_is_seen_by_classes_and_by_groups_alike(tmp_path: Path) -> None:
    texts = (Sample(f"{n:02d}", b"", "", (f"text {n}",), "abc"[n % 3]) for n in range(60))
    write_shards(texts, tmp_path)
    config = DataConfig(train=str(tmp_path / "*.tar"), batch_size=60)
    shard_set = open_shards(config)
    noise = LabelNoise(0.5, 0, ("a", "b", "c"))
    decoder = Decoder(
        Preprocessing((32, 32)), _no_tokens, "first", "label", None, 1000, seed=0,
        needs_image=False, class_numbers={"a": 0, "b": 1, "c": 2}, label_noise=noise,
    )  # fmt: skip
    batches = TrainingBatches(
        shard_set, sample_order(config, shard_set, 0), decoder, batch_size=60, rank=0,
        world_size=1, epochs=2,
    )  # fmt: skip
    seen = []
    for batch in (batches[0], batches[1]):
        assert batch.classes_B is not None
        numbers = batch.samples_B.tolist()
        of_sample = dict(zip(numbers, batch.classes_B.tolist(), strict=True))
        assert of_sample == {n: "abc".index(noise.of("abc"[n % 3], n)) for n in range(60)}
        assert len(set(zip(batch.classes_B.tolist(), batch.groups_B.tolist(), strict=True))) == 3
        seen.append(of_sample)
    assert seen[0] == seen[1] != {n: n % 3 for n in range(60)}


def _no_tokens(texts: list[str]) -> Any:
    import torch

    return torch.zeros(len(texts), 4, dtype=torch.int64)


def test_the_pixel_cache_of_a_subset_has_room_for_the_subset_alone(tmp_path: Path) -> None:
    shards = write_training_shards(tmp_path, 40, shard_bytes=20_000)
    config = DataConfig(train=shards, batch_size=4)
    shard_set = open_shards(config)
    subset = draw_subset(shard_set.counts, 6, 0)
    decoder = Decoder(Preprocessing((32, 32)), _no_tokens, "first", "pair", None, 10**6, seed=0)
    options: dict[str, Any] = {"batch_size": 4, "rank": 0, "world_size": 1, "epochs": 9}
    order = sample_order(config, shard_set, 0, subset=subset)
    room = 6 * (8 + 1 + 3 * 32 * 32)
    cached = TrainingBatches(shard_set, order, decoder, pixel_cache_bytes=room, **options)
    plain = TrainingBatches(shard_set, order, decoder, pixel_cache_bytes=0, **options)
    assert cached._pixels is not None
    for one, other in zip(cached, plain, strict=True):
        assert one.image_BCHW is not None and other.image_BCHW is not None
        assert (one.image_BCHW == other.image_BCHW).all() and one.keys == other.keys


def test_a_subset_smaller_than_a_batch_names_the_setting() -> None:
    order = SampleOrder((2, 0, 3, 0), 0, subset=((0, 1), (), (4, 5, 6), ()))
    assert order.steps_per_epoch(4) == 1
    with pytest.raises(
        TrainingError, match=r"batch_size is 8, but data\.num_samples leaves only 5"
    ):
        order.steps_per_epoch(8)
