"""Ordered frames: windows of consecutive frames, made from an index in the samples' metadata.

At the start of a run the first rank reads the metadata of all samples once, nothing else of them.
Frames of one sequence are put in the order of their index; every frame that has enough followers
begins a window. A window belongs to the shard of its first frame, so that the order of windows is
an order of samples like any other (`clipsys.training.data.order`).

Shapes: X windows, T frames of each.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from clipsys.errors import DataError, SampleError
from clipsys.progress import progress
from clipsys.shards.random_access import MAX_OPEN, ShardReader
from clipsys.shards.remote import ShardCache
from clipsys.shards.sample_texts import parse_metadata
from clipsys.training.data.config import FramesConfig
from clipsys.training.data.shard_set import ShardSet

_logger = logging.getLogger(__name__)

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class FrameWindows:
    """Windows of frames, sorted by the shard and the number of their first one.

    Attributes:
        samples_XT: int64; the numbers of the frames among all samples of the shards.
        counts: windows of each shard.
        sample_counts: samples of each shard.
    """

    samples_XT: Integers
    counts: tuple[int, ...]
    sample_counts: tuple[int, ...]

    @property
    def num_windows(self) -> int:
        """Windows of all shards."""
        return len(self.samples_XT)

    @property
    def length(self) -> int:
        """Frames of a window."""
        return int(self.samples_XT.shape[1])

    @cached_property
    def _first_windows(self) -> Integers:
        return np.cumsum((0, *self.counts[:-1]))

    @cached_property
    def _first_samples(self) -> Integers:
        return np.cumsum((0, *self.sample_counts[:-1]))

    def number(self, shard: int, window: int) -> int:
        """The number among all windows of one within a shard."""
        return int(self._first_windows[shard]) + window

    def frames(self, shard: int, window: int) -> list[tuple[int, int]]:
        """(shard, sample within the shard) of each frame of a window."""
        samples_T = self.samples_XT[self.number(shard, window)]
        # Shards without samples begin where the next one begins; the last of equal starts is meant.
        shards_T = np.searchsorted(self._first_samples, samples_T, side="right") - 1
        within_T = samples_T - self._first_samples[shards_T]
        return list(zip(shards_T.tolist(), within_T.tolist(), strict=True))

    def fingerprint(self) -> str:
        """Equal for equal windows."""
        return hashlib.blake2b(self.samples_XT.tobytes(), digest_size=16).hexdigest()


def read_windows(config: FramesConfig, shard_set: ShardSet, cache: ShardCache) -> FrameWindows:
    """Reads the metadata of all samples and makes windows.

    Raises:
        DataError: a sample has no sequence or no index, two frames of a sequence have the same
            index, or no sequence is long enough.
    """
    reader = ShardReader(shard_set.shards, shard_set.counts, cache=cache, max_open=MAX_OPEN)
    sequences: dict[str, list[tuple[float, int]]] = defaultdict(list)
    with progress("Reading the frames' metadata", shard_set.num_samples) as advance:
        for number, (place, metadata) in enumerate(_metadata(shard_set, reader)):
            sequence, index = _position(config, place, metadata)
            sequences[sequence].append((index, number))
            advance(1)
    reader.close()
    windows, short = [], 0
    span = (config.length - 1) * config.stride + 1
    for sequence, frames in sequences.items():
        frames.sort()
        for (index, _), (following, _) in itertools.pairwise(frames):
            if index == following:
                raise DataError(
                    f"data.frames: sequence {sequence!r} has several frames with the "
                    f"{config.index} {index:g}; give each frame of a sequence an index of its own"
                )
        short += len(frames) < span
        numbers = [number for _, number in frames]
        windows += [
            numbers[first : first + span : config.stride]
            for first in range(len(numbers) - span + 1)
        ]
    if not windows:
        longest = max(map(len, sequences.values()))
        raise DataError(
            f"data.frames: a window of length {config.length} and stride {config.stride} spans "
            f"{span} frames, and the longest sequence has {longest}; lower data.frames.length or "
            "data.frames.stride"
        )
    if short:
        _logger.warning(
            "%d of %d sequences have fewer than the %d frames of a window, and are left out",
            short,
            len(sequences),
            span,
        )
    return _sorted_by_shard(np.asarray(windows, dtype=np.int64), shard_set.counts)


def _sorted_by_shard(windows_XT: Integers, counts: tuple[int, ...]) -> FrameWindows:
    windows_XT = windows_XT[np.argsort(windows_XT[:, 0], kind="stable")]
    ends = np.cumsum(counts)
    below = np.searchsorted(windows_XT[:, 0], ends, side="left")
    return FrameWindows(windows_XT, tuple(np.diff(below, prepend=0).tolist()), counts)


def _metadata(shard_set: ShardSet, reader: ShardReader) -> Iterator[tuple[str, dict[str, Any]]]:
    """The place and the metadata of each sample, in the order of the shards."""
    for shard, (name, count) in enumerate(zip(shard_set.shards, shard_set.counts, strict=True)):
        for sample in range(count):
            place = f"{name}, sample {sample}"
            data = reader.member(shard, sample, "json")
            try:
                yield place, {} if data is None else parse_metadata(data)
            except SampleError as error:
                raise DataError(f"data.frames: {place}: {error}") from error


def _position(config: FramesConfig, place: str, metadata: dict[str, Any]) -> tuple[str, float]:
    """The sequence of a frame, and its index there."""
    for setting, key in (("sequence", config.sequence), ("index", config.index)):
        if metadata.get(key) is None:
            has: Sequence[str] = sorted(metadata)
            raise DataError(
                f"data.frames.{setting}: {place} has no metadata key {key!r}; it has "
                f"{', '.join(has) or 'none'}; `clipsys shards FOLDER OUT --frames` writes "
                "sequence and frame"
            )
    index = metadata[config.index]
    is_number = isinstance(index, int | float) and not isinstance(index, bool)
    if not is_number or not math.isfinite(index):
        raise DataError(
            f"data.frames.index: {place}: {config.index} is {index!r}; expected a number"
        )
    return str(metadata[config.sequence]), index
