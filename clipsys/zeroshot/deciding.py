"""From image vectors to labels: probabilities, several labels, none.

N images, C classes, K background texts, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
#: Of float32 or float64.
Values = npt.NDArray[Any]

#: The label of what is none of the classes.
UNKNOWN = "unknown"
#: What a class is compared with where each is decided on by itself and the model, trained with a
#: softmax, has no probability of one text alone.
DEFAULT_BACKGROUND = ("a photo.",)


@dataclass(frozen=True)
class Choice:
    """How probabilities become labels.

    Attributes:
        multi_label: each class is decided on by itself: an image has any number of labels.
        threshold: probability from which an image is of a class then.
        unknown_below: best probability below which the label is `UNKNOWN`; None: never. For images
            that the classes cover, where the model is not sure.
        background: texts of what is none of the classes ("a landscape"); where one of them is
            nearer than every class the label is `UNKNOWN`. For images that are something else.
    """

    multi_label: bool = False
    threshold: float = 0.5
    unknown_below: float | None = None
    background: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decisions:
    """What some images are.

    Attributes:
        labels: N; the best class, or `UNKNOWN`.
        probability_N: of that class; of the background where that is best.
        chosen: N lists of classes where each is decided on by itself; else None.
        scores_NC: cosine similarities.
        probability_NC: of each class.
    """

    labels: list[str]
    probability_N: Values
    chosen: list[list[str]] | None
    scores_NC: Floats
    probability_NC: Values


@dataclass(frozen=True)
class Temperature:
    """How similarities become probabilities.

    Attributes:
        scale: what similarities are multiplied with, the inverse of a temperature.
        bias: what is added before a sigmoid; None: a softmax is taken.
    """

    scale: float
    bias: float | None


def decide(
    scores_NC: Floats,
    background_NK: Floats | None,
    classes: Sequence[str],
    temperature: Temperature,
    choice: Choice,
    *,
    dtype: npt.DTypeLike = np.float64,
) -> Decisions:
    """The classes of images by their similarities.

    A softmax model's probabilities are over the classes (and the background, if any); with
    ``choice.multi_label`` that of each class is against the background alone, a softmax of two. A
    sigmoid model decides on each class by itself.

    Args:
        scores_NC: cosine similarities to the classes.
        background_NK: likewise to the background's texts.
        classes: C names.
        temperature: the model's own, or a calibrated one.
        choice: how labels are chosen.
        dtype: in which probabilities are computed; float32 is enough to choose among them.
    """
    probability_NC, nothing_N = probabilities(
        scores_NC, background_NK, temperature, multi_label=choice.multi_label, dtype=dtype
    )
    rows = np.arange(len(scores_NC))
    best_N = scores_NC.argmax(axis=1)
    probability_N = probability_NC[rows, best_N]
    unknown_N = nothing_N > probability_N
    if choice.multi_label:
        unknown_N |= probability_N < choice.threshold
    if choice.unknown_below is not None:
        unknown_N |= probability_N < choice.unknown_below
    names = np.array([*classes, UNKNOWN], object)
    chosen = None
    if choice.multi_label:
        chosen = _chosen(probability_NC, unknown_N, classes, choice.threshold)
    return Decisions(
        names[np.where(unknown_N, len(classes), best_N)].tolist(),
        np.maximum(probability_N, nothing_N),
        chosen,
        scores_NC,
        probability_NC,
    )


def probabilities(
    scores_NC: Floats,
    background_NK: Floats | None,
    temperature: Temperature,
    *,
    multi_label: bool = False,
    dtype: npt.DTypeLike = np.float64,
) -> tuple[Values, Values]:
    """Probabilities of the classes (N, C), and of the background (N,), 0 where there is none."""
    logits_NC = scores_NC.astype(dtype) * temperature.scale + (temperature.bias or 0.0)
    against_N = np.full(len(scores_NC), -np.inf, dtype)
    if background_NK is not None:
        nearest_N = background_NK.max(axis=1).astype(dtype)
        against_N = nearest_N * temperature.scale + (temperature.bias or 0.0)
    if temperature.bias is not None:
        return _sigmoid(logits_NC), _sigmoid(against_N)
    if multi_label:
        return _sigmoid(logits_NC - against_N[:, None]), np.zeros_like(against_N)
    highest_N = np.maximum(logits_NC.max(axis=1, initial=-np.inf), against_N)
    probability_NC = np.exp(np.subtract(logits_NC, highest_N[:, None], out=logits_NC))
    nothing_N = np.exp(against_N - highest_N)
    total_N = probability_NC.sum(axis=1) + nothing_N
    probability_NC /= total_N[:, None]
    return probability_NC, nothing_N / total_N


def _chosen(
    probability_NC: Values,
    unknown_N: npt.NDArray[np.bool_],
    classes: Sequence[str],
    threshold: float,
) -> list[list[str]]:
    return [
        []
        if unknown
        else [
            classes[place]
            for place in np.argsort(-row_C, kind="stable")
            if row_C[place] >= threshold
        ]
        for row_C, unknown in zip(probability_NC, unknown_N, strict=True)
    ]


def _sigmoid(values: Values) -> Values:
    result: Values = 1 / (1 + np.exp(-np.clip(values, -80, 80)))
    return result
