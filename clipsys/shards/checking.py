"""Checking a set of shards: manifest, images, captions, duplicates."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipsys.errors import ImageDecodeError, SampleError
from clipsys.images.decoding import decode_image
from clipsys.processes.pool import ordered_map
from clipsys.progress import progress
from clipsys.shards.manifest import MANIFEST_NAME, ShardInfo, read_manifest
from clipsys.shards.random_access import repeated_keys
from clipsys.shards.reading import expand_shards, iterate_raw, shard_failure
from clipsys.shards.remote import is_remote
from clipsys.shards.samples import (
    REPEATED,
    check_key,
    has_image,
    parse_sample,
    place_of,
    require_captions,
)
from clipsys.shards.writing import hash_file


@dataclass
class CheckReport:
    """What is in a set of shards, and what is wrong with it. Samples are named ``SHARD#KEY``.

    Attributes:
        num_shards, num_samples: what was read.
        shard_faults: shards that break off, or are not what their manifest says.
        unusable: samples by the reason why they cannot be used.
        without_text: samples with neither caption nor label.
        repeated: groups of samples with the same image and the same text.
        without_image: texts alone; a fault where other samples have an image.
        same_image: groups of samples with the same image and different texts, as corpora with
            several captions have them; no fault.
    """

    num_shards: int = 0
    num_samples: int = 0
    shard_faults: list[str] = field(default_factory=list)
    unusable: dict[str, list[str]] = field(default_factory=dict)
    without_text: list[str] = field(default_factory=list)
    without_image: list[str] = field(default_factory=list)
    repeated: list[list[str]] = field(default_factory=list)
    same_image: list[list[str]] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        faults = self.shard_faults or self.unusable or self.without_text or self.repeated
        return not faults and len(self.without_image) in (0, self.num_samples)


@dataclass(frozen=True)
class _Finding:
    place: str
    image_hash: str  # empty for a text alone
    text_hash: str
    has_text: bool
    reason: str | None


def check_shards(source: str | Path | Sequence[str | Path], *, workers: int = 1) -> CheckReport:
    """Reads every sample of a set of shards, decodes every image.

    Args:
        source: what `expand_shards` takes.
        workers: processes that decode.

    Raises:
        DataError: there are no shards, or their manifest cannot be read.
    """
    shards = expand_shards(source)
    report = CheckReport(num_shards=len(shards))
    counts: dict[str, int] = dict.fromkeys(shards, 0)
    places: dict[tuple[str, str], list[str]] = defaultdict(list)
    images: dict[str, set[str]] = defaultdict(set)
    with progress("Checking", unit="samples") as advance:
        for finding in ordered_map(_examine, _raws(shards, counts, report), workers):
            advance()
            report.num_samples += 1
            if finding.reason:
                report.unusable.setdefault(finding.reason, []).append(finding.place)
                continue
            if not finding.has_text:
                report.without_text.append(finding.place)
            if not finding.image_hash:  # equal texts are no fault: they may be what was written
                report.without_image.append(finding.place)
                continue
            places[finding.image_hash, finding.text_hash].append(finding.place)
            images[finding.image_hash].add(finding.text_hash)
    report.repeated = [group for group in places.values() if len(group) > 1]
    report.same_image = [
        [place for text in sorted(texts) for place in places[image, text]]
        for image, texts in images.items()
        if len(texts) > 1
    ]
    report.shard_faults += _manifest_faults(shards, counts)
    return report


def _raws(
    shards: list[str], counts: dict[str, int], report: CheckReport
) -> Iterator[dict[str, Any]]:
    for shard in shards:
        repeated = frozenset() if is_remote(shard) else repeated_keys(shard)
        for raw in iterate_raw(
            [shard],
            on_error=lambda name, error: report.shard_faults.append(shard_failure(name, error)),
        ):
            counts[shard] += 1
            if raw["__key__"] in repeated:
                raw[REPEATED] = True
            yield raw


def _examine(raw: dict[str, Any]) -> _Finding:
    place = place_of(raw)
    try:
        check_key(raw)
        sample = parse_sample(raw, needs_image=has_image(raw))
        if not sample.suffix:
            require_captions(sample, raw)
            return _Finding(place, "", "", True, None)
    except SampleError as error:
        return _Finding(place, "", "", False, error.reason)
    reason = None
    try:
        decode_image(sample.image, uri=place)
    except ImageDecodeError as error:
        reason = error.reason
    text = "\0".join((*sorted(sample.captions), sample.label or ""))
    return _Finding(
        place,
        hashlib.sha256(sample.image).hexdigest(),
        hashlib.sha256(text.encode()).hexdigest(),
        bool(sample.captions) or sample.label is not None,
        reason,
    )


def _manifest_faults(shards: list[str], counts: dict[str, int]) -> Iterator[str]:
    local = [Path(shard) for shard in shards if not is_remote(shard)]
    stated: dict[Path, ShardInfo] = {}
    for folder in dict.fromkeys(path.parent for path in local):
        stated |= {folder / info.name: info for info in read_manifest(folder)}
    for path in local:
        info = stated.get(path)
        if info is None:
            if any(known.parent == path.parent for known in stated):
                yield f"{path}: {MANIFEST_NAME} does not list this shard"
            continue
        count = counts[str(path)]
        if count != info.num_samples:
            yield f"{path}: has {count} samples, {MANIFEST_NAME} says {info.num_samples}"
        elif hash_file(path) != info.sha256:
            yield f"{path}: its content is not what {MANIFEST_NAME} says"
    for path in stated:
        if path not in local and not path.is_file():
            yield f"{path}: is gone, {MANIFEST_NAME} lists it"
