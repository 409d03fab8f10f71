from __future__ import annotations

import numpy as np
import pytest

from clipsys.errors import ModelError
from clipsys.evaluation.metrics import ranks
from clipsys.evaluation.metrics.relation import Relation


def _naive(scores: np.ndarray, correct: np.ndarray) -> tuple[int, float]:
    """First rank and average precision of one query from a whole sort, ties against the model.

    Each correct candidate stands behind every wrong one that scores the same.
    """
    if not correct.any():
        return ranks.NO_HIT, 0.0
    order = sorted(range(len(scores)), key=lambda n: (-scores[n], correct[n]))
    hits = [place for place, n in enumerate(order) if correct[n]]
    return hits[0], float(np.mean([(i + 1) / (place + 1) for i, place in enumerate(hits)]))


def _relation(correct: np.ndarray, candidate_groups: np.ndarray) -> Relation:
    lists = [sorted({*candidate_groups[row]}) for row in correct]
    return Relation.of_lists(lists, candidate_groups)


@pytest.mark.parametrize("block", [1, 3, 1000])
@pytest.mark.parametrize("num_candidates", [23, 90])
def test_ranks_and_precision_equal_those_of_a_whole_sort(block: int, num_candidates: int) -> None:
    rng = np.random.default_rng(num_candidates)
    # Coarse values, so that ties are frequent; 90 candidates in 4 groups are sorted, not compared.
    queries = rng.integers(-2, 3, (17, 4)).astype(np.float32)
    candidates = rng.integers(-2, 3, (num_candidates, 4)).astype(np.float32)
    groups = rng.integers(0, 4 if num_candidates > 50 else 7, num_candidates)
    lists = [rng.choice(9, size=rng.integers(0, 3), replace=False).tolist() for _ in range(17)]
    relation = Relation.of_lists(lists, groups)
    found = ranks.rank(queries, candidates, relation, block=block)
    for number, own in enumerate(lists):
        scores, correct = candidates @ queries[number], np.isin(groups, own)
        first, precision = _naive(scores, correct)
        assert found.first_Q[number] == first
        assert found.precision_Q[number] == pytest.approx(precision, abs=1e-12)
        if correct.any():
            assert scores[found.best_Q[number]] == scores[correct].max()
    assert relation.counts().tolist() == [int(np.isin(groups, own).sum()) for own in lists]


def test_the_relation_seen_from_the_candidates_has_the_same_pairs() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 5, 12)
    lists = [[0], [1, 3], [], [6], [3]]
    relation = Relation.of_lists(lists, groups)
    pairs = {(row, column) for row, column in zip(*relation.pairs(0, 5), strict=True)}
    turned = relation.transposed(12)
    assert {(row, column) for column, row in zip(*turned.pairs(0, 12), strict=True)} == pairs
    assert len(turned) == 12
    assert np.array_equal(
        np.diff(turned.pairs(3, 9)[0]) >= 0, [True] * len(np.diff(turned.pairs(3, 9)[0]))
    )


def test_equal_vectors_tie_wherever_they_stand() -> None:
    """A copy of the correct candidate is as good as it, to the last bit."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(40, 96)).astype(np.float32)
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    copies = np.concatenate([base, base, base[:3]])
    relation = Relation.of_groups(np.arange(40), np.arange(len(copies)))
    queries = base + np.float32(0.001)
    found = ranks.rank(queries, copies, relation, block=7)
    assert found.first_Q.tolist() == [2] * 3 + [1] * 37


def test_a_constant_encoder_does_not_look_good() -> None:
    same = np.ones((50, 8), np.float32)
    found = ranks.rank(same, same, Relation.of_groups(np.arange(50), np.arange(50)))
    assert ranks.recall_at(found.first_Q, [1, 10]) == {"recall@1": 0.0, "recall@10": 0.0}
    assert found.precision_Q.tolist() == [1 / 50] * 50


def test_a_query_without_a_correct_candidate_misses_at_every_k() -> None:
    one = np.ones((1, 2), np.float32)
    found = ranks.rank(one, one, Relation.of_groups([0], [1]))
    assert ranks.recall_at(found.first_Q, [1, 10]) == {"recall@1": 0.0, "recall@10": 0.0}
    assert (found.best_Q[0], found.precision_Q[0]) == (-1, 0)


def test_no_queries_give_zero() -> None:
    nothing = np.zeros((0, 4), np.float32)
    found = ranks.rank(nothing, nothing, Relation.of_groups([], []))
    assert ranks.recall_at(found.first_Q) == {"recall@1": 0.0, "recall@5": 0.0, "recall@10": 0.0}


def test_vectors_that_are_no_numbers_are_refused() -> None:
    vectors = np.full((2, 2), np.nan, np.float32)
    with pytest.raises(ModelError, match="not finite"):
        ranks.rank(vectors, vectors, Relation.of_groups([0, 1], [0, 1]))
