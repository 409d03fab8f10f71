from __future__ import annotations

import numpy as np
import pytest

from clipsys.errors import ModelError
from clipsys.evaluation.metrics import ranks
from clipsys.evaluation.metrics.distinct import distinct_rows
from clipsys.evaluation.metrics.relation import Relation
from clipsys.evaluation.metrics.two_way import rank_both


def _naive(scores: np.ndarray, correct: np.ndarray) -> tuple[int, float]:
    """First rank and average precision from a whole sort; wrong candidates win every tie."""
    if not correct.any():
        return ranks.NO_HIT, 0.0
    order = sorted(range(len(scores)), key=lambda n: (-scores[n], correct[n]))
    hits = [place for place, n in enumerate(order) if correct[n]]
    return hits[0], float(np.mean([(i + 1) / (place + 1) for i, place in enumerate(hits)]))


def _matrix(relation: Relation, shape: tuple[int, int]) -> np.ndarray:
    correct = np.zeros(shape, bool)
    correct[relation.pairs(0, shape[0])] = True
    return correct


def _agrees(found: ranks.Ranking, scores: np.ndarray, correct: np.ndarray) -> None:
    for number, (row, own) in enumerate(zip(scores, correct, strict=True)):
        first, precision = _naive(row, own)
        assert found.first_Q[number] == first
        assert found.precision_Q[number] == pytest.approx(precision, abs=1e-12)
        best = found.best_Q[number]
        assert row[best] == row[own].max() if own.any() else best == -1


@pytest.mark.parametrize("tile", [(1, 1), (7, 5), (64, 3), None])
@pytest.mark.parametrize("num_groups", [40, 2])
@pytest.mark.parametrize("max_pairs", [0, 10**6])
def test_both_directions_equal_a_whole_sort_with_ties(
    tile: tuple[int, int] | None, num_groups: int, max_pairs: int
) -> None:
    rng = np.random.default_rng(num_groups)
    # Whole numbers: products are exact in any order, ties and equal vectors are frequent. Of two
    # groups a query has more correct candidates than are compared one by one.
    texts = rng.integers(-1, 2, (31, 4)).astype(np.float32)
    images = rng.integers(-1, 2, (67, 4)).astype(np.float32)
    lists = [rng.choice(num_groups, rng.integers(0, 3), replace=False).tolist() for _ in range(31)]
    relation = Relation.of_lists(lists, rng.integers(0, num_groups, 67))
    scores = (texts.astype(np.float64) @ images.T.astype(np.float64)).astype(np.float64)
    correct = _matrix(relation, scores.shape)
    done: list[int] = []
    of_texts, of_images = rank_both(
        texts, images, relation, tile=tile, max_pairs=max_pairs, advance=done.append
    )
    _agrees(of_texts, scores, correct)
    _agrees(of_images, scores.T, correct.T)
    assert sum(done) == 31 + 67


@pytest.mark.parametrize("max_pairs", [0, 10**6])
@pytest.mark.parametrize("width", [33, 96, 512])
def test_equal_vectors_tie_in_whatever_tile_they_stand(width: int, max_pairs: int) -> None:
    """Tiles of odd sizes take other paths through a product, which differ in the last bit."""
    rng = np.random.default_rng(width)
    base = rng.normal(size=(61, width)).astype(np.float32)
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    order = rng.permutation(3 * 61)
    images = np.tile(base, (3, 1))[order]  # each picture three times, and only one is correct
    of_image = np.tile(np.arange(61), 3)[order]
    first = np.array([np.flatnonzero(of_image == number)[0] for number in range(61)])
    relation = Relation.of_lists([[one] for one in first.tolist()], np.arange(183))
    near = base + rng.normal(0, 1e-3, base.shape).astype(np.float32)
    of_texts, of_images = rank_both(near, images, relation, tile=(5, 7), max_pairs=max_pairs)
    assert of_texts.first_Q.tolist() == [2] * 61
    assert of_texts.precision_Q == pytest.approx(np.full(61, 1 / 3))
    assert of_images.first_Q[first].tolist() == [0] * 61


def test_a_constant_encoder_does_not_look_good_in_either_direction() -> None:
    same = np.full((50, 8), 8**-0.5, np.float32)
    relation = Relation.of_groups(np.arange(50), np.arange(50))
    for found in rank_both(same, same, relation, tile=(3, 11)):
        assert found.first_Q.tolist() == [49] * 50
        assert found.precision_Q.tolist() == [1 / 50] * 50


def test_no_texts_one_pair_and_vectors_that_are_no_numbers() -> None:
    one, nothing = np.ones((1, 2), np.float32), np.zeros((0, 2), np.float32)
    of_texts, of_images = rank_both(nothing, one, Relation.of_groups([], [0]))
    assert (len(of_texts.first_Q), of_images.first_Q.tolist()) == (0, [ranks.NO_HIT])
    of_texts, of_images = rank_both(one, one, Relation.of_groups([0], [0]))
    assert (of_texts.first_Q[0], of_images.precision_Q[0]) == (0, 1.0)
    with pytest.raises(ModelError, match="not finite"):
        rank_both(one, one * np.float32(np.inf), Relation.of_groups([0], [0]))


def test_distinct_rows_are_those_of_a_comparison_of_all() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.integers(0, 2, (40, 3)).astype(np.float32)
    vectors[vectors == 0] *= rng.choice([-1.0, 1.0], (vectors == 0).sum())  # -0.0 equals 0.0
    found = distinct_rows(vectors)
    assert np.array_equal(found.rows_UD[found.number_N], vectors)
    assert len(found.rows_UD) == len({tuple(row) for row in vectors.tolist()})
    assert found.repeats_U.tolist() == np.bincount(found.number_N).tolist()
    assert found.has_repeats
    unequal = distinct_rows(np.arange(6, dtype=np.float32).reshape(3, 2))
    assert not unequal.has_repeats
    assert len(distinct_rows(np.zeros((0, 2), np.float32)).rows_UD) == 0
