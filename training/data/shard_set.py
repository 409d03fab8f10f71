"""The shards of a run: found, counted, and the order of their samples."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipsys.errors import TrainingError
from clipsys.shards.counting import count_shards, stated_counts
from clipsys.shards.reading import expand_shards
from clipsys.shards.remote import is_remote
from clipsys.training.data.config import DataConfig
from clipsys.training.data.order import SampleOrder, WindowOrder
from clipsys.training.data.samples import Skipped
from clipsys.training.data.subset import Subset

if TYPE_CHECKING:
    from clipsys.training.data.frames import FrameWindows

_logger = logging.getLogger(__name__)

#: How many remote shards are mixed at a time unless data.shuffle_shards is set.
MIXED_REMOTE_SHARDS = 8
#: How many shards are looked at for the reason why there are few samples.
_FEW_SHARDS = 4


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


def sample_order(
    config: DataConfig,
    shard_set: ShardSet,
    seed: int,
    windows: FrameWindows | None = None,
    subset: Subset | None = None,
) -> SampleOrder:
    """The order that a ``data`` section asks for: of samples, of a few, or of windows of frames."""
    weights = None
    counts = shard_set.counts if windows is None else windows.counts
    if subset is not None:
        counts = tuple(map(len, subset))
    if any(source.weight for source in config.sources):
        totals = [0] * len(config.sources)
        for source, count in zip(shard_set.sources, counts, strict=True):
            totals[source] += count
        # A weight is a source's share of what is drawn, however many samples it has.
        weights = tuple(
            (config.sources[s].weight or 0.0) / max(1, totals[s]) for s in shard_set.sources
        )
    drawn = (config.samples_per_epoch or sum(counts)) if config.resampled else None
    mixed = config.shuffle_shards
    if mixed is None and any(is_remote(shard) for shard in shard_set.shards):
        mixed = MIXED_REMOTE_SHARDS
    if windows is not None:
        return WindowOrder(counts, seed, mixed, drawn, weights, windows=windows.fingerprint())
    order = SampleOrder(counts, seed, mixed, drawn, weights, subset)
    if order.num_positions < config.batch_size and not config.resampled and subset is None:
        _check_names(shard_set, config)
    return order


def _check_names(shard_set: ShardSet, config: DataConfig) -> None:
    """Raises where the names in the shards are the reason why there are so few samples."""
    warnings = shard_set.warnings
    if not warnings:  # counted by a manifest; few samples are read in no time
        summaries = count_shards(shard_set.shards[:_FEW_SHARDS], config.shard_cache)
        warnings = tuple(text for summary in summaries.values() for text in summary.warnings)
    if warnings:
        raise TrainingError(
            f"data.batch_size is {config.batch_size}, but the shards hold only "
            f"{shard_set.num_samples} samples: {warnings[0]}"
        )
