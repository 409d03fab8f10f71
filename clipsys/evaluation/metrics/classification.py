"""What a classification is worth: accuracy, precision, recall, F1 and calibration.

Legend of shapes: N images, C classes, B bins, U units, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from clipsys.evaluation import resampling
from clipsys.evaluation.results import (
    ClassificationDetails,
    Figure,
    Outcomes,
    Reliability,
)

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

#: Bins of the calibration error (Guo et al. 2017, "On Calibration of Modern Neural Networks").
NUM_BINS = 15


@dataclass(frozen=True)
class Predictions:
    """What a classifier said of N images.

    Attributes:
        classes: C names, as people read them.
        targets_N: (N,) right class of each image.
        predicted_N: (N,) class that was predicted.
        ranks_N: (N,) rank (0 is best) of the right class; classes that tie with it count as better.
        confidence_N: (N,) probability of the predicted class; None where there is none.
    """

    classes: Sequence[str]
    targets_N: Integers
    predicted_N: Integers
    ranks_N: Integers
    confidence_N: Doubles | None = None


def predictions(
    scores_NC: Floats | Doubles,
    targets_N: npt.ArrayLike,
    classes: Sequence[str],
    *,
    confidence_N: Doubles | None = None,
) -> Predictions:
    """What the scores of classes say.

    Where a wrong class ties with the right one, the wrong one is what was predicted.

    Args:
        scores_NC: the higher the likelier.
        targets_N: right class of each image.
        classes: names.
        confidence_N: probability of the predicted class.
    """
    targets = np.asarray(targets_N, np.int64)
    right_N = scores_NC[np.arange(len(targets)), targets]
    ranks = (scores_NC >= right_N[:, None]).sum(axis=1) - 1
    others = np.array(scores_NC)
    others[np.arange(len(targets)), targets] = -np.inf
    predicted = np.where(ranks == 0, targets, others.argmax(axis=1))
    return Predictions(classes, targets, predicted, ranks, confidence_N)


def flat_figures(found: Predictions) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and calibration error by name, without intervals."""
    figures = {f"accuracy@{k}": float((found.ranks_N < k).mean()) for k in _ks(found)}
    return figures | figures_over_classes(found)


def figures_over_classes(
    found: Predictions, weights_N: npt.NDArray[np.integer[Any]] | None = None
) -> dict[str, float]:
    """The figures that are no means of single outcomes: over classes, and calibration.

    Args:
        found: predictions.
        weights_N: how often each image counts; None: once.
    """
    return _by_class(_Counts.of(found, weights_N)) | _calibration(found, weights_N)


def figures_of(
    found: Predictions, uris: Sequence[str], units_N: Integers | None = None, *, seed: int = 0
) -> tuple[dict[str, Figure], Outcomes, ClassificationDetails]:
    """The figures with intervals, the outcomes of each image, and what a report shows.

    Args:
        found: at least one image.
        uris: of the images.
        units_N: equal for images that are not independent; None: all are.
        seed: of the bootstrap.
    """
    units = np.arange(len(uris)) if units_N is None else units_N
    outcomes = Outcomes(
        list(uris),
        units,
        {f"accuracy@{k}": (found.ranks_N < k).astype(np.float64) for k in _ks(found)},
    )
    values = flat_figures(found)
    intervals = resampling.mean_intervals(outcomes.values, units, seed=seed)
    intervals |= resampling.statistic_intervals(
        lambda weights_U: figures_over_classes(found, weights_U[units]),
        int(units.max()) + 1,
        seed=seed,
    )
    chance = _chance(found)
    figures = {
        name: Figure(value, len(uris), intervals.get(name), chance.get(name))
        for name, value in values.items()
    }
    return figures, outcomes, _details(found, uris)


