"""Two models on one task: paired differences, and the samples that changed.

Both are measured on the same samples, so what both get right or wrong says nothing about their
difference: intervals and tests are made from the differences of each sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from clipsys.errors import DataError
from clipsys.evaluation import resampling
from clipsys.evaluation.class_comparison import (
    Difference,
    differences_over_classes,
    measured_differently,
)
from clipsys.evaluation.results import ClassificationDetails, Outcomes, Result

__all__ = ["Change", "Comparison", "Difference", "compare"]

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Change:
    """A sample that came out differently.

    Attributes:
        figure: by which the outcomes are counted.
        key: name of the sample.
        first, second: outcome with each model.
        expected: the right class; empty where the task is no classification.
        first_label, second_label: what each model predicted, likewise.
    """

    figure: str
    key: str
    first: float
    second: float
    expected: str = ""
    first_label: str = ""
    second_label: str = ""


@dataclass(frozen=True)
class Comparison:
    """Two models on one task and data set.

    Attributes:
        task: what was measured.
        first, second: names of the models.
        data: name of the data set.
        protocol: how it was measured.
        differences: by the figure's name.
        changes: samples whose first outcome of each group changed, the largest changes first.
    """

    task: str
    first: str
    second: str
    data: str
    protocol: str
    differences: Mapping[str, Difference]
    changes: list[Change] = field(repr=False)

    def document(self) -> dict[str, Any]:
        """The comparison as ``clipsys evaluate --task compare --json`` prints it."""
        return {
            "task": "compare",
            "of": self.task,
            "models": [self.first, self.second],
            "data": self.data,
            "protocol": self.protocol,
            "metrics": {
                name: {
                    "first": one.first,
                    "second": one.second,
                    "difference": one.value,
                    "interval": None if one.interval is None else list(one.interval),
                    "p_value": one.test.p_value,
                    "test": one.test.name,
                    "only_first": one.only_first,
                    "only_second": one.only_second,
                    "samples": one.samples,
                }
                for name, one in self.differences.items()
            },
            "changes": [
                {name: value for name, value in vars(change).items() if value != ""}
                for change in self.changes
            ],
        }


def compare(first: Result, second: Result) -> Comparison:
    """Compares what one task measured of two models on the same samples.

    Models may have vectors of different widths: outcomes are compared, not vectors.

    Args:
        first: results of the model that the other one is compared with.
        second: of the other one.

    Raises:
        DataError: the tasks, the protocols, the classes, the samples or their right classes
            differ, or the task has no outcomes of single samples.
    """
    for what in ("task", "protocol"):
        ours, theirs = getattr(first, what), getattr(second, what)
        if ours != theirs:
            raise measured_differently(first, second, what, ours, theirs)
    if not first.outcomes:
        raise DataError(
            f"{first.task} has no outcomes of single samples to pair; compare models on zeroshot, "
            "retrieval or probe"
        )
    differences: dict[str, Difference] = {}
    changes: list[Change] = []
    for prefix, ours in first.outcomes.items():
        theirs = second.outcomes[prefix]
        order = _paired(ours, theirs, first, second)
        lead = f"{prefix}/" if prefix else ""
        for name, values_N in ours.values.items():
            differences[f"{lead}{name}"] = _difference(
                values_N, theirs.values[name][order], ours.units_N
            )
        if isinstance(first.details, ClassificationDetails):
            differences |= differences_over_classes(first, second, order, ours.units_N)
        leading = next(iter(ours.values))
        changes += _changes(f"{lead}{leading}", leading, ours, theirs, order, (first, second))
    return Comparison(
        first.task, first.model, second.model, first.data, first.protocol, differences, changes
    )


def _paired(
    ours: Outcomes, theirs: Outcomes, first: Result, second: Result
) -> npt.NDArray[np.int64]:
    """The positions among ``theirs`` of each sample of ``ours``."""
    if ours.keys == theirs.keys:
        return np.arange(len(ours.keys))
    # A key may occur twice (a caption that is written twice for one image): in order, then.
    places: dict[tuple[str, int], int] = {}
    for number, name in enumerate(_numbered_keys(theirs.keys)):
        places[name] = number
    names = _numbered_keys(ours.keys)
    missing = [key for key, number in names if (key, number) not in places]
    extra = places.keys() - set(names)
    if missing or extra:
        example = missing[0] if missing else min(extra)[0]
        raise DataError(
            f"{first.model} has {len(ours.keys):,} samples, and {second.model} lacks "
            f"{len(missing):,} of them and has {len(extra):,} others ({example!r} for example); "
            "both have to be measured on the same ones"
        )
    return np.array([places[name] for name in names])


def _numbered_keys(keys: list[str]) -> list[tuple[str, int]]:
    """Keys with the number of earlier equal ones."""
    seen: Counter[str] = Counter()
    numbered = []
    for key in keys:
        numbered.append((key, seen[key]))
        seen[key] += 1
    return numbered


def _difference(first_N: Doubles, second_N: Doubles, units_N: npt.NDArray[np.int64]) -> Difference:
    hits = bool(np.isin(np.concatenate([first_N, second_N]), (0.0, 1.0)).all())
    return Difference(
        float(first_N.mean()),
        float(second_N.mean()),
        resampling.paired_interval(first_N, second_N, units_N),
        resampling.paired_test(first_N, second_N, units_N),
        int(((first_N == 1) & (second_N == 0)).sum()) if hits else 0,
        int(((first_N == 0) & (second_N == 1)).sum()) if hits else 0,
        len(first_N),
    )


def _changes(
    figure: str,
    name: str,
    ours: Outcomes,
    theirs: Outcomes,
    order: npt.NDArray[np.int64],
    results: tuple[Result, Result],
) -> list[Change]:
    before, after = ours.values[name], theirs.values[name][order]
    changed = np.flatnonzero(before != after)
    changed = changed[np.argsort(-np.abs(after - before)[changed], kind="stable")]
    details = [result.details for result in results]
    changes = []
    for number in changed.tolist():
        labels = {}
        one, other = details
        if isinstance(one, ClassificationDetails) and isinstance(other, ClassificationDetails):
            labels = {
                "expected": one.classes[one.targets_N[number]],
                "first_label": one.classes[one.predicted_N[number]],
                "second_label": other.classes[other.predicted_N[order[number]]],
            }
        changes.append(
            Change(figure, ours.keys[number], float(before[number]), float(after[number]), **labels)
        )
    return changes
