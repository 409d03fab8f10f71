from __future__ import annotations

from math import comb

import numpy as np
import pytest

from clipsys.evaluation.metrics import chance


def test_chance_recall_is_the_hypergeometric_probability() -> None:
    counts = np.array([3, 5, 1, 0])
    found = chance.chance_recall(counts, 9, [2, 20])
    assert found[2] == pytest.approx(
        np.mean([1 - comb(9 - p, 2) / comb(9, 2) for p in (3, 5, 1, 0)])
    )
    assert found[20] == pytest.approx(0.75)
    assert chance.chance_recall(np.zeros(0, np.int64), 9, [1]) == {1: 0.0}


def test_chance_precision_and_median_rank_equal_a_simulation() -> None:
    rng = np.random.default_rng(0)
    counts, total = np.array([1, 3, 7]), 12
    precisions, firsts = [], []
    for _ in range(20_000):
        for p in counts:
            hits = np.sort(rng.permutation(total)[:p])
            precisions.append(np.mean(np.arange(1, p + 1) / (hits + 1)))
            firsts.append(hits[0] + 1)
    assert chance.chance_precision(counts, total) == pytest.approx(np.mean(precisions), abs=0.005)
    assert chance.chance_median_rank(counts, total) == np.median(firsts)
    assert chance.chance_median_rank(np.array([0, 0, 1]), 4) == float("inf")
    assert chance.chance_precision(np.array([1]), 1) == 1.0
