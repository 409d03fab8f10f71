"""The input pipeline: shards -> order -> decoded micro-batches, the same ones every time.

    clipsys.shards.random_access  finds the samples in each tar and reads any of them
    data.shard_set finds and counts the shards
    data.order     says which sample stands at which position of an epoch
    data.batches   cuts positions into micro-batches: number n is a pure function of the recipe,
                   n and the rank
    data.samples   decodes one sample
    data.further_texts  finds texts of a sample beside its caption
    data.frames    makes windows of ordered frames, which then stand in the place of samples
    data.loader    runs it all in worker processes

So the order depends on the seed and the epoch, never on the number of workers or on timing; all
ranks make the same number of steps; and a resume at any step asks for the numbers that are missing.

Why not webdataset's own pipeline: it streams, and a stream can be shuffled only within a buffer,
gives each worker whole shards (none, where there are fewer shards than workers), counts its epoch
per worker, and is resumed by replay. Its format, its grouping of members into samples and its tar
writer are what is used here; the samples are read where they lie, each by the one worker that
decodes it.

An uneven end of an epoch is dropped, on every rank alike, and another one each epoch. It cannot be
padded exactly: a row that is repeated enters every softmax sum twice. A sample that cannot be used
is replaced by its neighbour in the micro-batch, whose group id it shares, so that the twin is no
negative.
"""

from __future__ import annotations

import bisect
import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from torch.utils.data import Dataset

from clipsys.errors import DataError, TrainingError
from clipsys.shards.random_access import MAX_OPEN, ShardReader
from clipsys.shards.remote import ShardCache, is_remote
from clipsys.training.data.frames import FrameWindows
from clipsys.training.data.order import SampleOrder
from clipsys.training.data.pixel_cache import make_cache
from clipsys.training.data.samples import (
    NO_GROUP,
    Batch,
    DecodedImage,
    Decoder,
    FurtherTexts,
    Row,
    Skipped,
    skip_reason,
)
from clipsys.training.data.shard_set import MIXED_REMOTE_SHARDS, ShardSet
from clipsys.training.data.subset import Subset

T = TypeVar("T")

#: Bytes of a sample in a batch beside its image: tokens, ids, names.
_OTHER_BYTES = 2048
#: The number of a row that no sample stands behind.
NO_SAMPLE = -1


