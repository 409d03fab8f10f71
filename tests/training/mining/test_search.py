"""Which texts are taken as hard negatives, against a loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from clipsys.config import load_settings
from clipsys.errors import ConfigError
from clipsys.training.mining import search
from clipsys.training.mining.config import MiningConfig
from clipsys.training.mining.search import hard_negatives
from clipsys.training.recipe import Recipe


def _data(count: int = 40, width: int = 8) -> tuple[Any, Any, Any, Any]:
    rng = np.random.default_rng(1)
    image, noise = rng.standard_normal((2, count, width), np.float32)
    text = image + 0.8 * noise
    image, text = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in (image, text))
    groups, usable = rng.integers(0, count // 2, count), np.ones(count, np.bool_)
    usable[[3, 17]] = False
    return image, text, groups, usable


def _loop(image: Any, text: Any, groups: Any, usable: Any, settings: MiningConfig) -> list[Any]:
    """Row by row, from all cosines."""
    found = []
    for i in range(len(image)):
        row: list[int] = []
        if usable[i]:
            cosines = {j: float(image[i] @ text[j]) for j in np.flatnonzero(usable).tolist()}
            nearest = sorted(cosines, key=lambda j: -cosines[j])[: settings.depth + 1]
            others = [j for j in nearest if groups[j] != groups[i]][settings.skip :]
            own = cosines[i]
            if settings.max_relative_similarity is not None:
                bound = own - (1 - settings.max_relative_similarity) * abs(own)
                others = [j for j in others if cosines[j] <= bound]
            if settings.max_similarity is not None:
                others = [j for j in others if cosines[j] <= settings.max_similarity]
            row = others[: settings.candidates]
        found.append(row + [-1] * (settings.candidates - len(row)))
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_relative_similarity": None},
        {"max_relative_similarity": 0.5, "skip": 2},
        {"max_relative_similarity": None, "max_similarity": 0.3, "depth": 60},
        {"max_relative_similarity": 0.9, "max_similarity": 0.0, "depth": 38},
        {"max_relative_similarity": 1.0, "skip": 3},
    ],
)
def test_candidates_are_those_of_a_loop(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = MiningConfig(**{"depth": 12, "candidates": 4, **options})
    expected = _loop(*_data(), settings)
    for block in (1024, 7):
        monkeypatch.setattr(search, "_BLOCK", block)
        found = hard_negatives(*_data(), settings)
        assert found.candidates_NH.tolist() == expected
        rows = [row for row, usable in zip(expected, _data()[3], strict=True) if usable]
        assert found.figures["without"] == pytest.approx(np.mean([row[0] < 0 for row in rows]))


def test_approximate_search_finds_mostly_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = MiningConfig(depth=20, candidates=5)
    exact = hard_negatives(*_data(2000), settings).candidates_NH
    monkeypatch.setattr(search, "_EXACT_UP_TO", 1000)
    found = hard_negatives(*_data(2000), settings).candidates_NH
    again = hard_negatives(*_data(2000), settings).candidates_NH
    np.testing.assert_array_equal(found, again)
    shared = [len(set(a) & set(b)) / 5 for a, b in zip(exact, found, strict=True) if a[-1] >= 0]
    assert np.mean(shared) > 0.9


def test_equal_vectors_one_group_and_no_sample_give_no_candidates() -> None:
    image, text, groups, usable = _data()
    none = MiningConfig(depth=12, candidates=4)
    one_group = hard_negatives(image, text, 0 * groups, usable, none)
    assert (one_group.candidates_NH == -1).all()
    assert one_group.figures["without"] == 1
    # All as near as the own text, so above the bound.
    equal = hard_negatives(image[[0] * 40], image[[0] * 40], groups, usable, none)
    assert (equal.candidates_NH == -1).all()
    assert (hard_negatives(image, text, groups, ~usable & False, none).candidates_NH == -1).all()


def test_settings_that_leave_nothing_are_refused() -> None:
    def recipe(**objective: Any) -> Recipe:
        section = {"name": "mined_infonce", **objective}
        return load_settings(Recipe, {"data": {"train": "x"}, "objective": section})

    assert recipe().objective.name == "mined_infonce"
    with pytest.raises(ConfigError, match=r"objective.mining; skip is 9, which leaves none of"):
        recipe(mining={"skip": 9, "depth": 9, "candidates": 1})
    with pytest.raises(ConfigError, match=r"candidates is 10, more than the 8 of depth 9 after s"):
        recipe(mining={"skip": 1, "depth": 9})
    with pytest.raises(ConfigError, match=r"objective.num_negatives is 11, more than the 10 that"):
        recipe(num_negatives=11)
