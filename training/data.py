"""The input pipeline: shards -> shuffled samples -> decoded batches, the same order every time.

    every worker   streams the epoch's shards with webdataset, in an order drawn from (seed, epoch),
                   through a shuffle buffer, and numbers the samples as they come
    sample i       belongs to batch i // batch_size, and there to rank (i % batch_size) // B
    batch b        is decoded by worker b % workers of each rank; torch's DataLoader takes batches
                   from the workers in turn

So the order depends on the seed and the epoch, never on the number of workers or on timing, all
ranks make the same number of steps, and an uneven end is dropped on every rank alike. A sample that
cannot be used is replaced by its neighbour in the batch, whose group id it shares: the batch stays
full, and the twin is not taken for a negative.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import multiprocessing
import os
import random
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from clipsys.config import Settings
from clipsys.errors import ClipsysError, DataError, TrainingError
from clipsys.images import DEFAULT_MAX_PIXELS, decode_image
from clipsys.models import Tokenizer
from clipsys.preprocessing import Preprocessing
from clipsys.progress import progress
from clipsys.shards import (
    Sample,
    count_samples,
    expand_shards,
    iterate_raw,
    parse_sample,
    read_manifest,
)

_logger = logging.getLogger(__name__)

Positives = Literal["pair", "image", "caption", "label"]


class DataConfig(Settings):
    """What is trained on."""

    train: str | list[str] = Field(description="shards: folder, glob, {000..012} range or list")
    validation: str | list[str] | None = Field(None, description="shards for evaluation")
    batch_size: PositiveInt = Field(256, description="pairs contrasted together, across all ranks")
    micro_batch_size: PositiveInt | None = Field(
        None,
        description="pairs that pass the encoders at once, on each rank; smaller ones need less "
        "memory and a second forward pass, and change no result; default the rank's whole share",
    )
    workers: NonNegativeInt = Field(2, description="decoding processes per rank")
    shuffle_buffer: PositiveInt = Field(2000, description="samples shuffled together")
    cache_mb: NonNegativeInt = Field(
        256, description="training data of up to this size stay in memory, once per worker"
    )
    captions: Literal["first", "random"] = Field(
        "random", description="which caption of a sample is used each time it is seen"
    )
    label_key: str | None = Field(
        None, description="metadata key that is the label, for objective.positives: label"
    )
    load_size: PositiveInt | None = Field(
        None, description="pixels per side that reach the device; default the model's image size"
    )
    max_bad_share: float = Field(
        0.01, ge=0, le=1, description="share of unusable samples at which the run stops"
    )
    max_image_pixels: PositiveInt = Field(
        DEFAULT_MAX_PIXELS, description="images that claim more are refused before decoding"
    )


@dataclass(frozen=True)
class Skipped:
    """A sample that could not be used: where it is, and why."""

    shard: str
    key: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """One rank's part of a batch, or one micro-batch of it.

    Attributes:
        keys: (B,) sample keys.
        image_BCHW: uint8, not yet augmented or normalised.
        tokens_BL: int64, padded to the model's context length.
        groups_B: int64; equal ids are positives of each other.
        skipped: samples of this batch that were replaced by a neighbour.
    """

    keys: tuple[str, ...]
    image_BCHW: torch.Tensor
    tokens_BL: torch.Tensor
    groups_B: torch.Tensor
    skipped: tuple[Skipped, ...] = ()

    def pin_memory(self) -> Batch:
        """Called by torch's DataLoader, for fast copies to a GPU."""
        return replace(
            self,
            image_BCHW=self.image_BCHW.pin_memory(),
            tokens_BL=self.tokens_BL.pin_memory(),
            groups_B=self.groups_B.pin_memory(),
        )


@dataclass(frozen=True)
class ShardSet:
    """Shards with their sizes, so that the length of an epoch is known before it starts."""

    shards: tuple[str, ...]
    counts: tuple[int, ...]

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return sum(self.counts)

    def size_bytes(self) -> int:
        """Size of all shards; 0 where one is remote and its size not known."""
        if any("://" in shard for shard in self.shards):
            return 0
        return sum(Path(shard).stat().st_size for shard in self.shards)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches in an epoch.

        Raises:
            TrainingError: there is not even one.
        """
        steps = self.num_samples // batch_size
        if steps == 0:
            raise TrainingError(
                f"data.batch_size is {batch_size}, but the shards hold only {self.num_samples} "
                "samples; lower it or add data"
            )
        return steps


def open_shards(spec: str | list[str]) -> ShardSet:
    """Finds and counts shards: from their manifest where there is one, else by reading them.

    Raises:
        DataError: there are none, or one is not a tar file.
    """
    shards = expand_shards(spec)
    known: dict[str, int] = {}
    for folder in {Path(shard).parent for shard in shards if "://" not in shard}:
        for info in read_manifest(folder):
            path = folder / info.name
            # A shard that was written again since has another size: count it.
            if path.is_file() and path.stat().st_size == info.size_bytes:
                known[str(path)] = info.num_samples
    counts = []
    unknown = sum(shard not in known for shard in shards)
    with progress("Counting samples", unknown, unit="shards") as advance:
        for shard in shards:
            if shard in known:
                counts.append(known[shard])
                continue
            count, fault = count_samples(shard)
            if fault:
                _logger.warning("%s; its first %d samples are used", fault, count)
            counts.append(count)
            advance()
    return ShardSet(tuple(shards), tuple(counts))


def group_id(text: str) -> int:
    """A 63-bit id that is the same on every rank and machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def normalise_caption(caption: str) -> str:
    """Captions that differ only in case, spaces or final punctuation count as equal."""
    return " ".join(caption.lower().split()).rstrip(" .!?,;")


