"""Evaluation during training: every rank encodes its share, with equal numbers of forwards."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt

from clipsys.config import PathText, Settings
from clipsys.errors import DataError, SampleError
from clipsys.evaluation.class_names import class_names
from clipsys.evaluation.tasks.probes import knn_figures
from clipsys.evaluation.tasks.retrieval import (
    Floats,
    RetrievalTargets,
    retrieval_figures,
    retrieval_targets,
)
from clipsys.evaluation.tasks.zeroshot import zeroshot_figures
from clipsys.images.decoding import decode_image
from clipsys.images.preprocessing import Preprocessing
from clipsys.models.tokenization import Tokenizer
from clipsys.shards.random_access import repeated_keys
from clipsys.shards.reading import expand_shards, iterate_raw, shard_failure
from clipsys.shards.remote import is_remote
from clipsys.shards.samples import REPEATED, Sample, check_key, parse_sample, place_of
from clipsys.training.data.augmentation import normalisation, to_input
from clipsys.training.distributed.collectives import gather_objects, rank, world_size
from clipsys.training.engine.deepspeed_engine import Engine
from clipsys.zeroshot.classifier import class_vectors

_logger = logging.getLogger(__name__)


class EvaluationConfig(Settings):
    """What is measured during training, on ``data.validation``."""

    every_epochs: NonNegativeInt = Field(1, description="0: only at the end")
    captions: Literal["first", "all"] = Field("all", description="which captions are queries")
    match: str | None = Field(
        None, description="metadata key: an image with the query's value is a hit"
    )
    zeroshot: PathText | list[PathText] | None = Field(
        None, description="labelled shards (.cls) for zero-shot classification"
    )
    classnames: PathText | None = Field(
        None,
        description="where labels are numbers: file with one class name a line, the first for "
        "class 0; default classnames.txt beside the shards",
    )
    templates: list[str] = Field(
        ["a photo of a {}."], min_length=1, description="prompts, with {} for the class"
    )
    knn: str | None = Field(
        None,
        description="label that the nearest neighbours of each image predict: a metadata key, or "
        "cls for the .cls member; images that match do not vote for each other",
    )
    batch_size: PositiveInt = Field(128, description="images encoded at once, on each rank")


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
        caption_key: str | None = None,
    ) -> None:
        """
        Args:
            config: settings of the evaluation.
            validation: shards of the held-out data.
            preprocessing: makes of a decoded image what the image tower sees.
            tokenizer: tokenizer of the text tower.
            has_text: whether text is trained; else retrieval is not measured.
            caption_key: as `parse_sample` takes it.

        Raises:
            DataError: the shards cannot be used, or lack what is asked of them.
        """
        self._config = config
        self._preprocessing = preprocessing
        self._tokenizer = tokenizer
        self._targets: RetrievalTargets | None = None
        self._neighbours: _Neighbours | None = None
        if validation is not None and not has_text:
            _logger.info("retrieval is not measured: the objective trains no text")
            if config.knn is None:
                _logger.warning(
                    "data.validation is not used; set evaluation.knn to the metadata key of a "
                    "label (or cls) to measure nearest neighbours on it"
                )
        if validation is not None and (has_text or config.knn is not None):
            samples = _usable(
                "data.validation", validation, preprocessing, _require_key, caption_key
            )
            if has_text:
                self._targets = _targets([sample for sample, _ in samples], config)
            if config.knn is not None:
                self._neighbours = _neighbours([sample for sample, _ in samples], config)
            self._pixels = _stack_share(samples)
            self._num_images = len(samples)
        self._labels: list[str] = []
        if config.zeroshot is not None:
            samples = _usable("evaluation.zeroshot", config.zeroshot, preprocessing, _require_label)
            self._labels = [str(sample.label) for sample, _ in samples]
            self._classes = class_names(
                self._labels,
                _folders(config.zeroshot),
                file=config.classnames,
                setting="evaluation.classnames",
            )
            self._zeroshot_pixels = _stack_share(samples)

    def __bool__(self) -> bool:
        return bool(self._targets or self._neighbours or self._labels)

    def fingerprint(self) -> str:
        """Equal for the same texts, labels and numbers of images; ranks must hold the same."""
        texts = self._targets.texts if self._targets else []
        images = self._num_images if self._targets or self._neighbours else 0
        labels = self._neighbours.labels if self._neighbours else []
        held = repr((images, texts, self._labels, labels)).encode()
        return hashlib.blake2b(held, digest_size=8).hexdigest()

    def measure(self, engine: Engine) -> dict[str, float]:
        """The metrics that the recipe sets, of the model as it is. Every rank must call it."""
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

            if self._targets or self._neighbours:
                image_ND = self._encode_all(self._pixels, self._num_images, encode_image)
            if self._targets:
                text_MD = encode_text(self._targets.texts)
                figures |= retrieval_figures(image_ND, text_MD, self._targets)
            if self._neighbours:
                nearest = knn_figures(image_ND, *self._neighbours)
                figures |= {f"knn/{name}": value for name, value in nearest.items()}
            if self._labels:
                image_ND = self._encode_all(self._zeroshot_pixels, len(self._labels), encode_image)
                classes = sorted(self._classes)
                templates = self._config.templates
                names = [self._classes[label] for label in classes]
                prompts = encode_text([t.format(name) for name in names for t in templates])
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


class _Neighbours(NamedTuple):
    """The label of each image, and what tells which images show the same thing."""

    labels: list[str]
    same: list[object] | None


def _targets(samples: Sequence[Sample], config: EvaluationConfig) -> RetrievalTargets:
    """The captions to search with, and the images that each of them should find."""
    try:
        return retrieval_targets(
            ((sample.captions, sample.metadata) for sample in samples),
            captions=config.captions,
            match=config.match,
        )
    except DataError as error:
        raise DataError(f"data.validation: {error}") from error


def _neighbours(samples: Sequence[Sample], config: EvaluationConfig) -> _Neighbours:
    key = str(config.knn)
    values = [one.label if key == "cls" else one.metadata.get(key) for one in samples]
    if None in values:
        sample, place = samples[values.index(None)], "label (.cls member)"
        if key != "cls":
            place = f"metadata key {key!r}; it has {', '.join(sorted(sample.metadata)) or 'none'}"
        raise DataError(f"evaluation.knn: sample {sample.key!r} has no {place}")
    same = None
    if config.match is not None:
        same = [one.metadata.get(config.match, one.key) for one in samples]
    return _Neighbours([str(value) for value in values], same)


def _usable(
    setting: str,
    spec: str | list[str],
    preprocessing: Preprocessing,
    require: Callable[[Sample, dict[str, Any]], None],
    caption_key: str | None = None,
) -> list[tuple[Sample, np.ndarray]]:
    """Samples that can be used, with their pixels, the same ones on every rank.

    Args:
        setting: that names the shards, for messages.
        spec: the shards.
        preprocessing: preprocessing of the model.
        require: raises `SampleError` if a sample lacks what the measurement needs.
        caption_key: as `parse_sample` takes it.
    """
    usable: list[tuple[Sample, np.ndarray]] = []
    reasons: Counter[str] = Counter()
    first = ""
    places = hashlib.sha256()
    for item in _raws(spec):
        try:
            if isinstance(item, DataError):
                raise item
            sample = parse_sample(item, caption_key=caption_key)
            require(sample, item)
            # At full scale, as `clipsys evaluate` decodes it: the figures must agree.
            image = decode_image(sample.image, uri=place_of(item))
        except DataError as error:
            reasons[getattr(error, "reason", "truncated shard")] += 1
            first = first or str(error)
            continue
        places.update(place_of(item).encode("utf-8", "backslashreplace") + b"\n")
        usable.append((sample, preprocessing.pixels(image)))
    if reasons and rank() == 0:
        listed = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        _logger.warning(
            "%s: %d samples cannot be used (%s); the first: %s",
            *(setting, reasons.total(), listed, first),
        )
    if not usable:
        why = (
            f"no sample can be used; the first: {first}" if first else "the shards have no samples"
        )
        raise DataError(f"{setting}: {spec}: {why}")
    if len(set(gather_objects(places.hexdigest()))) > 1:
        raise DataError(
            f"{setting}: {spec}: the ranks can read different samples; give all of them the same "
            "shards"
        )
    return usable


def _raws(spec: str | list[str]) -> Iterator[dict[str, Any] | DataError]:
    """Raw samples, and what is wrong with a shard where it breaks off.

    Raises:
        DataError: a shard gives no sample at all.
    """
    for shard in expand_shards(spec):
        repeated = frozenset() if is_remote(shard) else repeated_keys(shard)
        failures: list[DataError] = []

        def note(name: str, error: Exception, failures: list[DataError] = failures) -> None:
            failures.append(DataError(shard_failure(name, error)))

        num_samples = 0
        for raw in iterate_raw([shard], on_error=note):
            num_samples += 1
            if raw["__key__"] in repeated:
                raw[REPEATED] = True
            yield raw
        if failures and not num_samples:
            raise failures[0]
        yield from failures


def _require_key(sample: Sample, raw: dict[str, Any]) -> None:
    check_key(raw)  # an image without a caption is a candidate all the same


def _require_label(sample: Sample, raw: dict[str, Any]) -> None:
    if sample.label is None:
        raise SampleError(
            f"{place_of(raw)}: the sample has no label (.cls member)", reason="no label"
        )


def _folders(spec: str | list[str]) -> list[Path]:
    shards = [Path(shard).absolute() for shard in expand_shards(spec) if not is_remote(shard)]
    return list(dict.fromkeys(shard.parent for shard in shards))


def _stack_share(samples: Sequence[tuple[Sample, np.ndarray]]) -> torch.Tensor:
    share = [pixels for _, pixels in samples][rank() :: world_size()]
    if not share:
        share = [samples[0][1]]
    return torch.from_numpy(np.stack(share))
