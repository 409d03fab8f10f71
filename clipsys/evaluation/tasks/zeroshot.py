"""Zero-shot classification: the nearest class vector is the class."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from clipsys.errors import DataError
from clipsys.evaluation.metrics.classification import (
    Predictions,
    figures_of,
    flat_figures,
    predictions,
)
from clipsys.evaluation.metrics.distinct import distinct_rows
from clipsys.evaluation.results import Result

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
#: (N, C) cosine similarities -> (N, C) probabilities.
Probabilities = Callable[[Floats], Doubles]

#: Scores of images by classes that are held at once.
_BLOCK_SCORES = 16_000_000

_logger = logging.getLogger(__name__)

PROTOCOL = (
    "the class with the nearest text vector is predicted; a class that ties with the right one "
    "counts as better"
)


def zeroshot_result(
    image_ND: Floats,
    class_CD: Floats,
    classes: Sequence[str],
    labels: Sequence[str],
    *,
    uris: Sequence[str],
    names: Sequence[str] | None = None,
    units_N: npt.NDArray[np.int64] | None = None,
    probabilities: Probabilities | None = None,
    model: str,
    data: str,
    prompts: str = "",
) -> Result:
    """Classifies images by the names of their classes, with intervals and details.

    Args:
        image_ND: (N, D) unit norm.
        class_CD: (C, D) unit norm, one vector a class.
        classes: C labels.
        labels: right label of each image.
        uris: of the images.
        names: C names that people read; None: the labels.
        units_N: equal for images that are not independent; None: all are.
        probabilities: makes probabilities of similarities; None: no calibration is measured.
        model: name of the model.
        data: name of the data set.
        prompts: what class vectors were made from, for the protocol.

    Raises:
        DataError: a label is not among the classes.
    """
    found = _classify(image_ND, class_CD, classes, labels, probabilities, names)
    empty = [classes[place] for place in sorted({*range(len(classes))} - {*found.targets_N})]
    if empty:
        shown = ", ".join(empty[:5]) + (", …" if len(empty) > 5 else "")
        _logger.warning(
            "%s: %d of %d classes have no image (%s); means over classes leave them out",
            *(data, len(empty), len(classes), shown),
        )
    figures, outcomes, details = figures_of(found, uris, units_N)
    return Result(
        task="zeroshot",
        model=model,
        data=data,
        protocol=PROTOCOL + (f"; prompts: {prompts}" if prompts else ""),
        figures=figures,
        counts={"classes": len(classes), "images": len(labels)},
        outcomes={"": outcomes},
        details=details,
    )


def zeroshot_figures(
    image_ND: Floats,
    class_CD: Floats,
    classes: Sequence[str],
    labels: Sequence[str],
    probabilities: Probabilities | None = None,
) -> dict[str, float]:
    """The values of `zeroshot_result` by name, without intervals.

    Raises:
        DataError: a label is not among the classes.
    """
    found = _classify(image_ND, class_CD, classes, labels, probabilities)
    return flat_figures(found) | {
        "chance_accuracy@1": 1 / len(classes),
        "classes": len(classes),
        "images": len(labels),
    }


def _classify(
    image_ND: Floats,
    class_CD: Floats,
    classes: Sequence[str],
    labels: Sequence[str],
    probabilities: Probabilities | None,
    names: Sequence[str] | None = None,
) -> Predictions:
    index = {name: number for number, name in enumerate(classes)}
    unknown = sorted(set(labels) - set(index))
    if unknown:
        shown = ", ".join(list(classes)[:8]) + (", …" if len(classes) > 8 else "")
        raise DataError(
            f"label {unknown[0]!r} is not among the classes ({shown}); name its class, or leave "
            "its images out"
        )
    targets_N = np.array([index[label] for label in labels], np.int64)
    # Two classes of one name have one vector, and have to tie to the last bit.
    distinct = distinct_rows(class_CD)
    step = max(1, _BLOCK_SCORES // max(len(classes), 1))
    parts = []
    for start in range(0, max(len(targets_N), 1), step):
        rows = slice(start, start + step)
        scores_NC = (image_ND[rows] @ distinct.rows_UD.T)[:, distinct.number_N]
        part = predictions(scores_NC, targets_N[rows], names or classes)
        if probabilities is not None:
            chosen = probabilities(scores_NC)[np.arange(len(scores_NC)), part.predicted_N]
            part = replace(part, confidence_N=np.asarray(chosen, np.float64))
        parts.append(part)
    confidences = [part.confidence_N for part in parts if part.confidence_N is not None]
    return Predictions(
        names or classes,
        targets_N,
        np.concatenate([part.predicted_N for part in parts]),
        np.concatenate([part.ranks_N for part in parts]),
        np.concatenate(confidences) if confidences else None,
    )