@dataclass(frozen=True)
class Decoder:
    """Turns raw samples into rows of a batch; travels to the worker processes."""

    preprocessing: Preprocessing
    tokenizer: Tokenizer
    captions: Literal["first", "random"]
    positives: Positives
    label_key: str | None
    max_image_pixels: int
    seed: int

    def row(self, raw: dict[str, Any], epoch: int) -> _Row:
        """Decodes one sample.

        Raises:
            DataError: no usable image or caption.
        """
        sample = parse_sample(raw)
        if not sample.captions:
            raise DataError(f"{raw.get('__url__')}#{sample.key}: the sample has no caption")
        image = decode_image(
            sample.image,
            uri=f"{raw.get('__url__')}#{sample.key}",
            max_pixels=self.max_image_pixels,
            min_side=min(self.preprocessing.size),
        )
        caption = sample.captions[0]
        if self.captions == "random" and len(sample.captions) > 1:
            choice = group_id(f"{self.seed}/{epoch}/{sample.key}") % len(sample.captions)
            caption = sample.captions[choice]
        return _Row(
            sample.key, self.preprocessing.pixels(image), caption, self._group(sample, caption)
        )

    def _group(self, sample: Sample, caption: str) -> int:
        if self.positives == "image":
            return group_id(hashlib.blake2b(sample.image, digest_size=16).hexdigest())
        if self.positives == "caption":
            return group_id(normalise_caption(caption))
        if self.positives == "label":
            label = sample.metadata.get(self.label_key) if self.label_key else sample.label
            if label is None:
                place = f"metadata key {self.label_key!r}" if self.label_key else "label (.cls)"
                raise DataError(
                    f"{sample.key}: objective.positives is label, but there is no {place}"
                )
            return group_id(str(label))
        return group_id(sample.key)

    def batch(self, rows: Sequence[_Row], skipped: Sequence[Skipped]) -> Batch:
        """Stacks rows."""
        return Batch(
            keys=tuple(row.key for row in rows),
            image_BCHW=torch.from_numpy(np.stack([row.pixels for row in rows])),
            tokens_BL=self.tokenizer([row.caption for row in rows]),
            groups_B=torch.tensor([row.group for row in rows], dtype=torch.int64),
            skipped=tuple(skipped),
        )


@dataclass(frozen=True)
class _Row:
    key: str
    pixels: np.ndarray[Any, np.dtype[np.uint8]]
    caption: str
    group: int


