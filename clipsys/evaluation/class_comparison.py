"""Two models on one classification: paired differences of the figures over classes.

Precision, recall and F1 over classes and the calibration error are no means of single outcomes:
their intervals and tests compute the figures of both models again, for each resample of the images
and for each exchange of predictions between the models.

Legend of shapes: N samples, U units.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from clipsys.errors import DataError
from clipsys.evaluation import resampling
from clipsys.evaluation.metrics.classification import Predictions, figures_over_classes
from clipsys.evaluation.resampling import PairedTest
from clipsys.evaluation.results import ClassificationDetails, Result

Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
#: (N,) samples whose predictions two models exchange; None: none.
Swapped: TypeAlias = npt.NDArray[np.bool_] | None


@dataclass(frozen=True)
class Difference:
    """A figure of two models.

    Attributes:
        first, second: value of each model.
        interval: 95 % bootstrap interval of second - first, on the same resamples.
        test: whether they differ by more than chance.
        only_first, only_second: samples that one alone got right; 0 where outcomes are no hits.
        samples: N.
    """

    first: float
    second: float
    interval: tuple[float, float] | None
    test: PairedTest
    only_first: int
    only_second: int
    samples: int

    @property
    def value(self) -> float:
        """By how much the second one is higher."""
        return self.second - self.first


def measured_differently(
    first: Result, second: Result, what: str, ours: object, theirs: object
) -> DataError:
    """The error of two results that cannot be compared."""
    return DataError(
        f"{first.model} and {second.model} were measured differently: {what} {ours!r} and "
        f"{theirs!r}; measure both in the same way"
    )


def differences_over_classes(
    first: Result, second: Result, order: Integers, units_N: Integers
) -> dict[str, Difference]:
    """Differences by figure; none where a result has no details of a classification.

    Args:
        first: of one model.
        second: of the other one.
        order: (N,) position among the second one's samples of each of the first one's.
        units_N: unit of each sample.

    Raises:
        DataError: the classes differ, or the right class of a sample.
    """
    ours, theirs = first.details, second.details
    if not isinstance(ours, ClassificationDetails) or not isinstance(theirs, ClassificationDetails):
        return {}
    if ours.classes != theirs.classes:
        number = next(
            number
            for number, (one, other) in enumerate(zip_longest(ours.classes, theirs.classes))
            if one != other
        )
        one, other = ((*each.classes, None) for each in (ours, theirs))
        raise measured_differently(first, second, f"class {number + 1}", one[number], other[number])
    wrong = np.flatnonzero(ours.targets_N != theirs.targets_N[order])
    if len(wrong):
        what = f"right class of {ours.uris[wrong[0]]}"
        expected = ours.classes[ours.targets_N[wrong[0]]]
        other_class = theirs.classes[theirs.targets_N[order[wrong[0]]]]
        raise measured_differently(first, second, what, expected, other_class)
    pair = _predictions(ours), _predictions(theirs, order)
    values = [figures_over_classes(one) for one in pair]
    names = [name for name in values[0] if name in values[1]]

    def differences(weights_N: npt.NDArray[np.int32] | None, swapped: Swapped) -> dict[str, float]:
        one, other = (figures_over_classes(found, weights_N) for found in _swap(pair, swapped))
        return {name: other[name] - one[name] for name in names}

    num_units = int(units_N.max()) + 1
    intervals = resampling.statistic_intervals(
        lambda weights_U: differences(weights_U[units_N], None), num_units
    )
    tests = resampling.permutations(
        lambda swapped_U: differences(None, None if swapped_U is None else swapped_U[units_N]),
        num_units,
    )
    return {
        name: Difference(
            values[0][name], values[1][name], intervals[name], tests[name], 0, 0, len(units_N)
        )
        for name in names
    }


def _predictions(details: ClassificationDetails, order: Integers | None = None) -> Predictions:
    rows = np.arange(len(details.targets_N)) if order is None else order
    targets_N, predicted_N = details.targets_N[rows], details.predicted_N[rows]
    confidence_N = None if details.reliability is None else details.confidence_N[rows]
    wrong_N = (targets_N != predicted_N).astype(np.int64)
    return Predictions(details.classes, targets_N, predicted_N, wrong_N, confidence_N)


def _swap(pair: tuple[Predictions, Predictions], swapped: Swapped) -> tuple[Predictions, ...]:
    """The same with some samples' predictions exchanged between the two models."""
    if swapped is None:
        return pair
    one, other = pair
    confidences: list[Doubles | None] = [None, None]
    if one.confidence_N is not None and other.confidence_N is not None:
        confidences = [
            np.where(swapped, other.confidence_N, one.confidence_N),
            np.where(swapped, one.confidence_N, other.confidence_N),
        ]
    return (
        replace(
            one,
            predicted_N=np.where(swapped, other.predicted_N, one.predicted_N),
            ranks_N=np.where(swapped, other.ranks_N, one.ranks_N),
            confidence_N=confidences[0],
        ),
        replace(
            other,
            predicted_N=np.where(swapped, one.predicted_N, other.predicted_N),
            ranks_N=np.where(swapped, one.ranks_N, other.ranks_N),
            confidence_N=confidences[1],
        ),
    )
