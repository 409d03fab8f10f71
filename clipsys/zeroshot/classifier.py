"""Zero-shot classification: class names become text vectors, images take the nearest one."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipsys.errors import ConfigError, DataError
from clipsys.images.decoding import decode_image, finish_opened
from clipsys.progress import progress_if
from clipsys.zeroshot import calibration
from clipsys.zeroshot.class_vectors import class_vectors
from clipsys.zeroshot.classes import Classes, ClassTexts, read_classes
from clipsys.zeroshot.deciding import (
    DEFAULT_BACKGROUND,
    UNKNOWN,
    Choice,
    Decisions,
    Temperature,
    decide,
    probabilities,
)
from clipsys.zeroshot.images import Input, StoredVectors, count_of, encoded, inputs
from clipsys.zeroshot.templates import DEFAULT_TEMPLATES, find_templates

if TYPE_CHECKING:
    from clipsys.models.encoder import Encoder
    from clipsys.zeroshot.calibration import Calibration
    from clipsys.zeroshot.explain import Explanation

Floats = npt.NDArray[np.float32]

#: Images from which a progress bar is worth its line.
_MANY = 256

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prediction:
    """The class of one image.

    Probabilities are over the classes that were given, and say nothing of what else an image may
    show: a photograph of a horse is a dog with 0.9 where the classes are dog and fish.

    Attributes:
        label: the class with the highest probability, or ``unknown``.
        probability: probability of that class, in [0, 1].
        scores: cosine similarity to each class, in the order of the classes.
        probabilities: probability of each class. Those of a model trained with a softmax are over
            the classes that were offered (and the background, if any), and sum to 1. A model
            trained with the sigmoid loss (SigLIP) decides on each class by itself: they need not
            sum to 1, and may all be near 0.
        top: the most probable classes with their probabilities, best first.
        labels: all classes of the image where each is decided on by itself (``multi_label``).
    """

    label: str
    probability: float
    scores: dict[str, float]
    probabilities: dict[str, float]
    top: tuple[tuple[str, float], ...] = ()
    labels: tuple[str, ...] = ()


class ZeroShotClassifier:
    """Classifies images among classes that are given by name.

    Each class vector is the mean of its prompts' unit vectors, normalised again (Radford et al.
    2021, "Learning Transferable Visual Models From Natural Language Supervision", section 3.1.4).

    Attributes:
        encoder: the model.
        classes: C names, in the order in which they were given.
        templates: sentences with ``{}`` for the class.
        class_CD: (C, D) float32, one unit vector a class.
        temperature: how similarities become probabilities: the model's own, until `calibrate`.
    """

    def __init__(
        self,
        encoder: Encoder,
        classes: Classes,
        templates: str | Sequence[str] = DEFAULT_TEMPLATES,
        *,
        multi_label: bool = False,
        threshold: float = 0.5,
        unknown_below: float | None = None,
        background: Sequence[str] = (),
        cache: bool = True,
    ) -> None:
        """
        Args:
            encoder: the model.
            classes: names; or a mapping from a name to a list of synonyms, each of which goes into
                every template, or to one text, a description that stands without a template.
            templates: sentences with ``{}`` for the class, or the name of a set: ``simple``,
                ``clip`` (80), ``siglip`` (5), or ``plain``, with which all texts are descriptions.
            multi_label: decide on each class by itself: an image has any number of labels. With a
                model trained with a softmax, each class is set against the background.
            threshold: probability from which an image is of a class then.
            unknown_below: label images ``unknown`` whose best probability is lower. For images that
                are of one of the classes, where the model is not sure.
            background: texts of what is none of the classes ("a landscape", "a document"); an image
                that is nearer to one of them is ``unknown``. For images that show something else.
            cache: store class vectors in the user's cache folder, and look them up there.

        Raises:
            ConfigError: there are fewer than two classes, one is given twice, or a template has no
                place for them.
        """
        texts = [background] if isinstance(background, str) else list(background)
        choice = Choice(multi_label, threshold, unknown_below, tuple(texts))
        is_sigmoid = encoder.logit_bias is not None
        found, self.templates = check_question(classes, templates, choice, is_sigmoid=is_sigmoid)
        self.encoder = encoder
        self.classes = [one.name for one in found]
        prompts = [one.prompts(self.templates) for one in found]
        self.class_CD = class_vectors(encoder, prompts, cache=cache)
        self.temperature = Temperature(encoder.logit_scale, encoder.logit_bias)
        self._choice = choice
        background = choice.background
        if multi_label and not background and self.temperature.bias is None:
            background = DEFAULT_BACKGROUND
        self._background_KD = encoder.encode_text(list(background)) if background else None

    def __repr__(self) -> str:
        return f"ZeroShotClassifier({self.encoder.name!r}, {len(self.classes)} classes)"

    def scores(self, image_ND: Floats) -> Floats:
        """Cosine similarities (N, C) of unit image vectors (N, D) to the classes."""
        return image_ND @ self.class_CD.T

    def probabilities(self, image_ND: Floats) -> npt.NDArray[np.float64]:
        """Probabilities (N, C) of unit image vectors (N, D); see `Prediction`."""
        found, _ = probabilities(
            self.scores(image_ND),
            self._background(image_ND),
            self.temperature,
            multi_label=self._choice.multi_label,
        )
        return found

    def decide(self, image_ND: Floats, *, dtype: npt.DTypeLike = np.float64) -> Decisions:
        """Labels of many unit image vectors (N, D) at once, as arrays.

        Args:
            image_ND: vectors.
            dtype: in which probabilities are computed; float32 takes half the time and memory.
        """
        return decide(
            self.scores(image_ND),
            self._background(image_ND),
            self.classes,
            self.temperature,
            self._choice,
            dtype=dtype,
        )

    def predict(
        self,
        images: Any,
        *,
        top_k: int = 1,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> list[Prediction]:
        """Classifies images.

        Args:
            images: paths, bytes, PIL images, arrays or tensors (see `clipsys.zeroshot.images`), one
                or an iterable of them; a folder, a table or shards; or an open collection, whose
                stored vectors are used.
            top_k: classes in `Prediction.top`.
            on_error: ``skip`` leaves out what cannot be used, with a warning each.

        Raises:
            ImageDecodeError: one of them cannot be decoded.
            DataError: one is no image, or the collection's vectors are of another model.
        """
        return [found for _, found in self.stream(images, top_k=top_k, on_error=on_error)]

    def stream(
        self,
        images: Any,
        *,
        top_k: int = 1,
        on_error: Literal["raise", "skip"] = "raise",
        show_progress: bool | None = None,
    ) -> Iterator[tuple[str, Prediction]]:
        """Classifies images as they come, with bounded memory: names and predictions, in order.

        Args:
            images: as `predict` takes them.
            top_k: classes in `Prediction.top`.
            on_error: ``skip`` leaves out what cannot be used, with a warning each.
            show_progress: draws a bar on stderr; None: where there are many images.

        Raises:
            ImageDecodeError: one of them cannot be decoded.
            DataError: one is no image, or the collection's vectors are of another model.
        """
        if on_error not in ("raise", "skip"):
            raise ConfigError(f"on_error is {on_error!r}; expected 'raise' or 'skip'")
        if top_k < 1:
            raise ConfigError(f"top_k is {top_k}; expected 1 or more")
        total = count_of(images)
        shown = show_progress if show_progress is not None else total is None or total > _MANY
        with progress_if(shown, "Classifying", total) as advance:
            for names, image_ND in self._vectors(images, on_error):
                yield from zip(names, self._predictions(image_ND, top_k), strict=True)
                advance(len(names))

    def calibrate(self, images: Any, labels: Sequence[str]) -> Calibration:
        """Fits the temperature on labelled images, so that probabilities are honest.

        No ranking of the classes changes. A sigmoid model has a bias, which is fitted too.

        Args:
            images: as `predict` takes them; or unit vectors (N, D) float32.
            labels: the class of each image.

        Raises:
            ConfigError: ``multi_label`` of a softmax model.
            DataError: a label is not a class, or there are more or fewer labels than images.
        """
        if self._choice.multi_label and self.temperature.bias is None:
            raise ConfigError(
                "multi_label=True of a softmax model compares each class with the background; a "
                "temperature can be fitted for one label an image only: calibrate without it"
            )
        unknown = sorted({*labels} - {*self.classes})
        if unknown:
            raise DataError(
                f"label {unknown[0]!r} is not one of the classes: {', '.join(self.classes[:8])}"
                f"{', …' if len(self.classes) > 8 else ''}"
            )
        is_vectors = (
            isinstance(images, np.ndarray) and images.ndim == 2 and images.dtype.kind == "f"
        )
        if is_vectors and images.shape[1] == self.encoder.dim:
            image_ND = images
        else:
            blocks = [block for _, block in self._vectors(images, "raise")]
            image_ND = np.concatenate(blocks) if blocks else np.zeros((0, self.encoder.dim))
        if len(image_ND) != len(labels) or not labels:
            raise DataError(
                f"{len(image_ND)} images and {len(labels)} labels; a calibration needs a label for "
                "each image, and one image or more"
            )
        if len(labels) < calibration.FEW_IMAGES:
            _logger.warning(
                "a temperature fitted on %d images is uncertain; %d or more are better",
                *(len(labels), calibration.FEW_IMAGES),
            )
        index = {name: number for number, name in enumerate(self.classes)}
        targets_N = np.array([index[label] for label in labels])
        scores_NC = self.scores(np.asarray(image_ND, np.float32))
        before = self.temperature
        self.temperature = calibration.fit(scores_NC, targets_N, before)
        return calibration.Calibration(
            1 / self.temperature.scale,
            self.temperature.bias,
            calibration.loss(scores_NC, targets_N, before),
            calibration.loss(scores_NC, targets_N, self.temperature),
            calibration.calibration_error(scores_NC, targets_N, before),
            calibration.calibration_error(scores_NC, targets_N, self.temperature),
            len(labels),
        )

    def explain(self, image: Any, label: str | None = None) -> Explanation:
        """Which parts of an image speak for a label, against the others.

        Args:
            image: a path, bytes, a PIL image, an array or a tensor.
            label: one of the classes; None: the nearest one.

        Raises:
            ConfigError: the label is not a class.
            DataError: there is no image or more than one, or it cannot be decoded.
            ModelError: the image tower is of a kind that cannot be explained.
        """
        from clipsys.zeroshot.explain import explain_class

        found = list(itertools.islice(inputs(image), 2))
        if len(found) != 1:
            raise DataError(
                f"{'more than one image is' if found else 'no image is'} given; explain takes one"
            )
        (one,) = found
        loaded = one.load()
        picture = (
            finish_opened(loaded, uri=one.name)
            if isinstance(loaded, Image.Image)
            else decode_image(loaded, uri=one.name)
        )
        if label is None:
            ((_, image_ND),) = encoded(self.encoder, [one])
            label = self.classes[int(self.scores(image_ND)[0].argmax())]
        return explain_class(self.encoder, picture, label, self.classes, self.class_CD)

    def _background(self, image_ND: Floats) -> Floats | None:
        return None if self._background_KD is None else image_ND @ self._background_KD.T

    def _vectors(
        self, images: Any, on_error: Literal["raise", "skip"]
    ) -> Iterator[tuple[list[str], Floats]]:
        if isinstance(images, StoredVectors):
            pin = images.encoder_pin
            if pin.fingerprint != self.encoder.fingerprint:
                raise DataError(
                    f"the collection's vectors are of model {pin.name} ({pin.fingerprint[:12]}), "
                    f"the classifier's of {self.encoder.name} ({self.encoder.fingerprint[:12]}); "
                    "make the classifier with the collection's encoder"
                )
            for items, image_ND in images.stored_vectors():
                yield [item.uri for item in items], image_ND
            return
        skip: Callable[[Input, DataError], None] | None = _warn if on_error == "skip" else None
        for found, image_ND in encoded(self.encoder, inputs(images), on_error=skip):
            yield [one.name for one in found], image_ND

    def _predictions(self, image_ND: Floats, top_k: int) -> Iterator[Prediction]:
        found = self.decide(image_ND)
        order_NK = np.argsort(-found.probability_NC, axis=1, kind="stable")[:, :top_k]
        for place, label in enumerate(found.labels):
            probability_C = found.probability_NC[place].tolist()
            yield Prediction(
                label,
                float(found.probability_N[place]),
                dict(zip(self.classes, found.scores_NC[place].tolist(), strict=True)),
                dict(zip(self.classes, probability_C, strict=True)),
                tuple((self.classes[one], probability_C[one]) for one in order_NK[place].tolist()),
                () if found.chosen is None else tuple(found.chosen[place]),
            )


def check_question(
    classes: Classes,
    templates: str | Sequence[str],
    choice: Choice,
    *,
    is_sigmoid: bool = False,
) -> tuple[list[ClassTexts], list[str]]:
    """The classes and the templates, checked, before minutes of loading a model.

    Raises:
        ConfigError: there are too few classes, one is given twice, or a template has no place for
            them.
    """
    _check_probability("threshold", choice.threshold)
    if choice.unknown_below is not None:
        _check_probability("unknown_below", choice.unknown_below)
    if not all(text.strip() for text in choice.background):
        raise ConfigError("background has an empty text; leave it out")
    # One class alone has probability 1 of a softmax, so a threshold says nothing there.
    by_itself = is_sigmoid and choice.unknown_below is not None
    one_is_enough = choice.multi_label or bool(choice.background) or by_itself
    found = read_classes(classes, at_least=1 if one_is_enough else 2)
    names_unknown = choice.unknown_below is not None or choice.background
    if names_unknown and any(one.name == UNKNOWN for one in found):
        raise ConfigError(f"a class is called {UNKNOWN!r}, as images of no class are; rename it")
    return found, find_templates(templates)


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} is {value}; expected a probability from 0 to 1")


def _warn(one: Input, error: DataError) -> None:
    _logger.warning("%s", error if one.name in str(error) else f"{one.name}: {error}")
