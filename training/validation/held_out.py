"""Held-out samples: those that can be used, decoded once, the same ones on every rank."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipsys.errors import DataError, SampleError
from clipsys.images.decoding import decode_image
from clipsys.images.preprocessing import Preprocessing
from clipsys.shards.random_access import repeated_keys
from clipsys.shards.reading import expand_shards, iterate_raw, shard_failure
from clipsys.shards.remote import is_remote
from clipsys.shards.samples import REPEATED, Sample, check_key, parse_sample, place_of
from clipsys.training.distributed.collectives import gather_objects, rank, world_size

_logger = logging.getLogger(__name__)


def usable_samples(
    setting: str,
    spec: str | list[str],
    preprocessing: Preprocessing,
    require: Callable[[Sample, dict[str, Any]], None],
    caption_key: str | None = None,
    *,
    needs_image: bool = True,
) -> list[tuple[Sample, np.ndarray]]:
    """Samples that can be used, with their pixels, the same ones on every rank.

    Args:
        setting: that names the shards, for messages.
        spec: the shards.
        preprocessing: preprocessing of the model.
        require: raises `SampleError` if a sample lacks what the measurement needs.
        caption_key: as `parse_sample` takes it.
        needs_image: whether images are decoded; else there are no pixels.
    """
    usable: list[tuple[Sample, np.ndarray]] = []
    reasons: Counter[str] = Counter()
    first = ""
    places = hashlib.sha256()
    for item in _raws(spec):
        try:
            if isinstance(item, DataError):
                raise item
            sample = parse_sample(item, caption_key=caption_key, needs_image=needs_image)
            require(sample, item)
            # At full scale, as `clipsys evaluate` decodes it: the figures must agree.
            image = decode_image(sample.image, uri=place_of(item)) if needs_image else None
        except DataError as error:
            reasons[getattr(error, "reason", "truncated shard")] += 1
            first = first or str(error)
            continue
        places.update(place_of(item).encode("utf-8", "backslashreplace") + b"\n")
        pixels = np.empty(0, np.uint8) if image is None else preprocessing.pixels(image)
        usable.append((sample, pixels))
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


def require_key(sample: Sample, raw: dict[str, Any]) -> None:
    """Refuses a sample whose key cannot be used."""
    check_key(raw)  # an image without a caption is a candidate all the same


def require_label(sample: Sample, raw: dict[str, Any]) -> None:
    """Refuses a sample without a label."""
    if sample.label is None:
        raise SampleError(
            f"{place_of(raw)}: the sample has no label (.cls member)", reason="no label"
        )


def folders_of(spec: str | list[str]) -> list[Path]:
    """The folders that the local ones of some shards lie in."""
    shards = [Path(shard).absolute() for shard in expand_shards(spec) if not is_remote(shard)]
    return list(dict.fromkeys(shard.parent for shard in shards))


def stack_share(samples: Sequence[tuple[Sample, np.ndarray]]) -> torch.Tensor:
    """The pixels of this rank's samples, every W-th; those of one where it has none."""
    share = [pixels for _, pixels in samples][rank() :: world_size()]
    if not share:
        share = [samples[0][1]]
    return torch.from_numpy(np.stack(share))
