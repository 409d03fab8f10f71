"""The input pipeline: shards -> order -> decoded micro-batches, the same ones every time.

    clipsys.shards.random_access  finds the samples in each tar and reads any of them
    data.order     says which sample stands at which position of an epoch
    data.batches   cuts positions into micro-batches: number n is a pure function of the recipe,
                   n and the rank
    data.samples   decodes one sample
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

import hashlib
import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from torch.utils.data import Dataset

from clipsys.config import PathText, Settings
from clipsys.errors import DataError, TrainingError
from clipsys.images.decoding import DEFAULT_MAX_PIXELS
from clipsys.shards.counting import count_shards, stated_counts
from clipsys.shards.random_access import MAX_OPEN, ShardReader
from clipsys.shards.reading import expand_shards
from clipsys.shards.remote import ShardCache, default_folder, is_remote
from clipsys.training.data.order import SampleOrder
from clipsys.training.data.pixel_cache import make_cache
from clipsys.training.data.samples import Batch, Decoder, Row, Skipped

_logger = logging.getLogger(__name__)

#: How many remote shards are mixed at a time unless data.shuffle_shards is set.
_MIXED_REMOTE_SHARDS = 8
#: Of a sample in a batch, beside its image: tokens, ids, names.
_OTHER_BYTES = 2048
#: How many shards are looked at for the reason why there are few samples.
_FEW_SHARDS = 4


class SourceConfig(Settings):
    """One of several sources of training data."""

    shards: PathText | list[PathText] = Field(description="folder, glob, {000..012} range or list")
    weight: PositiveFloat | None = Field(
        None, description="how often it is drawn from, relative to the others; with data.resampled"
    )


class DataConfig(Settings):
    """What is trained on."""

    train: PathText | list[PathText | SourceConfig] = Field(
        description="shards: folder, glob, {000..012} range, or a list of such, or of "
        "{shards: …, weight: …}"
    )
    validation: PathText | list[PathText] | None = Field(None, description="shards for evaluation")
    batch_size: PositiveInt = Field(256, description="pairs contrasted together, across all ranks")
    micro_batch_size: PositiveInt | None = Field(
        None,
        description="pairs that pass the encoders at once, on each rank; smaller ones need less "
        "memory and a second forward pass, and change no result; default the rank's whole share",
    )
    workers: NonNegativeInt = Field(2, description="decoding processes per rank")
    timeout_s: PositiveFloat = Field(
        540.0,
        description="the run ends with the reason if the decoding processes give no batch for "
        "this long; ranks wait ten minutes for each other",
    )
    shuffle_shards: PositiveInt | None = Field(
        None,
        description="how many shards are mixed at a time; default all. Fewer keep reading local, "
        "on slow drives; of remote shards, 8",
    )
    resampled: bool = Field(
        False, description="draw samples with replacement, sources by their weights"
    )
    samples_per_epoch: PositiveInt | None = Field(
        None, description="with resampled: what counts as an epoch; default the number of samples"
    )
    cache_dir: PathText | None = Field(
        None,
        description="where copies of remote shards, and where the samples lie in each shard, are "
        "stored; default the user's cache folder",
    )
    cache_gb: PositiveFloat = Field(
        50.0, description="size of cache_dir at which the copies used longest ago are removed"
    )
    pixel_cache_gb: NonNegativeFloat = Field(
        2.0,
        description="decoded images are stored, in a temporary file that the ranks of a machine "
        "share, if all of them need no more than this; 0 decodes anew in each epoch",
    )
    captions: Literal["first", "random"] = Field(
        "random", description="which caption of a sample is used each time it is seen"
    )
    caption_key: str | None = Field(
        None,
        description="metadata key that holds the captions, in place of .txt and captions; dots "
        "lead into objects and lists of objects, as in sentences.raw",
    )
    label_key: str | None = Field(
        None, description="metadata key that is the label, for objective.positives: label"
    )
    decode: Literal["fast", "exact"] = Field(
        "fast",
        description="fast: within 40 dB of open_clip's evaluation transform; exact: equal to it",
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

    @property
    def shard_cache(self) -> ShardCache:
        """Where copies of remote shards, and indexes, are stored."""
        folder = Path(self.cache_dir) if self.cache_dir else default_folder()
        return ShardCache(folder, limit_bytes=int(self.cache_gb * 1e9))

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """What `train` lists, each in its long form."""
        listed = [self.train] if isinstance(self.train, str) else self.train
        return tuple(
            one if isinstance(one, SourceConfig) else SourceConfig(shards=one) for one in listed
        )

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ValueError("data.train: give every source a weight, or none")
        if not self.resampled and (any(weighted) or self.samples_per_epoch):
            name = "data.samples_per_epoch" if self.samples_per_epoch else "a weight in data.train"
            raise ValueError(
                f"{name} does nothing in an epoch that takes every sample once; "
                "set data.resampled: true"
            )
        return self


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


def sample_order(config: DataConfig, shard_set: ShardSet, seed: int) -> SampleOrder:
    """The order that a recipe's ``data`` section asks for."""
    weights = None
    if any(source.weight for source in config.sources):
        totals = [0] * len(config.sources)
        for source, count in zip(shard_set.sources, shard_set.counts, strict=True):
            totals[source] += count
        # A weight is a source's share of what is drawn, however many samples it has.
        weights = tuple((config.sources[s].weight or 0.0) / totals[s] for s in shard_set.sources)
    drawn = (config.samples_per_epoch or shard_set.num_samples) if config.resampled else None
    mixed = config.shuffle_shards
    if mixed is None and any(is_remote(shard) for shard in shard_set.shards):
        mixed = _MIXED_REMOTE_SHARDS
    order = SampleOrder(shard_set.counts, seed, mixed, drawn, weights)
    if order.num_positions < config.batch_size and not config.resampled:
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
            max_open=_MIXED_REMOTE_SHARDS if remote else MAX_OPEN,
        )
        starts = itertools.accumulate(shard_set.counts, initial=0)
        self._first_numbers = tuple(starts)
        self._pixels = None
        if epochs > 1:
            self._pixels = make_cache(
                shard_set.num_samples, decoder.preprocessing.size, limit_bytes=pixel_cache_bytes
            )
        self._order = order
        self._decoder = decoder
        self._batch_size = batch_size
        self._local_size = batch_size // world_size
        self._micro_size = micro_batch_size or self._local_size
        self._micro_steps = self._local_size // self._micro_size
        self._rank = rank
        self._steps_per_epoch = order.steps_per_epoch(batch_size)
        self._start_step = start_step
        self._remaining_steps = max(0, self._steps_per_epoch * epochs - start_step)

    @property
    def batch_bytes(self) -> int:
        """Size of a micro-batch, nearly: images, and a little for tokens and the rest."""
        height, width = self._decoder.preprocessing.size
        return self._micro_size * (3 * height * width + _OTHER_BYTES)

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
        samples = self._order.samples(epoch, first, last)
        for position, (shard, sample) in enumerate(samples, first):
            key = f"sample {sample}"
            try:
                raw = self._reader.read(shard, sample)
                key = str(raw["__key__"])
                rows.append(self._row(raw, epoch, position, self._first_numbers[shard] + sample))
            except DataError as error:
                reason = getattr(error, "reason", None) or str(error).rpartition(": ")[2]
                skipped.append(Skipped(self._shards[shard], key, reason))
                rows.append(None)
        return rows, skipped

    def _row(self, raw: dict[str, Any], epoch: int, position: int, number: int) -> Row:
        known = None if self._pixels is None else self._pixels.get(number)
        row = self._decoder.row(raw, epoch, position, known, number=number)
        if self._pixels is not None and known is None:
            self._pixels.put(number, row.image)
        return row

    def _any_row(self, epoch: int, after: int, step: int, bad: Skipped) -> Row:
        """The first usable sample that follows, for a micro-batch that has none of its own."""
        total = self._order.num_positions
        for position in range(after, after + self._batch_size):
            (row,), _ = self._rows(epoch, position % total, position % total + 1)
            if row is not None:
                return row
        raise TrainingError(
            f"step {step}: none of the {self._micro_size} samples of this rank can be used; "
            f"first: {bad.shard}#{bad.key}: {bad.reason}"
        )