class TrainingBatches(IterableDataset[Batch]):
    """This rank's micro-batches of all remaining epochs, in order.

    Each step has batch_size / world_size / micro_batch_size of them.
    """

    def __init__(
        self,
        shard_set: ShardSet,
        decoder: Decoder,
        *,
        batch_size: int,
        micro_batch_size: int | None = None,
        shuffle_buffer: int,
        cache_bytes: int = 0,
        rank: int,
        world_size: int,
        epochs: int,
        start_step: int = 0,
    ) -> None:
        self._shard_set = shard_set
        self._decoder = decoder
        self._batch_size = batch_size
        self._local_size = batch_size // world_size
        self._micro_size = micro_batch_size or self._local_size
        self._micro_steps = self._local_size // self._micro_size
        self._shuffle_buffer = shuffle_buffer
        self._rank = rank
        self._steps_per_epoch = shard_set.steps_per_epoch(batch_size)
        self._total_steps = self._steps_per_epoch * epochs
        self._start_step = start_step
        # Parsing tar headers takes as long as decoding small images: small data are read once.
        self._cache: dict[str, list[dict[str, Any]]] | None = None
        if 0 < shard_set.size_bytes() <= cache_bytes:
            self._cache = {}

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        index, count = (worker.id, worker.num_workers) if worker else (0, 1)
        per_epoch = self._steps_per_epoch * self._micro_steps
        start = self._start_step * self._micro_steps
        for epoch in range(self._start_step // self._steps_per_epoch, self._epochs()):
            first = epoch * per_epoch
            wanted = {
                number - first
                for number in range(max(first, start), first + per_epoch)
                if (number - start) % count == index
            }
            for number, raws in self._micro_batches(epoch, wanted):
                step = epoch * self._steps_per_epoch + number // self._micro_steps
                yield self._decode(raws, epoch, step)

    def _epochs(self) -> int:
        return self._total_steps // self._steps_per_epoch

    def _micro_batches(
        self, epoch: int, wanted: set[int]
    ) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """The undecoded samples of this rank's micro-batches, numbered within the epoch."""
        if not wanted:
            return
        raws: list[dict[str, Any]] = []
        last = max(wanted)
        for position, raw in enumerate(self._stream(epoch)):
            step, place = divmod(position, self._batch_size)
            owner, row = divmod(place, self._local_size)
            number = step * self._micro_steps + row // self._micro_size
            if step * self._micro_steps > last:
                return
            if owner == self._rank and number in wanted:
                raws.append(raw)
                if len(raws) == self._micro_size:
                    yield number, raws
                    raws = []

    def _stream(self, epoch: int) -> Iterator[dict[str, Any]]:
        import webdataset

        rng = random.Random(f"{self._decoder.seed}/{epoch}")
        shards = list(self._shard_set.shards)
        rng.shuffle(shards)
        raws = (raw for shard in shards for raw in self._read(shard))
        size = self._shuffle_buffer
        shuffled: Iterator[dict[str, Any]] = webdataset.filters.shuffle(
            size, initial=size, rng=rng
        )(raws)
        return shuffled

    def _read(self, shard: str) -> Iterator[dict[str, Any]]:
        # A shard that breaks off was reported when the shards were counted.
        raws = iterate_raw([shard], on_error=lambda shard, error: None)
        if self._cache is None:
            yield from raws
            return
        if shard not in self._cache:
            self._cache[shard] = list(raws)
        yield from self._cache[shard]

    def _decode(self, raws: list[dict[str, Any]], epoch: int, step: int) -> Batch:
        rows: list[_Row | None] = []
        skipped: list[Skipped] = []
        for raw in raws:
            try:
                rows.append(self._decoder.row(raw, epoch))
            except DataError as error:
                reason = getattr(error, "reason", None) or str(error).rpartition(": ")[2]
                skipped.append(Skipped(str(raw["__url__"]), str(raw["__key__"]), reason))
                rows.append(None)
        usable = [row for row in rows if row is not None]
        if not usable:
            raise TrainingError(
                f"step {step}: none of the {len(rows)} samples of this rank can be used; "
                f"first: {skipped[0].shard}#{skipped[0].key}: {skipped[0].reason}"
            )
        filled: list[_Row] = []
        for row in rows:
            filled.append(row or (filled[-1] if filled else usable[0]))
        return self._decoder.batch(filled, skipped)


def load_batches(dataset: TrainingBatches, workers: int) -> Iterator[Batch]:
    """Runs a dataset in worker processes (0: in this one) and gives its batches in order."""
    if workers == 0:
        yield from dataset
        return
    # Not fork: a child of a process with OpenMP and gloo threads can hang.
    context = multiprocessing.get_context("forkserver")
    lifeline, held = context.Pipe(duplex=False)
    with warnings.catch_warnings():
        # The number of workers is the recipe's business, also beyond that of the cores.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader: DataLoader[Batch | ClipsysError] = DataLoader(
            _WorkerItems(dataset, lifeline),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=2,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context=context,
        )
        items = iter(loader)
    with lifeline, held:
        for item in items:
            if isinstance(item, ClipsysError):
                raise item
            yield item


class _WorkerItems(IterableDataset["Batch | ClipsysError"]):
    """What runs in a worker: gives deliberate errors as items, and ends with the trainer.

    torch would wrap an error into a page of traceback. And torch's workers watch their parent,
    which under forkserver is the server, which in turn waits for its workers: when the trainer is
    killed, both stay for ever. A pipe that only the trainer holds open tells the worker at once.
    """

    def __init__(self, dataset: TrainingBatches, lifeline: Connection) -> None:
        self._dataset = dataset
        self._lifeline = lifeline

    def __iter__(self) -> Iterator[Batch | ClipsysError]:
        threading.Thread(target=self._end_with_trainer, name="lifeline", daemon=True).start()
        try:
            yield from self._dataset
        except ClipsysError as error:
            yield error

    def _end_with_trainer(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            self._lifeline.recv_bytes()  # nothing is ever sent
        os._exit(0)
