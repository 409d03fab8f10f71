"""The shards of a run: found and counted."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipsys.shards.counting import count_shards, stated_counts
from clipsys.shards.reading import expand_shards
from clipsys.shards.remote import is_remote
from clipsys.training.data.config import DataConfig
from clipsys.training.data.samples import Skipped

_logger = logging.getLogger(__name__)

#: How many remote shards are mixed at a time unless data.shuffle_shards is set.
MIXED_REMOTE_SHARDS = 8


@dataclass(frozen=True)
class ShardSet:
    """Shards with their sizes, so that the length of an epoch is known before it starts.

    Attributes:
        shards: paths.
        counts: samples of each.
        sources: for each, the number of the source that it belongs to.
        faults: samples at which a shard breaks off.
        warnings: what looks wrong with the names in the shards.
    """

    shards: tuple[str, ...]
    counts: tuple[int, ...]
    sources: tuple[int, ...]
    faults: tuple[Skipped, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return sum(self.counts)

    def name_fingerprint(self) -> str:
        """Equal for shards of equal names in the same order, wherever they lie."""
        return _digest([shard.rpartition("/")[2] for shard in self.shards])

    def size_fingerprint(self) -> str:
        """Equal for shards of equal sizes in the same order; empty where one is remote."""
        if any(map(is_remote, self.shards)):
            return ""
        return _digest([Path(shard).stat().st_size for shard in self.shards])


def _digest(values: list[Any]) -> str:
    return hashlib.blake2b(repr(values).encode(), digest_size=16).hexdigest()


def open_shards(config: DataConfig) -> ShardSet:
    """Finds and counts shards: from their manifest where there is one, else from their headers.

    Raises:
        DataError: there are none, or one is not a tar file.
    """
    expanded = [
        # Absolute: ranks may run in other folders.
        (shard if is_remote(shard) else str(Path(shard).absolute()), number)
        for number, source in enumerate(config.sources)
        for shard in expand_shards(source.shards)
    ]
    known = stated_counts([shard for shard, _ in expanded])
    unknown = list(dict.fromkeys(shard for shard, _ in expanded if shard not in known))
    if any(is_remote(shard) for shard in unknown):
        _logger.info("remote shards without a shards.json beside them are read once to be counted")
    counted = count_shards(unknown, config.shard_cache) if unknown else {}
    faults = []
    warnings: list[str] = []
    for shard, summary in counted.items():
        known[shard] = summary.num_samples
        warnings += summary.warnings
        if summary.fault:
            _logger.warning("%s; its first %d samples are used", summary.fault, known[shard])
            faults.append(Skipped(shard, summary.broken_key or "?", "truncated shard"))
    if warnings:
        more = f" (and {len(warnings) - 1} more shards)" if len(warnings) > 1 else ""
        _logger.warning("%s%s", warnings[0], more)
    shards, sources = zip(*expanded, strict=True)
    counts = tuple(known[shard] for shard in shards)
    return ShardSet(shards, counts, sources, tuple(faults), tuple(warnings))
