"""What every task of an evaluation returns: figures, and the outcomes that they are means of.

    vectors --task--> Result --> table, JSON
                        |------> report (details: confusion matrix, curves, worst mistakes)
                        '------> comparison (outcomes of each sample, paired by key)

Legend of shapes: N samples, C classes, B bins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Figure:
    """One measured value.

    Attributes:
        value: what was measured.
        samples: number of images or queries that it was measured on.
        interval: bounds of the 95 % bootstrap interval; None where none was computed.
        chance: the value that a random order, or a random class, would have; None where it has
            no such level.
    """

    value: float
    samples: int
    interval: tuple[float, float] | None = None
    chance: float | None = None


@dataclass(frozen=True)
class Outcomes:
    """How each sample of a task came out: what intervals and paired comparisons are made from.

    Attributes:
        keys: N names of the samples (uri of an image, or uri and text of a query), by which two
            models' outcomes are paired.
        units_N: (N,) number of the unit that each sample belongs to. Samples of one unit (captions
            of one image) are not independent, and are drawn together by the bootstrap.
        values: figure name -> (N,) outcome of each sample; the figure is their mean.
    """

    keys: list[str]
    units_N: Integers
    values: dict[str, Doubles]


@dataclass(frozen=True)
class Reliability:
    """Calibration in B bins of equal width of the predicted class's probability (Guo et al. 2017).

    Attributes:
        confidence_B, accuracy_B: means in each bin; NaN where it is empty.
        count_B: samples in each bin.
        error: expected calibration error: mean |accuracy - confidence|, weighted by count.
    """

    confidence_B: Doubles
    accuracy_B: Doubles
    count_B: Integers
    error: float


@dataclass(frozen=True)
class ClassificationDetails:
    """What a report shows of a classification.

    Attributes:
        classes: C names, as people read them.
        uris: N images.
        targets_N, predicted_N: (N,) positions in ``classes``.
        confidence_N: (N,) probability (or vote share) of the predicted class.
        confusion_CC: (C, C) counts, rows are the true classes.
        precision_C, recall_C, f1_C: (C,), 0 where undefined.
        support_C: (C,) images of each class.
        reliability: None where the classifier gives no probabilities.
    """

    classes: list[str]
    uris: list[str]
    targets_N: Integers
    predicted_N: Integers
    confidence_N: Doubles
    confusion_CC: Integers
    precision_C: Doubles
    recall_C: Doubles
    f1_C: Doubles
    support_C: Integers
    reliability: Reliability | None = None


@dataclass(frozen=True)
class Miss:
    """A query whose first correct candidate stands far down.

    Attributes:
        query: text, or uri of an image.
        expected: the best-ranked correct candidate, likewise.
        found: what stood first instead.
        rank: of the expected candidate; 1 is best.
    """

    query: str
    expected: str
    found: str
    rank: int


@dataclass(frozen=True)
class RetrievalDetails:
    """What a report shows of a retrieval.

    Attributes:
        curves: direction (``text_to_image``, ``image_to_text``) -> {k: recall@k}, for a plot.
        chance_curves: likewise, of a random order.
        misses: direction -> the worst queries, worst first.
    """

    curves: dict[str, dict[int, float]]
    chance_curves: dict[str, dict[int, float]]
    misses: dict[str, list[Miss]]


@dataclass(frozen=True)
class CurveDetails:
    """What a report shows of figures along an axis: severities, shots, shares of wrong labels.

    Attributes:
        axis: what the axis is called ("severity").
        figure: name of the figure on the other axis ("accuracy@1").
        lines: name of the line ("jpeg") -> [(position, figure)], ascending; position 0 is clean.
    """

    axis: str
    figure: str
    lines: dict[str, list[tuple[float, Figure]]]


@dataclass(frozen=True)
class Result:
    """What one task measured of one model on one data set.

    Attributes:
        task: ``zeroshot``, ``retrieval``, ``probe``, ``robustness`` or ``neighbours``.
        model: what people call the model.
        data: as it was named.
        protocol: how it was measured, in one sentence: what a hit is, how ties count.
        encoder: what made the vectors: fingerprint, precision, device, how images were decoded.
        variant: which of several forms of the task: ``logistic``, ``mlp, few shots``; may be empty.
        figures: name (``accuracy@1``, ``text_to_image/recall@10``) -> figure.
        counts: numbers that are no measurements: ``classes``, ``images``, ``candidates``, ``C``.
        outcomes: prefix of the figures (``text_to_image``; ``""`` for a classification) -> the
            outcomes of each sample.
        details: what a report shows besides.
    """

    task: str
    model: str
    data: str
    protocol: str
    figures: Mapping[str, Figure]
    counts: Mapping[str, float] = field(default_factory=dict)
    outcomes: Mapping[str, Outcomes] = field(default_factory=dict, repr=False)
    details: ClassificationDetails | RetrievalDetails | CurveDetails | None = field(
        default=None, repr=False
    )
    variant: str = ""
    encoder: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The task with its variant."""
        return f"{self.task} ({self.variant})" if self.variant else self.task

    def metrics(self) -> dict[str, float]:
        """All values by name, flat: of figures, their chance levels (``chance_X``), and counts."""
        flat: dict[str, float] = {}
        for name, figure in self.figures.items():
            flat[name] = figure.value
            if figure.chance is not None:
                flat[chance_name(name)] = figure.chance
        return flat | dict(self.counts)

    def document(self) -> dict[str, Any]:
        """The result as ``clipsys evaluate --json`` prints it; null: undefined, or without end."""
        return {
            "task": self.task,
            **({"variant": self.variant} if self.variant else {}),
            "model": self.model,
            "data": self.data,
            "protocol": self.protocol,
            **({"encoder": dict(self.encoder)} if self.encoder else {}),
            "metrics": {name: finite(value) for name, value in self.metrics().items()},
            "intervals": {
                name: [finite(bound) for bound in figure.interval]
                for name, figure in self.figures.items()
                if figure.interval is not None
            },
            "samples": {name: figure.samples for name, figure in self.figures.items()},
        }


def finite(value: float) -> float | None:
    """A value for JSON, which has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def chance_name(name: str) -> str:
    """The name of a figure's chance level: ``a/recall@1`` -> ``a/chance_recall@1``."""
    prefix, slash, last = name.rpartition("/")
    return f"{prefix}{slash}chance_{last}"
