"""The order in which training sees the samples: a function of the seed and the epoch alone.

Position p of an epoch belongs to batch ``p // batch_size``, and there to rank
``(p % batch_size) // (batch_size / world size)``. Any position can be read at any time, so a
resume inside an epoch needs no replay, and a worker process asks for its own rows alone.

    permutation   every sample once: all shards mixed together, or, with ``shuffle_shards: W``,
                  the shards in a random order, W of them mixed at a time
    resampled     samples drawn with replacement: the source by its weight, then the sample;
                  with ``shuffle_shards: W``, from W shards drawn at a time
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from clipsys.errors import TrainingError
from clipsys.training.data.subset import Subset

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SampleOrder:
    """Which sample stands where in each epoch.

    Attributes:
        counts: samples of each shard.
        seed: seed of every random choice.
        shuffle_shards: how many shards are mixed at a time; None mixes all.
        samples_per_epoch: with it, samples are drawn with replacement; None takes each once.
        weights: per shard, how often its samples are drawn, relative to one another; None draws
            all samples alike. For ``samples_per_epoch`` only.
        subset: for each shard the numbers of its samples that are trained on, as many as
            ``counts`` says; None takes all.
    """

    counts: tuple[int, ...]
    seed: int
    shuffle_shards: int | None = None
    samples_per_epoch: int | None = None
    weights: tuple[float, ...] | None = None
    # The caches below depend on the counts alone, and need not hash a million numbers.
    subset: Subset | None = field(default=None, repr=False, compare=False)

    @property
    def unit(self) -> str:
        """What stands at a position, in the plural."""
        return "samples"

    @property
    def num_positions(self) -> int:
        """Samples of an epoch, before the uneven end is dropped."""
        return self.samples_per_epoch or sum(self.counts)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches in an epoch.

        Raises:
            TrainingError: there is not even one.
        """
        steps = self.num_positions // batch_size
        if steps == 0:
            place = "an epoch has" if self.samples_per_epoch else "the shards hold"
            if self.subset is not None and not self.samples_per_epoch:
                place = "data.num_samples leaves"
            raise TrainingError(
                f"data.batch_size is {batch_size}, but {place} only {self.num_positions} "
                f"{self.unit}; lower it or add data"
            )
        return steps

    def fingerprint(self) -> str:
        """Equal for equal orders."""
        described = repr(self) if self.subset is None else f"{self!r}{self.subset!r}"
        return hashlib.blake2b(described.encode(), digest_size=16).hexdigest()

    def samples(self, epoch: int, first: int, last: int) -> list[tuple[int, int]]:
        """(shard, sample within the shard) at the positions from ``first`` to before ``last``."""
        found: list[tuple[int, int]] = []
        for window, start, stop in _window_bounds(self, epoch):
            if start < last and stop > first:
                numbers = _window(self, epoch, window)[max(0, first - start) : last - start]
                found += zip(*(column.tolist() for column in numbers.T), strict=True)
            if stop >= last:
                break
        if self.subset is not None:
            return [(shard, self.subset[shard][sample]) for shard, sample in found]
        return found

    def _members(self, epoch: int, window: int) -> list[int]:
        """The shards that are mixed together in a window; with replacement, some twice."""
        size = self.shuffle_shards or len(self.counts)
        if self.samples_per_epoch and self.shuffle_shards:
            # A shard is drawn in proportion to its samples and their weight.
            share = self._shares()
            chosen = _generator(self.seed, epoch, window, 1).choice(
                len(self.counts), size=size, p=share
            )
            return [int(shard) for shard in chosen]
        shuffled = _shard_order(self, epoch)
        return [int(shard) for shard in shuffled[window * size : (window + 1) * size]]

    def _shares(self) -> npt.NDArray[np.float64]:
        counts = np.asarray(self.counts, dtype=np.float64)
        weights = np.asarray(self.weights or 1.0, dtype=np.float64)
        shares: npt.NDArray[np.float64] = counts * weights / (counts * weights).sum()
        return shares


@dataclass(frozen=True)
class WindowOrder(SampleOrder):
    """The same over windows of frames, which belong to the shards of their first frames.

    Attributes:
        windows: fingerprint of the windows.
    """

    windows: str = ""

    @property
    def unit(self) -> str:
        """What stands at a position, in the plural."""
        return "windows of frames"


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of a step's augmentation and dropout, at most 64 bits, as torch takes it."""
    value = (seed * 1_000_003 + step) * 4096 + rank
    if value < 1 << 64:
        return value
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _generator(*entropy: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(entropy))


@functools.lru_cache(maxsize=4)
def _shard_order(order: SampleOrder, epoch: int) -> Ints:
    return _generator(order.seed, epoch).permutation(len(order.counts))


@functools.lru_cache(maxsize=4)
def _window_bounds(order: SampleOrder, epoch: int) -> list[tuple[int, int, int]]:
    """(window, first position, end position), gapless from 0 to `num_positions`."""
    total = order.num_positions
    if order.shuffle_shards is None:
        return [(0, 0, total)]
    if order.samples_per_epoch:
        length = max(1, round(order.shuffle_shards * sum(order.counts) / len(order.counts)))
        return [
            (window, start, min(start + length, total))
            for window, start in enumerate(range(0, total, length))
        ]
    shuffled = _shard_order(order, epoch)
    bounds = []
    start = 0
    for window, at in enumerate(range(0, len(shuffled), order.shuffle_shards)):
        stop = start + sum(order.counts[s] for s in shuffled[at : at + order.shuffle_shards])
        bounds.append((window, start, stop))
        start = stop
    return bounds


@functools.lru_cache(maxsize=2)
def _window(order: SampleOrder, epoch: int, window: int) -> Ints:
    """(N, 2): shard and sample of each position of a window."""
    _, start, stop = _window_bounds(order, epoch)[window]
    members = np.asarray(order._members(epoch, window), dtype=np.int64)
    counts = np.asarray(order.counts, dtype=np.int64)[members]
    rng = _generator(order.seed, epoch, window, 2)
    if order.samples_per_epoch is None:
        shard = np.repeat(members, counts)
        sample = np.arange(len(shard)) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.stack([shard, sample], axis=1)[rng.permutation(len(shard))]
    if order.shuffle_shards is None:
        place = rng.choice(len(members), size=stop - start, p=order._shares()[members])
    else:  # the members were drawn by their shares already
        place = rng.integers(0, len(members), size=stop - start)
    sample = np.floor(rng.random(stop - start) * counts[place]).astype(np.int64)
    return np.stack([members[place], sample], axis=1)
