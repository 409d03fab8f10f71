"""The order that a recipe's ``data`` section asks for: of samples, of a few, or of windows."""

from __future__ import annotations

from clipsys.errors import TrainingError
from clipsys.shards.counting import count_shards
from clipsys.shards.remote import is_remote
from clipsys.training.data.config import DataConfig
from clipsys.training.data.frames import FrameWindows
from clipsys.training.data.order import SampleOrder, WindowOrder
from clipsys.training.data.shard_set import MIXED_REMOTE_SHARDS, ShardSet
from clipsys.training.data.subset import Subset

#: How many shards are looked at for the reason why there are few samples.
_FEW_SHARDS = 4


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