class TrainingBatches(Dataset[Batch]):
    """This rank's micro-batches of all remaining epochs, by number.

    Each step has batch_size / world_size / micro_batch_size of them.
    """

    def __init__(
        self,
        shard_set: ShardSet,
        order: SampleOrder,
        decoder: Decoder,
        *,
        windows: FrameWindows | None = None,
        cache: ShardCache | None = None,
        pixel_cache_bytes: int = 0,
        batch_size: int,
        micro_batch_size: int | None = None,
        rank: int,
        world_size: int,
        epochs: int,
        start_step: int = 0,
    ) -> None:
        self._shards = shard_set.shards
        # An open copy takes up space on the drive after it has been removed: few for remote shards.
        remote = any(is_remote(shard) for shard in shard_set.shards)
        self._reader = ShardReader(
            shard_set.shards,
            shard_set.counts,
            cache=cache,
            max_open=MIXED_REMOTE_SHARDS if remote else MAX_OPEN,
        )
        starts = itertools.accumulate(shard_set.counts, initial=0)
        self._first_numbers = tuple(starts)
        self._pixels = None
        #: Of a subset, where each sample's image lies in the cache.
        self._cache_rows: dict[int, int] | None = None
        if epochs > 1 and decoder.needs_image:
            self._cache_rows = _numbered(order.subset, self._first_numbers)
            num_images = shard_set.num_samples
            self._pixels = make_cache(
                num_images if self._cache_rows is None else len(self._cache_rows),
                decoder.preprocessing.size,
                limit_bytes=pixel_cache_bytes,
            )
        self._order = order
        self._windows = windows
        self._decoder = decoder
        self._batch_size = batch_size
        self._local_size = batch_size // world_size
        self._micro_size = micro_batch_size or self._local_size
        self._micro_steps = self._local_size // self._micro_size
        self._rank = rank
        self._steps_per_epoch = order.steps_per_epoch(batch_size)
        self._start_step = start_step
        self._remaining_steps = max(0, self._steps_per_epoch * epochs - start_step)

    def between(
        self, start_step: int, epochs: int, further: FurtherTexts | None
    ) -> TrainingBatches:
        """The same data from a step on to the end of an epoch, with other texts beside captions.

        Both share the decoded images that are stored.
        """
        other = copy.copy(self)
        other._decoder = replace(self._decoder, further=further)
        other._start_step = start_step
        other._remaining_steps = max(0, self._steps_per_epoch * epochs - start_step)
        return other

    def shares(self, draw: int, batch_size: int, rank: int, world_size: int) -> SampleShare:
        """Every sample once, divided among ranks; see `SampleShare`."""
        return SampleShare(self, draw, batch_size, rank, world_size)

    @property
    def batch_bytes(self) -> int:
        """Size of a micro-batch, nearly: images, and a little for tokens and the rest."""
        height, width = self._decoder.preprocessing.size
        pixels = 3 * height * width * self._decoder.needs_image
        if self._windows is not None:
            pixels *= self._windows.length
        others = 1 if self._decoder.further is None else 1 + self._decoder.further.count
        return self._micro_size * (pixels + others * _OTHER_BYTES)

    def __len__(self) -> int:
        return self._remaining_steps * self._micro_steps

    def __iter__(self) -> Iterator[Batch]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Batch:
        """Micro-batch ``number``, counted from the first one of ``start_step``.

        Raises:
            TrainingError: none of its samples can be used, nor any of those that follow.
        """
        done, part = divmod(number, self._micro_steps)
        step = self._start_step + done
        epoch, step_in_epoch = divmod(step, self._steps_per_epoch)
        first = step_in_epoch * self._batch_size + self._rank * self._local_size
        first += part * self._micro_size
        rows, skipped = self._rows(epoch, first, first + self._micro_size)
        usable = [row for row in rows if row is not None]
        if not usable:
            usable = [self._any_row(epoch, first + self._micro_size, step, skipped[0])]
        filled: list[Row] = []
        for row in rows:
            filled.append(row or (filled[-1] if filled else usable[0]))
        return self._decoder.batch(filled, skipped)

    def _rows(self, epoch: int, first: int, last: int) -> tuple[list[Row | None], list[Skipped]]:
        """The decoded samples of some positions; None for each that cannot be used."""
        rows: list[Row | None] = []
        skipped: list[Skipped] = []
        for position, (shard, index) in enumerate(self._order.samples(epoch, first, last), first):
            if self._windows is None:
                place, *rest = [(shard, index)]
                number = self._first_numbers[shard] + index
            else:
                place, *rest = self._windows.frames(shard, index)
                number = self._windows.number(shard, index)
            make = partial(self._row, place, epoch, position, number)
            row = self._attempt(place, skipped, make)
            if row is not None and rest:
                frames = [self._attempt(one, skipped, partial(self._frame, one)) for one in rest]
                later = tuple(frame for frame in frames if frame is not None)
                row = replace(row, later=later) if len(later) == len(rest) else None
            rows.append(row)
        return rows, skipped

    def _attempt(
        self, place: tuple[int, int], skipped: list[Skipped], make: Callable[[dict[str, Any]], T]
    ) -> T | None:
        """What is made of the sample at a place; where it cannot be used, None and a note."""
        shard, sample = place
        key = f"sample {sample}"
        try:
            raw = self._reader.read(shard, sample)
            key = str(raw["__key__"])
            return make(raw)
        except DataError as error:
            skipped.append(Skipped(self._shards[shard], key, skip_reason(error)))
            return None

    def _row(
        self, place: tuple[int, int], epoch: int, position: int, number: int, raw: dict[str, Any]
    ) -> Row:
        known = self._known(place)
        row = self._decoder.row(raw, epoch, position, known, number=number)
        if known is None and row.image is not None:
            self._keep(place, row.image)
        return row

    def _frame(self, place: tuple[int, int], raw: dict[str, Any]) -> DecodedImage:
        known = self._known(place)
        if known is None:
            known = self._decoder.frame(raw)
            self._keep(place, known)
        return known

    def _known(self, place: tuple[int, int]) -> DecodedImage | None:
        return None if self._pixels is None else self._pixels.get(self._cache_row(place))

    def _keep(self, place: tuple[int, int], image: DecodedImage) -> None:
        if self._pixels is not None:
            self._pixels.put(self._cache_row(place), image)

    def _cache_row(self, place: tuple[int, int]) -> int:
        shard, sample = place
        number = self._first_numbers[shard] + sample
        return number if self._cache_rows is None else self._cache_rows[number]

    @property
    def decoder(self) -> Decoder:
        """What makes rows of samples."""
        return self._decoder

    @property
    def sample_numbers(self) -> Sequence[int]:
        """The samples that are trained on, by their numbers among all of the shards."""
        return _member_numbers(self._order.subset, self._first_numbers)

    def sample_row(self, number: int, draw: int, skipped: list[Skipped]) -> Row | None:
        """One sample by its number; None, with a note, where it cannot be used."""
        shard = bisect.bisect_right(self._first_numbers, number) - 1
        place = shard, number - self._first_numbers[shard]
        # Positions of training are not negative: the captions are drawn apart from theirs.
        return self._attempt(place, skipped, partial(self._row, place, draw, -1 - number, number))

    def _any_row(self, epoch: int, after: int, step: int, bad: Skipped) -> Row:
        """The first usable sample that follows, for a micro-batch that has none."""
        total = self._order.num_positions
        for position in range(after, after + self._batch_size):
            (row,), _ = self._rows(epoch, position % total, position % total + 1)
            if row is not None:
                return row
        raise TrainingError(
            f"step {step}: none of the {self._micro_size} samples of this rank can be used; "
            f"first: {bad.shard}#{bad.key}: {bad.reason}"
        )


