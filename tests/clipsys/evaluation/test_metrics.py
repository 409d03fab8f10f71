from __future__ import annotations

from math import comb

import numpy as np
import pytest

from clipsys.evaluation.metrics import ranks as metrics
from clipsys.evaluation.metrics.classification import accuracy


def _naive_rank(scores: np.ndarray, correct: np.ndarray) -> int:
    """Sorts pessimistically: among equal scores, wrong candidates stand first."""
    order = sorted(range(len(scores)), key=lambda n: (-scores[n], correct[n]))
    return next((rank for rank, n in enumerate(order) if correct[n]), metrics.NO_HIT)


@pytest.mark.parametrize("block", [1, 3, 1000])
def test_ranks_equal_those_of_a_plain_sort(block: int) -> None:
    rng = np.random.default_rng(0)
    # Coarse values, so that ties are frequent.
    queries = rng.integers(-2, 3, (17, 4)).astype(np.float32)
    candidates = rng.integers(-2, 3, (23, 4)).astype(np.float32)
    query_groups, candidate_groups = rng.integers(0, 9, 17), rng.integers(0, 7, 23)
    actual = metrics.first_hit_ranks(
        queries, candidates, query_groups, candidate_groups, block=block
    )
    expected = [
        _naive_rank(candidates @ query, candidate_groups == group)
        for query, group in zip(queries, query_groups, strict=True)
    ]
    assert actual.tolist() == expected


def test_a_constant_encoder_does_not_look_good() -> None:
    same = np.ones((50, 8), np.float32)
    ranks = metrics.first_hit_ranks(same, same, np.arange(50), np.arange(50))
    assert metrics.recall_at(ranks, [1, 10]) == {"recall@1": 0.0, "recall@10": 0.0}


def test_a_query_without_a_correct_candidate_misses_at_every_k() -> None:
    one = np.ones((1, 2), np.float32)
    ranks = metrics.first_hit_ranks(one, one, [0], [1])
    assert metrics.recall_at(ranks, [1, 10]) == {"recall@1": 0.0, "recall@10": 0.0}


def test_no_queries_give_zero() -> None:
    nothing = np.zeros((0, 4), np.float32)
    assert metrics.recall_at(metrics.first_hit_ranks(nothing, nothing, [], [])) == {
        "recall@1": 0.0,
        "recall@5": 0.0,
        "recall@10": 0.0,
    }


def test_chance_is_the_hypergeometric_probability() -> None:
    groups = [0] * 3 + [1] * 5 + [2]
    chance = metrics.chance_recall([0, 1, 2, 7], groups, [2, 20])
    expected = [1 - comb(9 - p, 2) / comb(9, 2) for p in (3, 5, 1, 0)]
    assert chance["recall@2"] == pytest.approx(np.mean(expected))
    assert chance["recall@20"] == pytest.approx(0.75)


def test_accuracy_counts_ties_against_the_model() -> None:
    scores = np.array([[0.9, 0.1, 0.0], [0.5, 0.5, 0.0], [0.0, 0.2, 0.7]], np.float32)
    figures = accuracy(scores, [0, 1, 1], [1, 2])
    assert figures["accuracy@1"] == pytest.approx(1 / 3)
    assert figures["accuracy@2"] == 1.0
    assert figures["mean_class_accuracy"] == pytest.approx(0.5)
    assert accuracy(np.zeros((0, 3), np.float32), [])["accuracy@1"] == 0.0
