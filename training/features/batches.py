"""Micro-batches of stored features, in the order that training asks for.

As `clipsys.training.data.batches`, with the same choice of captions; a sample that cannot be used
is replaced by its neighbour in the micro-batch in the same way.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from clipsys.errors import TrainingError
from clipsys.training.data.order import SampleOrder
from clipsys.training.data.samples import Batch, Positives, Skipped, caption_choice, view_choice
from clipsys.training.data.shard_set import ShardSet
from clipsys.training.features.store import BlockStore, Halves

Ints = npt.NDArray[np.int64]


class BatchShape(NamedTuple):
    """Which rows of a step a rank has, and in how many parts.

    Attributes:
        batch_size: rows of a step, of all ranks.
        micro_batch_size: rows of a part.
        rank: this rank.
        world_size: number of ranks.
    """

    batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int


class FeatureTable:
    """All stored features of a data set, by sample."""

    def __init__(
        self,
        images: BlockStore,
        texts: BlockStore,
        numbers: npt.ArrayLike,
        *,
        views: int,
        shard_set: ShardSet,
    ) -> None:
        """
        Args:
            images: features of the views.
            texts: features of the captions.
            numbers: of the samples, among all of the shards, in the order of the blocks.
            views: V.
            shard_set: where the samples lie.
        """
        self._views = views
        self._numbers = np.asarray(numbers, np.int64)
        self._shards = shard_set.shards
        self._first = np.array([0, *itertools.accumulate(shard_set.counts)], np.int64)
        image_info = [images.info(number) for number in range(images.num_blocks)]
        text_info = [texts.info(number) for number in range(texts.num_blocks)]
        joined = {
            name: np.concatenate([info[name] for info in image_info])
            for name in ("groups", "reasons", "keys")
        }
        of_texts = {
            name: np.concatenate([info[name] for info in text_info])
            for name in ("counts", "captions", "labels", "reasons", "keys")
        }
        self.image_groups: Ints = joined["groups"]
        self.label_groups: Ints = of_texts["labels"]
        self.caption_groups: Ints = of_texts["captions"]
        self.counts: Ints = of_texts["counts"]
        self.starts: Ints = np.concatenate([[0], np.cumsum(self.counts)])
        self.reasons = np.where(joined["reasons"] != "", joined["reasons"], of_texts["reasons"])
        self.keys = np.where(joined["keys"] != "", joined["keys"], of_texts["keys"])
        has_image = joined["reasons"] == ""
        self._image_rows: Ints = np.cumsum(has_image) - has_image
        self._images = _Rows(images)
        self._texts = _Rows(texts)

    def places(self, numbers: Ints) -> Ints:
        """The rows of samples by their numbers."""
        return np.searchsorted(self._numbers, numbers)

    def shard_of(self, number: int) -> str:
        """The shard that a sample is in."""
        return self._shards[int(np.searchsorted(self._first, number, side="right")) - 1]

    def number(self, shard: int, index: int) -> int:
        """The number of a sample of a shard among all samples."""
        return int(self._first[shard]) + index

    def image_features(self, places: Ints, views: Ints) -> Halves:
        """(B, F) of one view of each sample."""
        return self._images.take(self._image_rows[places] * self._views + views)

    def text_inputs(self, rows: Ints) -> torch.Tensor:
        """Of captions by their number among all: features (B, F), or int64 tokens (B, L)."""
        found = torch.from_numpy(self._texts.take(rows))
        return found if found.is_floating_point() else found.long()


class _Rows:
    """The rows of a store as if its blocks were one array."""

    def __init__(self, store: BlockStore) -> None:
        self._blocks = [store.features(number) for number in range(store.num_blocks)]
        self._starts = np.array([0, *itertools.accumulate(map(len, self._blocks))], np.int64)
        self.width = max(block.shape[1] for block in self._blocks)

    def take(self, rows: Ints) -> Halves:
        found = np.empty((len(rows), self.width), self._blocks[0].dtype)
        blocks = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(blocks):
            own = blocks == number
            found[own] = self._blocks[number][rows[own] - self._starts[number]]
        return found


class FeatureBatches:
    """This rank's micro-batches of features from a step on to the end of the run."""

    def __init__(
        self,
        table: FeatureTable,
        order: SampleOrder,
        shape: BatchShape,
        *,
        views: int,
        captions: Literal["first", "random"],
        positives: Positives,
        seed: int,
        epochs: int,
    ) -> None:
        self._table, self._order, self._shape = table, order, shape
        self._views, self._captions, self._positives = views, captions, positives
        self._seed = seed
        self._steps_per_epoch = order.steps_per_epoch(shape.batch_size)
        self._total_steps = self._steps_per_epoch * epochs

    def from_step(self, start_step: int) -> Generator[Batch, None, None]:
        """In order."""
        shape = self._shape
        share = shape.batch_size // shape.world_size
        for step in range(start_step, self._total_steps):
            epoch, within = divmod(step, self._steps_per_epoch)
            first = within * shape.batch_size + shape.rank * share
            for offset in range(0, share, shape.micro_batch_size):
                start = first + offset
                yield self._batch(step, epoch, start, start + shape.micro_batch_size)

    def _batch(self, step: int, epoch: int, first: int, last: int) -> Batch:
        table = self._table
        found = self._order.samples(epoch, first, last)
        numbers = np.array([table.number(*place) for place in found], np.int64)
        places = table.places(numbers)
        positions = np.arange(first, last)
        usable = table.reasons[places] == ""
        skipped = tuple(
            Skipped(table.shard_of(int(numbers[row])), str(table.keys[place]) or "?",
                    str(table.reasons[place]))
            for row, place in enumerate(places)
            if not usable[row]
        )  # fmt: skip
        if not usable.any():
            bad = skipped[0]
            raise TrainingError(
                f"step {step}: none of the {len(places)} samples of this rank can be used; first: "
                f"{bad.shard}#{bad.key}: {bad.reason}"
            )
        # Each that cannot be used becomes the usable one before it, or the first one.
        filled = np.maximum.accumulate(np.where(usable, np.arange(len(places)), -1))
        filled[filled < 0] = int(np.argmax(usable))
        places, numbers, positions = places[filled], numbers[filled], positions[filled]
        rows = table.starts[places] + self._chosen_captions(epoch, positions, table.counts[places])
        views = self._chosen_views(epoch, positions)
        return Batch(
            keys=tuple(str(key) for key in table.keys[places]),
            image_BCHW=torch.from_numpy(table.image_features(places, views)),
            texts=(table.text_inputs(rows),),
            groups_B=torch.from_numpy(self._groups(places, numbers, rows)),
            samples_B=torch.from_numpy(numbers),
            skipped=skipped,
            shards=tuple(table.shard_of(int(number)) for number in numbers),
            is_encoded=True,
        )

    def _chosen_captions(self, epoch: int, positions: Ints, counts: Ints) -> Ints:
        if self._captions == "first":
            return np.zeros(len(positions), np.int64)
        return np.array(
            [
                caption_choice(self._seed, epoch, position, count)
                for position, count in zip(positions, counts, strict=True)
            ],
            np.int64,
        )

    def _chosen_views(self, epoch: int, positions: Ints) -> Ints:
        drawn = (view_choice(self._seed, epoch, position, self._views) for position in positions)
        return np.fromiter(drawn, np.int64, len(positions))

    def _groups(self, places: Ints, numbers: Ints, rows: Ints) -> Ints:
        table = self._table
        if self._positives == "image":
            return table.image_groups[places]
        if self._positives == "label":
            return table.label_groups[places]
        if self._positives == "caption":
            return table.caption_groups[rows]
        return numbers
