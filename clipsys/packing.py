"""Packing a corpus into shards."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clipsys.errors import DataError, ImageDecodeError
from clipsys.images import decode_image
from clipsys.progress import Advance, progress
from clipsys.shard_manifest import ShardInfo
from clipsys.shard_writing import DEFAULT_SHARD_BYTES, write_shards
from clipsys.shards import Sample
from clipsys.sources import Columns, Record, iterate_source, to_sample


@dataclass(frozen=True)
class PackReport:
    """What was packed.

    Attributes:
        shards: one entry per shard written.
        skipped: how many images could not be used, by reason.
    """

    shards: list[ShardInfo]
    skipped: dict[str, int]


def pack(
    source: str | Path,
    out: str | Path,
    *,
    prefix: str = "shard",
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    shuffle_seed: int | None = None,
    columns: Columns = Columns(),
) -> PackReport:
    """Packs a folder, a table or shards into WebDataset shards with a manifest.

    Images keep their bytes; each is decoded once, so that none that cannot be used gets in.

    Args:
        source: what `clipsys.sources.iterate_source` reads.
        out: folder for the shards.
        prefix: shards are named ``PREFIX-00000.tar`` and onwards.
        shard_bytes: a new shard is begun when one has grown to this size.
        shuffle_seed: order of the samples; None keeps the order of the source.
        columns: what a table's columns mean.

    Raises:
        DataError: the source cannot be read, none of its images can be used, or the folder already
            has shards of this prefix.
    """
    records = list(iterate_source(source, columns=columns))
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(records)
    skipped: Counter[str] = Counter()
    with progress("Packing", len(records)) as advance:
        written = write_shards(
            _samples(records, skipped, advance), out, prefix=prefix, shard_bytes=shard_bytes
        )
    if not written:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        raise DataError(f"{source}: none of the {len(records)} images can be used ({reasons})")
    return PackReport(written, dict(skipped))


def _samples(records: list[Record], skipped: Counter[str], advance: Advance) -> Iterator[Sample]:
    digits = max(6, len(str(len(records))))
    for number, record in enumerate(records):
        advance()
        try:
            sample = to_sample(record, f"{number:0{digits}d}")
            decode_image(sample.image, uri=record.uri)
        except ImageDecodeError as error:
            skipped[error.reason] += 1
            continue
        except DataError:
            skipped["unreadable"] += 1
            continue
        yield sample
