"""From image vectors to labels, many at once: what ``clipsys classify`` prints and writes.

N images, C classes, D embedding width.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from clipsys.errors import ConfigError, DataError
from clipsys.files.regular import read_named
from clipsys.printing import printable
from clipsys.zeroshot.classifier import check_prompts

if TYPE_CHECKING:
    from clipsys.models.encoder import Encoder

Floats: TypeAlias = npt.NDArray[np.float32]

#: The label of what is none of the classes.
UNKNOWN = "unknown"
#: What a class is compared with where each is decided on by itself and the model, trained with a
#: softmax, has no probability of one text alone.
DEFAULT_BACKGROUND = ("a photo.",)

#: A class with its synonyms, or with one text that is used as it stands.
Classes: TypeAlias = "dict[str, list[str] | str]"


def read_classes(labels: str, label: Sequence[str], file: Path | None) -> Classes:
    """The classes of the options, each once.

    Raises:
        ConfigError: none is given.
        DataError: the file cannot be read, or is not understood.
    """
    named = [name.strip() for name in (*labels.split(","), *label)]
    given = [(name, [name]) for name in named if name]
    pairs: list[tuple[str, list[str] | str]] = [*given, *_of_file(file)]
    classes: Classes = {}
    for name, texts in pairs:
        if name in classes:
            print(
                f"warning: class {printable(name)!r} is named twice; it counts once",
                file=sys.stderr,
            )
        classes.setdefault(name, texts)
    return classes


def _of_file(path: Path | None) -> list[tuple[str, list[str] | str]]:
    if path is None:
        return []
    try:
        text = read_named(path.expanduser()).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"{path}: the classes cannot be read ({reason})") from error
    if path.suffix.lower() != ".json":
        return [(line.strip(), [line.strip()]) for line in text.splitlines() if line.strip()]
    try:
        document = json.loads(text, object_pairs_hook=_Pairs)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: is not JSON ({error.msg})") from error
    members: list[tuple[Any, Any]] = [(document, 0)]
    if isinstance(document, _Pairs):
        members = document
    elif isinstance(document, list):
        members = [(name, [name]) for name in document]
    found: list[tuple[str, list[str] | str]] = []
    for name, texts in members:
        values = texts if isinstance(texts, list) else [texts]
        is_text = all(isinstance(one, str) and one.strip() for one in (name, *values))
        if not values or not is_text or isinstance(texts, _Pairs):
            raise DataError(
                f"{path}: class {name!r} is not understood; expected a list of names, or an object "
                'such as {"dog": ["dog", "puppy"], "cat": "a photo of a cat, a small animal"}'
            )
        found.append((name.strip(), texts))
    return found


class _Pairs(list[tuple[str, Any]]):
    """The members of a JSON object, those of the same name too."""


@dataclass(frozen=True)
class Choice:
    """How probabilities become labels.

    Attributes:
        multi_label: each class is decided on by itself.
        threshold: probability from which an image is of a class then.
        unknown_below: best probability below which the label is `UNKNOWN`; None: never.
        background: texts of what is none of the classes.
    """

    multi_label: bool = False
    threshold: float = 0.5
    unknown_below: float | None = None
    background: tuple[str, ...] = ()

    def check(self, classes: Classes, templates: Sequence[str]) -> None:
        """Refuses classes and templates that cannot be decided on.

        Raises:
            ConfigError: there are too few classes, or a template has no place for them.
        """
        if UNKNOWN in classes and (self.unknown_below is not None or self.background):
            raise ConfigError(
                f"a class is called {UNKNOWN!r}, as images of no class are; rename it"
            )
        # One class alone can be decided on: against a background, or by itself.
        is_enough = len(classes) == 1 and (self.multi_label or self.background)
        check_prompts([*classes, *([UNKNOWN] if is_enough else [])], templates)


@dataclass(frozen=True)
class Decisions:
    """What some images are.

    Attributes:
        labels: N; the best class, or `UNKNOWN`.
        probability_N: of that class; of the background where that is best.
        chosen: N lists of classes where each is decided on by itself; else None.
        scores_NC: cosines.
        probability_NC: of each class.
    """

    labels: list[str]
    probability_N: Floats
    chosen: list[list[str]] | None
    scores_NC: Floats
    probability_NC: Floats


class Decider:
    """Decides on images by their vectors, N at a time."""

    def __init__(
        self, encoder: Encoder, classes: Classes, templates: Sequence[str], choice: Choice
    ) -> None:
        self.classes = list(classes)
        prompts = [
            [texts]
            if isinstance(texts, str)
            else [template.replace("{}", text) for text in texts for template in templates]
            for texts in classes.values()
        ]
        self.class_CD = _mean_vectors(encoder, prompts)
        background = choice.background
        self._is_sigmoid = encoder.logit_bias is not None
        if choice.multi_label and not background and not self._is_sigmoid:
            background = DEFAULT_BACKGROUND
        self._background_KD = encoder.encode_text(list(background)) if background else None
        self._scale, self._bias = encoder.logit_scale, encoder.logit_bias or 0.0
        self._choice = choice

    def decide(self, image_ND: Floats) -> Decisions:
        """The classes of unit image vectors (N, D)."""
        scores_NC = image_ND @ self.class_CD.T
        logits_NC = np.float32(self._scale) * scores_NC + np.float32(self._bias)
        against_N = np.full(len(image_ND), -np.inf, np.float32)
        if self._background_KD is not None:
            cosines_NK = image_ND @ self._background_KD.T
            against_N = self._scale * cosines_NK.max(axis=1) + np.float32(self._bias)
        choice = self._choice
        best_N = logits_NC.argmax(axis=1)
        rows = np.arange(len(image_ND))
        if self._is_sigmoid:
            probability_NC = _sigmoid(logits_NC)
            nothing_N = _sigmoid(against_N)
        elif choice.multi_label:
            probability_NC = _sigmoid(logits_NC - against_N[:, None])
            nothing_N = np.zeros_like(against_N)
        else:
            highest_N = np.maximum(logits_NC[rows, best_N], against_N)
            probability_NC = np.exp(np.subtract(logits_NC, highest_N[:, None], out=logits_NC))
            nothing_N = np.exp(against_N - highest_N)
            total_N = probability_NC.sum(axis=1) + nothing_N
            probability_NC /= total_N[:, None]
            nothing_N /= total_N
        probability_N = probability_NC[rows, best_N]
        unknown_N = nothing_N > probability_N
        if choice.multi_label:
            unknown_N |= probability_N < choice.threshold
        if choice.unknown_below is not None:
            unknown_N |= probability_N < choice.unknown_below
        names = np.array([*self.classes, UNKNOWN], object)
        labels = names[np.where(unknown_N, len(self.classes), best_N)].tolist()
        return Decisions(
            labels,
            np.maximum(probability_N, nothing_N),
            self._chosen(probability_NC, unknown_N) if choice.multi_label else None,
            scores_NC,
            probability_NC,
        )

    def _chosen(self, probability_NC: Floats, unknown_N: npt.NDArray[np.bool_]) -> list[list[str]]:
        return [
            []
            if unknown
            else [
                self.classes[place]
                for place in np.argsort(-row_C, kind="stable")
                if row_C[place] >= self._choice.threshold
            ]
            for row_C, unknown in zip(probability_NC, unknown_N, strict=True)
        ]


def _mean_vectors(encoder: Encoder, prompts: Sequence[Sequence[str]]) -> Floats:
    """One unit vector (C, D) for each class: the mean of its texts' unit vectors, normalised."""
    text_ND = encoder.encode_text([text for texts in prompts for text in texts])
    counts = [len(texts) for texts in prompts]
    starts = np.cumsum([0, *counts[:-1]])
    vectors_CD = np.add.reduceat(text_ND, starts, axis=0)
    norms = np.linalg.norm(vectors_CD, axis=1, keepdims=True)
    return np.asarray(vectors_CD / np.maximum(norms, 1e-12), np.float32)


def _sigmoid(values: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-np.clip(values, -80, 80))), np.float32)
