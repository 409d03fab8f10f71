"""Measures a model in training: every rank encodes its share, with equal numbers of forwards."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from clipsys.errors import DataError
from clipsys.evaluation.class_prompts import class_question
from clipsys.evaluation.tasks.probes import knn_figures
from clipsys.evaluation.tasks.retrieval import (
    Floats,
    RetrievalTargets,
    retrieval_figures,
    retrieval_targets,
)
from clipsys.evaluation.tasks.splitting import group_numbers
from clipsys.evaluation.tasks.zeroshot import zeroshot_figures
from clipsys.images.preprocessing import Preprocessing
from clipsys.models.tokenization import Tokenizer
from clipsys.shards.samples import Sample
from clipsys.training.data.augmentation import normalisation, to_input
from clipsys.training.distributed.collectives import gather_objects, rank, world_size
from clipsys.training.engine.deepspeed_engine import Engine
from clipsys.training.features.trunks import Encode, Trunks
from clipsys.training.model.outputs import Inputs
from clipsys.training.model.trained import TrainedModel
from clipsys.training.validation.classifier import (
    ClassifiedSamples,
    Classifier,
    classified_samples,
    classifier_figures,
)
from clipsys.training.validation.config import EvaluationConfig
from clipsys.training.validation.held_out import (
    folders_of,
    require_key,
    require_label,
    stack_share,
    usable_samples,
)

_logger = logging.getLogger(__name__)


class Validation:
    """The held-out data of a run, decoded once and stored as uint8.

    A sample that cannot be used is left out and counted, as in training.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        validation: str | list[str] | None,
        preprocessing: Preprocessing,
        tokenizer: Tokenizer,
        *,
        has_text: bool = True,
        has_images: bool = True,
        caption_key: str | None = None,
        classifier: Classifier | None = None,
        place: str | None = None,
    ) -> None:
        """
        Args:
            config: settings of the evaluation.
            validation: shards of the held-out data.
            preprocessing: makes of a decoded image what the image tower sees.
            tokenizer: tokenizer of the text tower.
            has_text: whether text is trained; else retrieval is not measured.
            has_images: whether images are trained; else they are not decoded.
            caption_key: as `parse_sample` takes it.
            classifier: what the objective trains, where it is to be measured.
            place: the setting that names the data, for messages; None: those of a recipe's own
                validation.

        Raises:
            DataError: the shards cannot be used, or lack what is asked of them.
        """
        self._config = config
        self._preprocessing = preprocessing
        self._tokenizer = tokenizer
        self._targets: RetrievalTargets | None = None
        self._neighbours: _Neighbours | None = None
        self._classifier = classifier
        self._classified: ClassifiedSamples | None = None
        self._tokens: torch.Tensor | None = None
        self._trunks: Trunks | None = None
        self._features: dict[str, torch.Tensor] = {}
        retrieves = has_text and has_images
        if validation is not None and not retrieves:
            lacking = "text" if has_images else "image"
            _logger.info("retrieval is not measured: the objective trains no %s", lacking)
            if config.knn is None and classifier is None:
                _logger.warning(
                    "data.validation is not used; set evaluation.knn to the metadata key of a "
                    "label (or cls) to measure nearest neighbours on it"
                    if has_images
                    else "data.validation is not used; set evaluation.classifier to measure the "
                    "objective's classifier on it, if it trains one"
                )
        if validation is not None and (retrieves or config.knn or classifier):
            samples = usable_samples(
                place or "data.validation",
                validation,
                preprocessing,
                require_key,
                caption_key,
                needs_image=has_images,
            )
            if classifier is not None:
                self._classified = classified_samples([one for one, _ in samples], classifier)
                if has_text:
                    first = [one.captions[0] if one.captions else "" for one, _ in samples]
                    share = first[rank() :: world_size()] or first[:1]
                    self._tokens = tokenizer(share)
            if retrieves:
                self._targets = _targets(
                    [sample for sample, _ in samples], config, place or "data.validation"
                )
            if config.knn is not None:
                self._neighbours = _neighbours([sample for sample, _ in samples], config)
            self._pixels = stack_share(samples)
            self._num_images = len(samples)
        self._labels: list[str] = []
        if config.zeroshot is not None:
            samples = usable_samples(
                place or "evaluation.zeroshot", config.zeroshot, preprocessing, require_label
            )
            self._labels = [str(sample.label) for sample, _ in samples]
            self._question, self._labels = class_question(
                self._labels,
                folders_of(config.zeroshot),
                classnames=config.classnames,
                templates=config.templates,
                setting=f"{place or 'evaluation'}.classnames",
            )
            self._zeroshot_pixels = stack_share(samples)

    def __bool__(self) -> bool:
        return bool(self._targets or self._neighbours or self._labels or self._classified)

    def use_trunks(self, trunks: Trunks) -> None:
        """Measures heads over features of locked towers, which are computed once."""
        self._trunks = trunks

    def _featured(self, name: str, rows: torch.Tensor, encode: Encode) -> torch.Tensor:
        """Features of rows that never change, in the place of the rows."""
        if name not in self._features:
            size = self._config.batch_size
            parts = [encode(rows[first : first + size]) for first in range(0, len(rows), size)]
            self._features[name] = torch.cat(parts).cpu()
        return self._features[name]

    def fingerprint(self) -> str:
        """Equal for the same texts, labels and numbers of images; ranks must hold the same."""
        texts = self._targets.texts if self._targets else []
        images = self._num_images if self._targets or self._neighbours else 0
        labels = self._neighbours.labels if self._neighbours else []
        prompts = self._question.prompts if self._labels else []
        held = repr((images, texts, self._labels, labels, self._classified, prompts)).encode()
        return hashlib.blake2b(held, digest_size=8).hexdigest()

    def measure(self, engine: Engine) -> dict[str, float]:
        """The metrics that the recipe sets, of the model as it is. Every rank must call it."""
        figures: dict[str, float] = {}
        with engine.evaluating() as model:
            mean, std = normalisation(self._preprocessing, engine.device)
            size = self._preprocessing.size

            def image_of(pixels: torch.Tensor) -> torch.Tensor:
                image = to_input(pixels.to(engine.device), size, mean, std)
                if engine.config.channels_last:
                    image = image.contiguous(memory_format=torch.channels_last)
                return image

            def encode_images(name: str, pixels: torch.Tensor, total: int) -> Floats:
                if self._trunks is None:
                    return self._encode_all(
                        pixels, total, lambda part: model.encode_image(image_of(part))
                    )
                trunk = self._trunks.images
                features = self._featured(name, pixels, lambda part: trunk(image_of(part)))
                return self._encode_all(
                    features, total, lambda part: model.encode_image(part.to(engine.device))
                )

            def encode_texts(name: str, texts: list[str]) -> Floats:
                rows = self._tokenizer(texts[rank() :: world_size()] or [""])
                if self._trunks is not None and "text" in self._trunks.stored:
                    rows = self._featured(name, rows, self._trunks.texts)
                return self._encode_all(
                    rows, len(texts), lambda part: model.encode_tokens(part.to(engine.device))
                )

            if self._targets or self._neighbours:
                image_ND = encode_images("images", self._pixels, self._num_images)
            if self._targets:
                text_MD = encode_texts("texts", self._targets.texts)
                figures |= retrieval_figures(image_ND, text_MD, self._targets)
            if self._neighbours:
                nearest = knn_figures(image_ND, *self._neighbours)
                figures |= {f"knn/{name}": value for name, value in nearest.items()}
            if self._classified:
                assert self._classifier is not None
                scores_NC = self._scores(self._classifier, model, image_of, engine.device)
                figures |= classifier_figures(scores_NC, self._classified, self._classifier)
            if self._labels:
                image_ND = encode_images("zeroshot", self._zeroshot_pixels, len(self._labels))
                prompts_ND = encode_texts("prompts", self._question.prompts)
                class_CD = self._question.vectors(prompts_ND)
                accuracy = zeroshot_figures(image_ND, class_CD, self._question.labels, self._labels)
                figures |= {f"zeroshot/{name}": value for name, value in accuracy.items()}
        return figures

    def _scores(
        self,
        classifier: Classifier,
        model: TrainedModel,
        image_of: Callable[[torch.Tensor], torch.Tensor],
        device: torch.device,
    ) -> Floats:
        """(N, C) scores of all samples of data.validation."""
        tokens_NL = self._tokens

        def encode(rows: torch.Tensor) -> torch.Tensor:
            views = (image_of(self._pixels[rows]),) if self._pixels.numel() else ()
            texts = () if tokens_NL is None else (tokens_NL[rows].to(device),)
            return classifier.scores(model, Inputs(views, texts))

        rows = torch.arange(len(self._pixels))
        return self._encode_all(rows, self._num_images, encode)

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


