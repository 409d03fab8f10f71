"""Evaluation during training: every rank encodes its share, with equal numbers of forwards."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt

from clipsys.config import Settings
from clipsys.errors import DataError, ImageDecodeError
from clipsys.evaluation.figures import (
    RetrievalTargets,
    retrieval_figures,
    retrieval_targets,
    zeroshot_figures,
)
from clipsys.evaluation.metrics import Floats
from clipsys.images.decoding import decode_image
from clipsys.images.preprocessing import Preprocessing
from clipsys.models.open_clip_models import Tokenizer
from clipsys.models.zeroshot import class_vectors
from clipsys.shards.reading import Sample, expand_shards, iterate_samples
from clipsys.training.data.augmentation import normalisation, to_input
from clipsys.training.distributed.collectives import gather_objects, rank, world_size
from clipsys.training.engine.deepspeed_engine import Engine

_logger = logging.getLogger(__name__)


class EvaluationConfig(Settings):
    """What is measured during training, on ``data.validation``."""

    every_epochs: NonNegativeInt = Field(1, description="0: only at the end")
    captions: Literal["first", "all"] = Field("all", description="which captions are queries")
    match: str | None = Field(
        None, description="metadata key: an image with the query's value is a hit"
    )
    zeroshot: str | list[str] | None = Field(
        None, description="labelled shards (.cls) for zero-shot classification"
    )
    templates: list[str] = Field(
        ["a photo of a {}."], min_length=1, description="prompts, with {} for the class"
    )
    batch_size: PositiveInt = Field(128, description="images encoded at once, on each rank")


class Validation:
    """The held-out data of a run, decoded once and kept as uint8."""

    def __init__(
        self,
        config: EvaluationConfig,
        validation: str | list[str] | None,
        preprocessing: Preprocessing,
        tokenizer: Tokenizer,
    ) -> None:
        self._config = config
        self._preprocessing = preprocessing
        self._tokenizer = tokenizer
        self._targets: RetrievalTargets | None = None
        if validation is not None:
            samples = _usable(validation, self._preprocessing)
            self._targets = retrieval_targets(
                ((sample.captions, sample.metadata) for sample, _ in samples),
                captions=config.captions,
                match=config.match,
            )
            self._pixels = _stack_share(samples)
            self._num_images = len(samples)
        self._labels: list[str] = []
        if config.zeroshot is not None:
            samples = _usable(config.zeroshot, self._preprocessing)
            unlabelled = [sample.key for sample, _ in samples if sample.label is None]
            if unlabelled:
                raise DataError(
                    f"evaluation.zeroshot: sample {unlabelled[0]!r} has no label (.cls member)"
                )
            self._labels = [str(sample.label) for sample, _ in samples]
            self._zeroshot_pixels = _stack_share(samples)

    def __bool__(self) -> bool:
        return self._targets is not None or bool(self._labels)

    def measure(self, engine: Engine) -> dict[str, float]:
        """Recall and zero-shot accuracy of the model as it is. Every rank must call it."""
        figures: dict[str, float] = {}
        with engine.evaluating() as model:
            mean, std = normalisation(self._preprocessing, engine.device)
            size = self._preprocessing.size

            def encode_image(pixels: torch.Tensor) -> torch.Tensor:
                image = to_input(pixels.to(engine.device), size, mean, std)
                if engine.config.channels_last:
                    image = image.contiguous(memory_format=torch.channels_last)
                return model.encode_image(image)

            def encode_text(texts: list[str]) -> Floats:
                share = texts[rank() :: world_size()]
                tokens = self._tokenizer(share or [""])
                return self._encode_all(
                    tokens, len(texts), lambda part: model.encode_tokens(part.to(engine.device))
                )

            if self._targets is not None:
                image_ND = self._encode_all(self._pixels, self._num_images, encode_image)
                text_MD = encode_text(self._targets.texts)
                figures |= retrieval_figures(image_ND, text_MD, self._targets)
            if self._labels:
                image_ND = self._encode_all(self._zeroshot_pixels, len(self._labels), encode_image)
                classes = sorted(set(self._labels))
                templates = self._config.templates
                prompts = encode_text([t.format(name) for name in classes for t in templates])
                class_CD = class_vectors(prompts, len(templates))
                accuracy = zeroshot_figures(image_ND, class_CD, classes, self._labels)
                figures |= {f"zeroshot/{name}": value for name, value in accuracy.items()}
        return figures

    def _encode_all(
        self,
        share: torch.Tensor,
        total: int,
        encode: Callable[[torch.Tensor], torch.Tensor],
    ) -> Floats:
        """Encodes this rank's rows (every W-th of ``total``) and gathers all in their order."""
        ranks = world_size()
        size = self._config.batch_size
        largest = -(-total // ranks)
        parts = []
        for start in range(0, largest, size):
            # Ranks with a row less still make the forward: ZeRO-3 gathers inside it.
            rows = share[start : start + size]
            parts.append(encode(rows if len(rows) else share[:1]).float().cpu()[: len(rows)])
        local = torch.cat(parts).numpy()[: len(range(rank(), total, ranks))]
        gathered = gather_objects(local)
        result = np.empty((total, local.shape[1]), np.float32)
        for number, part in enumerate(gathered):
            result[number::ranks] = part
        return result


def _usable(spec: str | list[str], preprocessing: Preprocessing) -> list[tuple[Sample, np.ndarray]]:
    """Samples that decode, with their pixels; every rank must come to the same list."""
    usable = []
    skipped: list[str] = []
    for sample in iterate_samples(expand_shards(spec)):
        try:
            # At full scale, as `clipsys evaluate` decodes it: the figures must agree.
            image = decode_image(sample.image, uri=sample.key)
        except ImageDecodeError as error:
            skipped.append(str(error))
            continue
        usable.append((sample, preprocessing.pixels(image)))
    if skipped:
        _logger.warning("%d validation images cannot be used; first: %s", len(skipped), skipped[0])
    if not usable:
        raise DataError(f"{spec}: no usable validation image")
    return usable


def _stack_share(samples: Sequence[tuple[Sample, np.ndarray]]) -> torch.Tensor:
    share = [pixels for _, pixels in samples][rank() :: world_size()]
    if not share:
        share = [samples[0][1]]
    return torch.from_numpy(np.stack(share))
