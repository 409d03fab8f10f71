from __future__ import annotations

import numpy as np
import pytest

from clipsys.evaluation.metrics import nearest
from clipsys.evaluation.tasks import knn
from clipsys.evaluation.tasks.knn import neighbour_votes
from tests.clipsys.evaluation.tasks.data import clusters


@pytest.mark.parametrize("k", [1, 10, 20, 200])
def test_votes_equal_those_of_a_loop(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = clusters(150, noise=1.5), clusters(40, noise=1.5, seed=1)
    targets = np.arange(150) % 3
    expected = np.zeros((40, 3))
    for row, query in enumerate(test.vectors_ND):
        cosines = [float(query @ vector) for vector in train.vectors_ND]
        for other in sorted(range(150), key=lambda other: -cosines[other])[:k]:
            expected[row, targets[other]] += np.exp(cosines[other] / 0.07)
    expected /= expected.sum(axis=1, keepdims=True)
    whole = neighbour_votes(test.vectors_ND, train.vectors_ND, targets, 3, k=k)
    assert whole == pytest.approx(expected, rel=1e-4, abs=1e-6)
    monkeypatch.setattr(knn, "QUERIES", 7)
    monkeypatch.setattr(nearest, "_CANDIDATES", 11)
    blocks = neighbour_votes(test.vectors_ND, train.vectors_ND, targets, 3, k=k)
    assert blocks == pytest.approx(whole, rel=1e-4, abs=1e-6)


def test_the_earlier_of_equally_near_images_votes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "_CANDIDATES", 5)
    same = np.ones((12, 1), np.float32)
    targets = np.array([2, 1, 1, *[0] * 9])
    votes = neighbour_votes(same[:2], same, targets, 3, k=3)
    assert votes == pytest.approx(np.array([[0, 2 / 3, 1 / 3]] * 2))


def test_images_of_the_own_group_do_not_vote() -> None:
    same = np.ones((4, 1), np.float32)
    groups = np.array([0, 0, 1, 1])
    votes = neighbour_votes(same, same, np.array([0, 1, 2, 2]), 3, groups_N=groups, groups_M=groups)
    assert votes.tolist() == [[0, 0, 1], [0, 0, 1], [0.5, 0.5, 0], [0.5, 0.5, 0]]
    alone = np.zeros(4, np.int64)
    votes = neighbour_votes(same, same, alone, 1, groups_N=alone, groups_M=alone)
    assert votes.tolist() == [[0]] * 4