class SampleShare(Dataset[Batch]):
    """This rank's share of all samples, in the order of their numbers, in batches of equal size.

    Rank r of W has the samples r, r + W, …. Every rank has the same number of batches, and these
    have the same number of rows: one that cannot be used, or that there is none for, is an empty
    image with an empty text, and its number is `NO_SAMPLE`.
    """

    def __init__(
        self, batches: TrainingBatches, draw: int, batch_size: int, rank: int, world_size: int
    ) -> None:
        """
        Args:
            batches: where the samples come from; texts beside the caption are left out.
            draw: decides, with the seed, which caption of a sample is used.
            batch_size: rows of a batch.
            rank: this rank.
            world_size: number of ranks.
        """
        self._batches = batches.between(0, 0, None)
        self._draw, self._size = draw, batch_size
        self._rank, self._world_size = rank, world_size
        self._numbers = batches.sample_numbers

    @property
    def batch_bytes(self) -> int:
        """Size of a batch, nearly."""
        return self._batches.batch_bytes * self._size // self._batches._micro_size + 1

    def __len__(self) -> int:
        return math.ceil(len(self._numbers) / (self._size * self._world_size))

    def __iter__(self) -> Iterator[Batch]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Batch:
        """Batch ``number``."""
        first = number * self._size * self._world_size + self._rank
        places = range(first, first + self._size * self._world_size, self._world_size)
        skipped: list[Skipped] = []
        rows = [
            self._batches.sample_row(self._numbers[place], self._draw, skipped)
            if place < len(self._numbers)
            else None
            for place in places
        ]
        return self._batches.decoder.batch([row or self._empty() for row in rows], skipped)

    def _empty(self) -> Row:
        decoder = self._batches.decoder
        pixels = np.zeros((3, *decoder.preprocessing.size), np.uint8)
        return Row("", "", DecodedImage(pixels, 0), ("",), NO_GROUP, NO_SAMPLE)


def sample_numbers(order: SampleOrder, shard_set: ShardSet) -> Sequence[int]:
    """The samples that are trained on, by their numbers among all of the shards, ascending."""
    starts = tuple(itertools.accumulate(shard_set.counts, initial=0))
    return sorted(_member_numbers(order.subset, starts))


def _member_numbers(subset: Subset | None, first_numbers: Sequence[int]) -> Sequence[int]:
    members = _numbered(subset, first_numbers)
    return range(first_numbers[-1]) if members is None else tuple(members)


def _numbered(subset: Subset | None, first_numbers: Sequence[int]) -> dict[int, int] | None:
    """The place within a subset of each of its samples, by its number among all samples."""
    if subset is None:
        return None
    numbers = (
        first + sample
        for first, of_shard in zip(first_numbers, subset, strict=False)
        for sample in of_shard
    )
    return {number: place for place, number in enumerate(numbers)}
