"""Figures of a classification from the class scores of every image, with bootstrap intervals.

Legend of shapes: N images, C classes, R resamples, U units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clipsys.evaluation.results import (
    ClassificationDetails,
    Doubles,
    Figure,
    Integers,
    Outcomes,
    Reliability,
)

RESAMPLES = 1000
_BINS = 15


@dataclass(frozen=True)
class Scored:
    """A classification, measured."""

    figures: dict[str, Figure]
    outcomes: Outcomes
    details: ClassificationDetails


def score_classes(
    score_NC: Doubles,
    targets_N: Integers,
    classes: Sequence[str],
    uris: Sequence[str],
    units_N: Integers,
    *,
    chance: float,
    calibrated: bool,
) -> Scored:
    """Accuracy, and precision, recall and F1 as scikit-learn defines them.

    A class that ties with the right one counts as better for ``accuracy@5``; the prediction is the
    first of the highest.

    Args:
        score_NC: (N, C) probabilities, or shares of votes.
        units_N: images of one unit show the same thing and are drawn together by the bootstrap.
        chance: accuracy of the best answer that ignores the image.
        calibrated: whether the scores are meant as probabilities, and get a calibration error.
    """
    from sklearn.metrics import precision_recall_fscore_support

    num_classes, num_images = len(classes), len(targets_N)
    predicted_N = score_NC.argmax(axis=1)
    values = {"accuracy@1": (predicted_N == targets_N).astype(np.float64)}
    if num_classes > 5:
        right_N1 = score_NC[np.arange(num_images), targets_N][:, None]
        values["accuracy@5"] = ((score_NC >= right_N1).sum(axis=1) <= 5).astype(np.float64)
    confusion_CC = np.bincount(
        targets_N * num_classes + predicted_N, minlength=num_classes**2
    ).reshape(num_classes, num_classes)
    resamples = draw_units(units_N)
    figures = {
        name: Figure(
            float(value_N.mean()),
            num_images,
            mean_interval(value_N, units_N, resamples),
            chance if name == "accuracy@1" else min(1.0, 5 / num_classes),
        )
        for name, value_N in values.items()
    }
    whole = averages(confusion_CC.astype(np.float64))
    drawn = _resampled_averages(targets_N, predicted_N, num_classes, units_N, resamples)
    for name, value in whole.items():
        level = 1 / num_classes if name == "mean_class_accuracy" else None
        figures[name] = Figure(value, num_images, _bounds(drawn[name]), level)
    precision_C, recall_C, f1_C, support_C = precision_recall_fscore_support(
        targets_N, predicted_N, labels=np.arange(num_classes), zero_division=0.0
    )
    confidence_N = score_NC[np.arange(num_images), predicted_N]
    reliability = calibration(confidence_N, values["accuracy@1"]) if calibrated else None
    if reliability is not None:
        figures["calibration_error"] = Figure(reliability.error, num_images)
    details = ClassificationDetails(
        classes=list(classes),
        uris=list(uris),
        targets_N=targets_N,
        predicted_N=predicted_N,
        confidence_N=confidence_N,
        confusion_CC=confusion_CC,
        precision_C=precision_C,
        recall_C=recall_C,
        f1_C=f1_C,
        support_C=support_C,
        reliability=reliability,
    )
    return Scored(figures, Outcomes(list(uris), units_N, values), details)


def averages(confusion_CC: Doubles) -> dict[str, float]:
    """Means over classes of a confusion matrix: scikit-learn's macro and weighted averages.

    Classes that neither occur nor are predicted do not count; what is undefined counts as 0.
    """
    right_C = np.diag(confusion_CC)
    support_C, predicted_C = confusion_CC.sum(axis=1), confusion_CC.sum(axis=0)
    precision_C = right_C / np.maximum(predicted_C, 1)
    recall_C = right_C / np.maximum(support_C, 1)
    f1_C = 2 * right_C / np.maximum(support_C + predicted_C, 1)
    present_C = support_C + predicted_C > 0
    weight_C = support_C / support_C.sum()
    found = {"mean_class_accuracy": float(recall_C[support_C > 0].mean())}
    for name, value_C in (("precision", precision_C), ("recall", recall_C), ("f1", f1_C)):
        found[f"macro_{name}"] = float(value_C[present_C].mean())
        found[f"weighted_{name}"] = float(value_C @ weight_C)
    return found


def calibration(confidence_N: Doubles, right_N: Doubles) -> Reliability:
    """Expected calibration error in 15 bins of equal width (Guo et al. 2017)."""
    bin_N = np.minimum((confidence_N * _BINS).astype(np.int64), _BINS - 1)
    count_B = np.bincount(bin_N, minlength=_BINS)
    with np.errstate(invalid="ignore"):
        confidence_B = np.bincount(bin_N, confidence_N, _BINS) / count_B
        accuracy_B = np.bincount(bin_N, right_N, _BINS) / count_B
    gap_B = np.nan_to_num(np.abs(confidence_B - accuracy_B))
    return Reliability(
        confidence_B, accuracy_B, count_B, float(gap_B @ count_B / len(confidence_N))
    )


def draw_units(units_N: Integers, *, resamples: int = RESAMPLES, seed: int = 0) -> Integers:
    """(R, U) how often each unit is drawn in each resample, with replacement."""
    num_units = int(units_N.max()) + 1
    random = np.random.default_rng(seed)
    return np.stack(
        [
            np.bincount(random.integers(num_units, size=num_units), minlength=num_units)
            for _ in range(resamples)
        ]
    )


def mean_interval(value_N: Doubles, units_N: Integers, counts_RU: Integers) -> tuple[float, float]:
    """95 % interval of a mean over images, whole units being drawn."""
    sum_U = np.bincount(units_N, value_N, counts_RU.shape[1])
    size_U = np.bincount(units_N, minlength=counts_RU.shape[1])
    return _bounds((counts_RU @ sum_U) / (counts_RU @ size_U))


def ratio_interval(
    value_N: Doubles, whole_N: Doubles, units_N: Integers, counts_RU: Integers
) -> tuple[float, float]:
    """95 % interval of a sum as a share of another; 0 where the other is 0."""
    sum_R = counts_RU @ np.bincount(units_N, value_N, counts_RU.shape[1])
    whole_R = counts_RU @ np.bincount(units_N, whole_N, counts_RU.shape[1])
    return _bounds(np.where(whole_R != 0, sum_R / np.where(whole_R != 0, whole_R, 1), 0.0))


def _resampled_averages(
    targets_N: Integers,
    predicted_N: Integers,
    num_classes: int,
    units_N: Integers,
    counts_RU: Integers,
) -> dict[str, Doubles]:
    cell_N = targets_N * num_classes + predicted_N
    found: dict[str, list[float]] = {}
    for counts_U in counts_RU:
        cells = np.bincount(cell_N, counts_U[units_N], num_classes**2).astype(np.float64)
        for name, value in averages(cells.reshape(num_classes, num_classes)).items():
            found.setdefault(name, []).append(value)
    return {name: np.array(values) for name, values in found.items()}


def _bounds(value_R: Doubles) -> tuple[float, float]:
    low, high = np.percentile(value_R, (2.5, 97.5))
    return float(low), float(high)
