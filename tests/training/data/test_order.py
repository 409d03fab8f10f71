from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from clipsys.config import load_settings
from clipsys.errors import ConfigError, TrainingError
from clipsys.training.data.config import DataConfig
from clipsys.training.data.order import SampleOrder, _window_bounds, step_seed
from clipsys.training.data.ordering import sample_order
from clipsys.training.data.shard_set import ShardSet

_COUNTS = (5, 1, 7, 3, 9, 2, 4)
_ALL = {(shard, sample) for shard, count in enumerate(_COUNTS) for sample in range(count)}


@pytest.mark.parametrize("shuffle_shards", [None, 1, 2, 3, 7, 100])
def test_an_epoch_has_every_sample_once(shuffle_shards: int | None) -> None:
    order = SampleOrder(_COUNTS, 0, shuffle_shards)
    for epoch in range(3):
        samples = order.samples(epoch, 0, order.num_positions)
        assert len(samples) == len(_ALL) and set(samples) == _ALL


@pytest.mark.parametrize("shuffle_shards", [None, 1, 3])
@pytest.mark.parametrize("drawn", [None, 45])
def test_any_part_of_an_epoch_is_a_part_of_the_whole(
    shuffle_shards: int | None, drawn: int | None
) -> None:
    order = SampleOrder(_COUNTS, 0, shuffle_shards, drawn)
    whole = order.samples(2, 0, order.num_positions)
    rng = np.random.default_rng(0)
    for _ in range(50):
        first, last = sorted(rng.integers(0, order.num_positions + 1, 2).tolist())
        assert order.samples(2, first, last) == whole[first:last]


def test_seed_and_epoch_change_the_order_and_nothing_else_does() -> None:
    orders = {
        tuple(SampleOrder(_COUNTS, seed).samples(epoch, 0, 31))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9
    assert SampleOrder(_COUNTS, 1).samples(1, 0, 31) in map(list, orders)


def test_every_sample_is_as_likely_at_every_place() -> None:
    order = SampleOrder((2, 2), 0)
    firsts = Counter(order.samples(epoch, 0, 1)[0] for epoch in range(2000))
    assert set(firsts) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert all(abs(count - 500) < 5 * np.sqrt(2000 * 0.25 * 0.75) for count in firsts.values())


def test_shards_are_mixed_a_few_at_a_time() -> None:
    order = SampleOrder(_COUNTS, 0, 2)
    samples = order.samples(0, 0, order.num_positions)
    spans = {s: [at for at, (shard, _) in enumerate(samples) if shard == s] for s in range(7)}
    # At no place are more than two shards between their first and their last sample.
    for at in range(len(samples)):
        assert sum(span[0] <= at <= span[-1] for span in spans.values()) <= 2
    first, second = list(dict.fromkeys(shard for shard, _ in samples))[:2]
    assert {shard for shard, _ in samples[: _COUNTS[first] + _COUNTS[second]]} == {first, second}


@pytest.mark.parametrize("shuffle_shards", [None, 3])
def test_drawing_with_replacement_takes_all_samples_alike(shuffle_shards: int | None) -> None:
    order = SampleOrder(_COUNTS, 0, shuffle_shards, samples_per_epoch=31 * 400)
    counts = Counter(order.samples(0, 0, 31 * 400))
    assert set(counts) == _ALL
    # Drawn by threes, a shard's samples come together: a wider spread, the same mean.
    spread = 5 * np.sqrt(400) * (1 if shuffle_shards is None else 3)
    assert all(abs(count - 400) < spread for count in counts.values())


@pytest.mark.parametrize("shuffle_shards", [None, 2])
def test_sources_are_drawn_by_weight_whatever_their_size(shuffle_shards: int | None) -> None:
    config = DataConfig.model_validate(
        {
            "train": [{"shards": "a", "weight": 3}, {"shards": "b", "weight": 1}],
            "resampled": True,
            "samples_per_epoch": 8000,
            "shuffle_shards": shuffle_shards,
        }
    )
    order = sample_order(config, ShardSet(("a", "b0", "b1"), (10, 500, 100), (0, 1, 1)), 0)
    drawn = order.samples(0, 0, 8000)
    assert sum(shard == 0 for shard, _ in drawn) / 8000 == pytest.approx(0.75, abs=0.1)
    ours = Counter(shard for shard, _ in drawn if shard)
    assert ours[1] / ours[2] == pytest.approx(5, rel=0.6)


def test_windows_of_drawn_shards_have_no_gap() -> None:
    order = SampleOrder(_COUNTS, 0, 2, samples_per_epoch=50)
    windows = list(_window_bounds(order, 0))
    assert windows[0][1] == 0 and windows[-1][2] == 50
    assert all(before[2] == after[1] for before, after in pairwise(windows))


def test_an_order_is_known_by_its_fingerprint() -> None:
    orders = [
        SampleOrder(_COUNTS, 0), SampleOrder(_COUNTS, 1), SampleOrder(_COUNTS[:-1], 0),
        SampleOrder(_COUNTS, 0, 2), SampleOrder(_COUNTS, 0, None, 31),
    ]  # fmt: skip
    assert len({order.fingerprint() for order in orders}) == len(orders)
    assert SampleOrder(_COUNTS, 0).fingerprint() == orders[0].fingerprint()


def test_too_few_samples_for_one_batch_are_said() -> None:
    with pytest.raises(TrainingError, match="batch_size is 32, but the shards hold only 31"):
        SampleOrder(_COUNTS, 0).steps_per_epoch(32)
    with pytest.raises(TrainingError, match="but an epoch has only 5 samples"):
        SampleOrder(_COUNTS, 0, None, 5).steps_per_epoch(32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": [{"shards": "a", "weight": 1}, "b"]}, "give every source a weight, or none"),
        ({"train": [{"shards": "a", "weight": 1}]}, "set data.resampled: true"),
        ({"train": "a", "samples_per_epoch": 5}, "data.samples_per_epoch does nothing"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings(DataConfig, settings)  # type: ignore[arg-type]


def test_step_seeds_fit_torch_and_stay_what_they_were() -> None:
    import torch

    for seed in (0, 7, 4_500_000_000):
        assert step_seed(seed, 3, 1) == (seed * 1_000_003 + 3) * 4096 + 1
    seen = set()
    for seed in (2**63 - 1, 2**63 - 1 - 2**52, 20240131123456):
        for step in (0, 1):
            for rank in (0, 1):
                value = step_seed(seed, step, rank)
                torch.manual_seed(value)
                seen.add(value)
        order = SampleOrder((5, 7), seed)
        assert sorted(order.samples(1, 0, 12)) == sorted(SampleOrder((5, 7), 0).samples(0, 0, 12))
    assert len(seen) == 12