class _Neighbours(NamedTuple):
    """The label of each image, and what tells which images show the same thing."""

    labels: list[str]
    same: list[object]


def _targets(samples: Sequence[Sample], config: EvaluationConfig, place: str) -> RetrievalTargets:
    """The captions to search with, and the images that each of them should find."""
    try:
        return retrieval_targets(
            ((sample.captions, sample.metadata) for sample in samples),
            contents=_contents(samples),
            captions=config.captions,
            match=config.match,
            duplicates=config.duplicates,
        )
    except DataError as error:
        raise DataError(f"{place}: {error}") from error


def _neighbours(samples: Sequence[Sample], config: EvaluationConfig) -> _Neighbours:
    key = str(config.knn)
    values = [one.label if key == "cls" else one.metadata.get(key) for one in samples]
    if None in values:
        sample, place = samples[values.index(None)], "label (.cls member)"
        if key != "cls":
            place = f"metadata key {key!r}; it has {', '.join(sorted(sample.metadata)) or 'none'}"
        raise DataError(f"evaluation.knn: sample {sample.key!r} has no {place}")
    marks: list[tuple[Hashable, ...]] = [(("content", one),) for one in _contents(samples)]
    if config.match is not None:
        marks = [
            (*own, ("match", repr(one.metadata.get(config.match, one.key))))
            for own, one in zip(marks, samples, strict=True)
        ]
    return _Neighbours([str(value) for value in values], group_numbers(marks).tolist())


def _contents(samples: Sequence[Sample]) -> list[str]:
    """Hashes of the images: equal ones are the same picture."""
    return [hashlib.sha256(sample.image).hexdigest() for sample in samples]
