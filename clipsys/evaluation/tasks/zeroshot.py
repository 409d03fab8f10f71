"""Zero-shot classification: the nearest class vector is the class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from clipsys.errors import DataError
from clipsys.evaluation.metrics.classification import accuracy

Floats = npt.NDArray[np.float32]


def zeroshot_figures(
    image_ND: Floats, class_CD: Floats, classes: Sequence[str], labels: Sequence[str]
) -> dict[str, float]:
    """Accuracy of the nearest class vector.

    Raises:
        DataError: a label is not among the classes.
    """
    index = {name: number for number, name in enumerate(classes)}
    unknown = sorted(set(labels) - set(index))
    if unknown:
        raise DataError(
            f"label {unknown[0]!r} is not among the classes ({', '.join(list(classes)[:8])}, …)"
        )
    targets = np.array([index[label] for label in labels])
    return accuracy(image_ND @ class_CD.T, targets) | {
        "chance_accuracy@1": 1 / len(classes),
        "classes": len(classes),
        "images": len(labels),
    }