def reliability(
    confidence_N: Doubles, right_N: npt.ArrayLike, weights_N: npt.ArrayLike | None = None
) -> Reliability:
    """Confidence against accuracy, in bins of equal width."""
    right = np.asarray(right_N, np.float64)
    weights = np.ones(len(right)) if weights_N is None else np.asarray(weights_N, np.float64)
    bins = np.clip(np.ceil(confidence_N * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    count_B = np.bincount(bins, weights=weights, minlength=NUM_BINS)
    with np.errstate(invalid="ignore"):
        sums = np.bincount(bins, weights=weights * confidence_N, minlength=NUM_BINS)
        confidence_B = sums / count_B
        accuracy_B = np.bincount(bins, weights=weights * right, minlength=NUM_BINS) / count_B
    gaps = np.nan_to_num(np.abs(accuracy_B - confidence_B))
    error = float((gaps * count_B).sum() / max(count_B.sum(), 1))
    return Reliability(confidence_B, accuracy_B, count_B.astype(np.int64), error)


def _ks(found: Predictions) -> tuple[int, ...]:
    return (1, 5) if len(found.classes) > 5 else (1,)


def _chance(found: Predictions) -> dict[str, float]:
    num_classes = len(found.classes)
    levels = {f"accuracy@{k}": k / num_classes for k in _ks(found)}
    return levels | {"mean_class_accuracy": 1 / num_classes}


class _Counts(NamedTuple):
    """(C,) images of each class: rightly predicted, predicted, and there."""

    right_C: Doubles
    predicted_C: Doubles
    support_C: Doubles

    @staticmethod
    def of(found: Predictions, weights_N: npt.NDArray[np.integer[Any]] | None = None) -> _Counts:
        size = len(found.classes)
        right = found.ranks_N == 0
        right_weights = right.astype(np.float64) if weights_N is None else right * weights_N
        return _Counts(
            np.bincount(found.targets_N, right_weights, size).astype(np.float64),
            np.bincount(found.predicted_N, weights=weights_N, minlength=size).astype(np.float64),
            np.bincount(found.targets_N, weights=weights_N, minlength=size).astype(np.float64),
        )

    def ratios(self) -> tuple[Doubles, Doubles, Doubles]:
        """Precision, recall and F1 of each class as scikit-learn defines them, 0 if undefined.

        scikit-learn takes labels, of which the bootstrap would need a thousand copies; from counts
        it is three divisions. A test compares the two.
        """
        return (
            self.right_C / np.maximum(self.predicted_C, 1),
            self.right_C / np.maximum(self.support_C, 1),
            2 * self.right_C / np.maximum(self.predicted_C + self.support_C, 1),
        )


def _by_class(counts: _Counts) -> dict[str, float]:
    """Means over the classes that have images; a class that is never predicted has precision 0."""
    present = counts.support_C > 0
    if not present.any():
        return {}
    shares_C = counts.support_C / counts.support_C.sum()
    figures = {"mean_class_accuracy": 0.0}
    ratios = dict(zip(("precision", "recall", "f1"), counts.ratios(), strict=True))
    figures |= {f"macro_{name}": float(one[present].mean()) for name, one in ratios.items()}
    figures |= {f"weighted_{name}": float((one * shares_C).sum()) for name, one in ratios.items()}
    figures["mean_class_accuracy"] = figures["macro_recall"]
    return figures


def _calibration(
    found: Predictions, weights_N: npt.NDArray[np.integer[Any]] | None
) -> dict[str, float]:
    if found.confidence_N is None:
        return {}
    right = found.ranks_N == 0
    return {"calibration_error": reliability(found.confidence_N, right, weights_N).error}


def _details(found: Predictions, uris: Sequence[str]) -> ClassificationDetails:
    size = len(found.classes)
    cells = found.targets_N * size + found.predicted_N
    counts = _Counts.of(found)
    precision_C, recall_C, f1_C = counts.ratios()
    confidence = found.confidence_N
    return ClassificationDetails(
        classes=list(found.classes),
        uris=list(uris),
        targets_N=found.targets_N,
        predicted_N=found.predicted_N,
        confidence_N=np.full(len(uris), np.nan) if confidence is None else confidence,
        confusion_CC=np.bincount(cells, minlength=size**2).reshape(size, size),
        precision_C=precision_C,
        recall_C=recall_C,
        f1_C=f1_C,
        support_C=counts.support_C.astype(np.int64),
        reliability=None if confidence is None else reliability(confidence, found.ranks_N == 0),
    )
