"""Figures of a probe from the class scores of every image.

Legend of shapes: N images, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from clipsys.evaluation.metrics.classification import figures_of, predictions
from clipsys.evaluation.results import (
    ClassificationDetails,
    Doubles,
    Figure,
    Integers,
    Outcomes,
)


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
    """Figures with intervals, as `clipsys.evaluation.metrics.classification` defines them.

    Args:
        score_NC: (N, C) probabilities, or shares of votes.
        units_N: images of one unit show the same thing and are drawn together by the bootstrap.
        chance: accuracy of the best answer that ignores the image.
        calibrated: whether the scores are meant as probabilities, and get a calibration error.
    """
    found = predictions(score_NC, targets_N, classes, confidence_N=score_NC.max(axis=1))
    figures, outcomes, details = figures_of(found, uris, units_N)
    figures["accuracy@1"] = replace(figures["accuracy@1"], chance=chance)
    if not calibrated:
        del figures["calibration_error"]
        details = replace(details, reliability=None)
    return Scored(figures, outcomes, details)
