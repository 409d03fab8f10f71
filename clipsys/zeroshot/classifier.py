"""Zero-shot classification: class names become text vectors, images take the nearest one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from clipsys.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

    from clipsys.models.encoder import Encoder

DEFAULT_TEMPLATES = ("a photo of a {}.",)


@dataclass(frozen=True)
class Prediction:
    """The class of one image.

    Attributes:
        label: the class with the highest probability.
        probability: probability of that class, in [0, 1].
        scores: cosine similarity to each class, in the order of the classes.
        probabilities: probability of each class. Those of a model trained with a softmax are over
            the classes that were offered, and sum to 1. A model trained with the sigmoid loss
            (SigLIP) decides on each class by itself: they need not sum to 1, and may all be near 0.
    """

    label: str
    probability: float
    scores: dict[str, float]
    probabilities: dict[str, float]


class ZeroShotClassifier:
    """Classifies images among classes that are given by name.

    Each class vector is the mean of its templates' unit vectors, normalised again (Radford et al.
    2021, "Learning Transferable Visual Models From Natural Language Supervision", section 3.1.4).
    """

    def __init__(
        self,
        encoder: Encoder,
        classes: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
    ) -> None:
        self.encoder = encoder
        self.classes = check_prompts(classes, templates)
        texts = [template.replace("{}", name) for name in self.classes for template in templates]
        self.class_CD = class_vectors(encoder.encode_text(texts), len(templates))

    def scores(self, image_ND: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Cosine similarities (N, C) of unit image vectors (N, D) to the classes."""
        return image_ND @ self.class_CD.T

    def predict(self, images: Sequence[Image.Image | str | Path]) -> list[Prediction]:
        """Classifies images, given decoded or by path.

        Raises:
            ImageDecodeError: one of the files cannot be decoded.
        """
        scores_NC = self.scores(self.encoder.encode_image(images))
        return [self._prediction(row) for row in scores_NC]

    def _prediction(self, scores_C: npt.NDArray[np.float32]) -> Prediction:
        logits_C = self.encoder.logit_scale * scores_C.astype(np.float64)
        best = int(logits_C.argmax())
        bias = self.encoder.logit_bias
        if bias is None:
            powers_C = np.exp(logits_C - logits_C.max())
            probability_C = powers_C / powers_C.sum()
        else:
            probability_C = 1 / (1 + np.exp(-np.clip(logits_C + bias, -700, 700)))
        return Prediction(
            self.classes[best],
            float(probability_C[best]),
            dict(zip(self.classes, map(float, scores_C), strict=True)),
            dict(zip(self.classes, map(float, probability_C), strict=True)),
        )


def check_prompts(classes: Sequence[str], templates: Sequence[str]) -> list[str]:
    """The classes, each once and without blanks around it.

    Raises:
        ConfigError: there are fewer than two, or a template has no place for them.
    """
    names = list(dict.fromkeys(name.strip() for name in classes if name.strip()))
    if len(names) < 2:
        raise ConfigError(
            f"zero-shot classification needs two different classes or more, got {list(classes)}"
        )
    for template in templates or [""]:
        if template.count("{}") != 1:
            raise ConfigError(f"template {template!r}: expected one {{}} for the class name")
    return names


def class_vectors(text_ND: npt.NDArray[np.float32], num_templates: int) -> npt.NDArray[np.float32]:
    """One unit vector per class from those of its prompts: (C * T, D), class by class -> (C, D)."""
    vectors = text_ND.reshape(-1, num_templates, text_ND.shape[1]).mean(axis=1)
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(norms, 1e-12), np.float32)
