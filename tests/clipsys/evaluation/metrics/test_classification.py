from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from clipsys.evaluation.metrics.classification import (
    figures_of,
    flat_figures,
    predictions,
    reliability,
)

CLASSES = [f"class {number}" for number in range(7)]


def _scores(count: int = 200, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 6, count)  # no image of the last class
    scores = rng.normal(size=(count, 7))
    scores[np.arange(count), targets] += 1.0
    return scores, targets


def test_figures_equal_scikit_learns() -> None:
    scores, targets = _scores()
    found = flat_figures(predictions(scores, targets, CLASSES))
    predicted = scores.argmax(axis=1)
    for average in ("macro", "weighted"):
        precision, recall, f1, _ = precision_recall_fscore_support(
            targets, predicted, average=average, labels=np.unique(targets), zero_division=0
        )
        assert found[f"{average}_precision"] == pytest.approx(precision)
        assert found[f"{average}_recall"] == pytest.approx(recall)
        assert found[f"{average}_f1"] == pytest.approx(f1)
    assert found["accuracy@1"] == pytest.approx((predicted == targets).mean())
    five = np.argsort(-scores, axis=1)[:, :5]
    assert found["accuracy@5"] == pytest.approx((five == targets[:, None]).any(axis=1).mean())
    assert found["mean_class_accuracy"] == found["macro_recall"]


def test_details_hold_the_confusion_matrix() -> None:
    scores, targets = _scores()
    _, outcomes, details = figures_of(
        predictions(scores, targets, CLASSES), [str(n) for n in range(200)]
    )
    expected = confusion_matrix(targets, scores.argmax(axis=1), labels=np.arange(7))
    assert np.array_equal(details.confusion_CC, expected)
    assert details.support_C.tolist() == expected.sum(axis=1).tolist()
    assert outcomes.values["accuracy@1"].mean() == np.diag(expected).sum() / 200


def test_a_class_that_ties_with_the_right_one_is_what_was_predicted() -> None:
    scores = np.array([[0.9, 0.1, 0.0], [0.5, 0.5, 0.0], [0.0, 0.2, 0.7]])
    found = predictions(scores, [0, 1, 1], CLASSES[:3])
    assert found.ranks_N.tolist() == [0, 1, 1]
    assert found.predicted_N.tolist() == [0, 0, 2]
    assert flat_figures(found)["accuracy@1"] == pytest.approx(1 / 3)
    assert flat_figures(found)["mean_class_accuracy"] == pytest.approx(0.5)


def test_the_calibration_error_equals_a_loop_over_the_bins() -> None:
    rng = np.random.default_rng(0)
    confidence, right = rng.uniform(size=500), rng.uniform(size=500) < 0.6
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    found = reliability(confidence, right)
    assert found.error == pytest.approx(error)
    assert found.count_B.sum() == 500
    # The bounds of the range belong to a bin, and an empty bin has no accuracy.
    ends = reliability(np.array([0.0, 1.0]), np.array([False, True]))
    assert (ends.count_B[0], ends.count_B[-1], ends.error) == (1, 1, 0.0)
    assert np.isnan(ends.accuracy_B[5])


def test_intervals_of_means_over_classes_equal_a_direct_bootstrap() -> None:
    scores, targets = _scores(80)
    confidence = np.random.default_rng(1).uniform(size=80)
    found = predictions(scores, targets, CLASSES, confidence_N=confidence)
    figures, _, _ = figures_of(found, [str(number) for number in range(80)])
    rng = np.random.default_rng(7)
    direct: dict[str, list[float]] = {}
    for _ in range(1000):
        rows = rng.integers(0, 80, 80)
        again = predictions(scores[rows], targets[rows], CLASSES, confidence_N=confidence[rows])
        for name, value in flat_figures(again).items():
            direct.setdefault(name, []).append(value)
    for name, figure in figures.items():
        assert figure.interval is not None
        # Two sets of a thousand draws: bounds differ by what draws differ.
        assert figure.interval == pytest.approx(np.percentile(direct[name], (2.5, 97.5)), abs=0.03)
        assert (
            figure.interval[0] <= figure.value <= figure.interval[1] or name == "calibration_error"
        )
    assert figures["accuracy@1"].chance == pytest.approx(1 / 7)
