from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.linear_model import LogisticRegression

from clipsys.evaluation.tasks import trained_probes
from clipsys.evaluation.tasks.splitting import split_positions
from clipsys.evaluation.tasks.trained_probes import (
    Scorer,
    TrainingPart,
    logistic_regression,
    perceptron,
    strength,
    sweep,
)
from tests.clipsys.evaluation.tasks.data import clusters


def part_of(count: int, *, noise: float = 1.0) -> TrainingPart:
    data = clusters(count, noise=noise)
    fit, validation = split_positions(data, 0.2, seed=0)
    return TrainingPart(data.vectors_ND, np.arange(count) % 3, fit, validation)


def scored(
    trained: tuple[Scorer, float], query_MD: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float64], float]:
    """Probabilities of the queries, and what was chosen."""
    score, chosen = trained
    return score(query_MD), chosen


def test_the_sweep_is_that_of_the_clip_paper() -> None:
    tried: list[float] = []

    def score(c: float) -> tuple[float, float]:
        tried.append(c)
        return -abs(np.log10(c) - 2.4), 0.0

    assert sweep(score) == pytest.approx(10**2.375)
    assert tried[:7] == pytest.approx([1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6])
    assert len(tried) == 7 + 2 * 4 == len(set(tried))
    assert (strength(-48), strength(48)) == pytest.approx((1e-6, 1e6))
    assert sweep(lambda c: (-c, 0.0)) == pytest.approx(1e-6)
    assert sweep(lambda c: (c, 0.0)) == pytest.approx(1e6)
    assert sweep(lambda c: (1.0, 0.0)) == pytest.approx(1e-6)
    # Of equal accuracies, the smaller cross-entropy.
    assert sweep(lambda c: (1.0, -abs(np.log10(c)))) == pytest.approx(1)


def test_logistic_regression_equals_scikit_learn_with_every_c_of_the_search() -> None:
    part, test = part_of(120), clusters(60, noise=1.0, seed=1)
    probabilities, c = scored(logistic_regression(part, 3), test.vectors_ND)

    def fitted(rows: np.ndarray, strength: float) -> LogisticRegression:
        probe = LogisticRegression(C=strength, max_iter=1000)
        return probe.fit(part.vectors_ND[rows], part.targets_N[rows])

    everything = np.arange(120)
    expected = fitted(everything, c).predict_proba(test.vectors_ND)
    assert probabilities == pytest.approx(expected, abs=1e-6)
    validation = part.vectors_ND[part.validation], part.targets_N[part.validation]
    best = fitted(part.fit, c).score(*validation)
    for step in range(-48, 49, 16):
        assert fitted(part.fit, strength(step)).score(*validation) <= best


def test_fits_that_stop_early_are_counted_not_shouted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trained_probes, "MAX_ITERATIONS", 2)
    with caplog.at_level(logging.INFO):
        logistic_regression(part_of(60), 3)
    assert "fits stopped at 2 iterations" in caplog.text
    assert len(caplog.records) == 1


def test_without_validation_images_nothing_is_searched() -> None:
    data = clusters(3)
    part = TrainingPart(data.vectors_ND, np.arange(3), np.arange(3), np.arange(0))
    probabilities, c = scored(logistic_regression(part, 3), data.vectors_ND)
    assert (c, probabilities.argmax(axis=1).tolist()) == (1.0, [0, 1, 2])
    probabilities, epochs = scored(perceptron(part, 3), data.vectors_ND)
    assert (epochs, probabilities.argmax(axis=1).tolist()) == (25, [0, 1, 2])


def test_a_class_that_only_the_validation_part_has_gets_no_probability_there() -> None:
    data = clusters(30)
    targets = np.arange(30) % 3
    fit, validation = np.flatnonzero(targets != 1), np.flatnonzero(targets == 1)
    part = TrainingPart(data.vectors_ND, targets, fit, validation)
    probabilities, _ = scored(logistic_regression(part, 3), data.vectors_ND)
    assert probabilities.shape == (30, 3)


def test_the_perceptron_learns_what_no_line_separates_and_repeats_itself() -> None:
    random = np.random.default_rng(0)
    signs = random.choice((-1.0, 1.0), (400, 2))
    vectors = signs + 0.2 * random.normal(size=(400, 2))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    targets = (signs[:, 0] * signs[:, 1] > 0).astype(np.int64)
    part = TrainingPart(vectors[:300], targets[:300], np.arange(240), np.arange(240, 300))
    first, epochs = scored(perceptron(part, 2, hidden=32), vectors[300:])
    again, _ = scored(perceptron(part, 2, hidden=32), vectors[300:])
    other, _ = scored(perceptron(part, 2, hidden=32, seed=1), vectors[300:])
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert 1 <= epochs <= 100
    assert first.sum(axis=1) == pytest.approx(np.ones(100))
    assert (first.argmax(axis=1) == targets[300:]).mean() > 0.95
    linear, _ = scored(logistic_regression(part, 2), vectors[300:])
    assert (linear.argmax(axis=1) == targets[300:]).mean() < 0.75


def test_the_perceptron_leaves_the_random_state_of_others_alone() -> None:
    import torch

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    perceptron(part_of(30), 3, hidden=4, epochs=4)
    assert torch.equal(torch.rand(3), expected)
