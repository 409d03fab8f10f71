"""The section ``data`` of a recipe: where samples come from and how they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from clipsys.config import PathText, Settings
from clipsys.images.decoding import DEFAULT_MAX_PIXELS
from clipsys.shards.remote import ShardCache, default_folder


class SourceConfig(Settings):
    """One of several sources of training data."""

    shards: PathText | list[PathText] = Field(description="folder, glob, {000..012} range or list")
    weight: PositiveFloat | None = Field(
        None, description="how often it is drawn from, relative to the others; with data.resampled"
    )


class FramesConfig(Settings):
    """Ordered frames: rows are windows of consecutive frames of a sequence, not single images."""

    sequence: str = Field("sequence", description="metadata key that names a frame's sequence")
    index: str = Field("frame", description="metadata key, a number that orders a sequence")
    length: int = Field(ge=2, description="frames of a window")
    stride: PositiveInt = Field(1, description="every so many-th frame is one of the window")


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
        "share, if all of them need no more than this; 0 decodes again in each epoch",
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
        None,
        description="metadata key that is the label, for objectives that use labels; default the "
        ".cls member",
    )
    classes: list[str] | PathText | None = Field(
        None,
        description="labels of the classes, in the order of their numbers, or a file with one a "
        "line, for objectives that train a classifier; default those of the training samples, "
        "which are read once at the start",
    )
    num_samples: PositiveInt | None = Field(
        None,
        description="train on this many samples, drawn once; where the objective uses labels, each "
        "label has its share of them, and at least one; default all",
    )
    label_noise: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="probability that a training sample has another label than its own, each one "
        "as likely, in every epoch the same",
    )
    subset_seed: NonNegativeInt | None = Field(
        None,
        description="seed of num_samples and label_noise; default that of the run. Runs that are "
        "compared see the same samples and labels if it is the same",
    )
    frames: FramesConfig | None = Field(
        None,
        description="windows of ordered frames in the place of single images, for objectives over "
        "frames: {sequence: metadata key, index: metadata key, length: frames, stride: 1}",
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
        if self.frames is not None and self.num_samples is not None:
            raise ValueError(
                "data.num_samples draws single samples, and data.frames makes windows of several; "
                "leave out one of the two"
            )
        if any(weighted) and self.num_samples is not None:
            raise ValueError(
                "data.num_samples draws from all sources alike, and data.train weighs them; leave "
                "out one of the two"
            )
        if self.subset_seed is not None and self.num_samples is None and not self.label_noise:
            raise ValueError(
                "data.subset_seed does nothing without data.num_samples or data.label_noise"
            )
        return self
