"""From raw samples to the rows of a batch: decoding, caption, group."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from clipsys.errors import SampleError
from clipsys.images.decoding import decode_image, decode_stored
from clipsys.images.preprocessing import Preprocessing
from clipsys.models.tokenization import Tokenizer
from clipsys.shards.samples import NUMBER, Sample, parse_sample, place_of, require_captions

Pixels = npt.NDArray[np.uint8]
Positives = Literal["pair", "image", "caption", "label"]


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
        keys: (B,) sample keys; only shard and key together name a sample.
        image_BCHW: uint8, not yet augmented or normalised.
        tokens_BL: int64, padded to the model's context length; None where no text is trained.
        groups_B: int64; equal ids are positives of each other.
        samples_B: int64; the number of each sample among all samples of the shards.
        skipped: samples of this batch that were replaced by a neighbour.
        shards: (B,) the shard of each sample.
    """

    keys: tuple[str, ...]
    image_BCHW: torch.Tensor
    tokens_BL: torch.Tensor | None
    groups_B: torch.Tensor
    samples_B: torch.Tensor
    skipped: tuple[Skipped, ...] = ()
    shards: tuple[str, ...] = ()

    @property
    def places(self) -> tuple[str, ...]:
        """``SHARD#KEY`` of each sample, for messages."""
        return tuple(f"{shard}#{key}" for shard, key in zip(self.shards, self.keys, strict=True))

    def pin_memory(self) -> Batch:
        """Called by torch's DataLoader, for fast copies to a GPU."""
        return replace(
            self,
            image_BCHW=self.image_BCHW.pin_memory(),
            tokens_BL=None if self.tokens_BL is None else self.tokens_BL.pin_memory(),
            groups_B=self.groups_B.pin_memory(),
            samples_B=self.samples_B.pin_memory(),
        )


def group_id(text: str) -> int:
    """A 63-bit id that is the same on every rank and machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def normalise_caption(caption: str) -> str:
    """Captions that differ only in case, spaces or final punctuation count as equal."""
    return " ".join(caption.lower().split()).rstrip(" .!?,;")


@dataclass(frozen=True)
class DecodedImage:
    """What a sample's image file becomes, the same in each epoch.

    Attributes:
        pixels: uint8 (3, H, W).
        group: equal for equal files; 0 unless ``objective.positives`` is ``image``.
    """

    pixels: Pixels
    group: int


@dataclass(frozen=True)
class Row:
    """One sample as it is used once.

    Attributes:
        shard: shard that the sample is in.
        key: key of the sample.
        image: decoded.
        caption: the chosen one; empty where none is needed.
        group: equal ids are positives of each other.
        number: number of the sample among all samples of the shards.
    """

    shard: str
    key: str
    image: DecodedImage
    caption: str
    group: int
    number: int


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
    decode: Literal["fast", "exact"] = "fast"
    needs_caption: bool = True
    caption_key: str | None = None

    def row(
        self,
        raw: dict[str, Any],
        epoch: int,
        position: int,
        image: DecodedImage | None = None,
        *,
        number: int = 0,
    ) -> Row:
        """Decodes the sample at a position of an epoch's order.

        Args:
            raw: its members.
            epoch: counted from 0.
            position: within the epoch.
            image: its image, where it has been decoded already.
            number: number of the sample among all samples of the shards.

        Raises:
            DataError: no usable image, caption or label.
        """
        sample = parse_sample(raw, caption_key=self.caption_key)
        if self.needs_caption:
            require_captions(sample, raw)
        if image is None:
            image = self._image(sample.image, place_of(raw))
        caption = sample.captions[0] if sample.captions else ""
        if self.captions == "random" and len(sample.captions) > 1:
            choice = group_id(f"{self.seed}/{epoch}/{position}") % len(sample.captions)
            caption = sample.captions[choice]
        # A sample is its shard and its number there: keys occur in several shards.
        shard = str(raw.get("__url__"))
        identity = f"{shard}#{raw.get(NUMBER, sample.key)}"
        group = self._group(sample, caption, image, identity)
        return Row(shard, sample.key, image, caption, group, number)

    def _image(self, data: bytes, place: str) -> DecodedImage:
        group = 0
        if self.positives == "image":
            # SHA-256 because processors compute it: half the time of BLAKE2.
            group = int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 1
        return DecodedImage(self._pixels(data, place), group)

    def _pixels(self, data: bytes, place: str) -> Pixels:
        if self.decode == "exact":
            image = decode_image(data, uri=place, max_pixels=self.max_image_pixels)
            return self.preprocessing.pixels(image)
        stored = decode_stored(
            data,
            uri=place,
            max_pixels=self.max_image_pixels,
            min_side=self.preprocessing.fast_min_side,
        )
        return self.preprocessing.fast_pixels(stored)

    def _group(self, sample: Sample, caption: str, image: DecodedImage, identity: str) -> int:
        if self.positives == "image":
            return image.group
        if self.positives == "caption":
            return group_id(normalise_caption(caption))
        if self.positives == "label":
            label = sample.metadata.get(self.label_key) if self.label_key else sample.label
            if label is None:
                what = "label (.cls); data.label_key names a metadata key that is one"
                if self.label_key:
                    what = f"metadata key {self.label_key!r} (data.label_key)"
                raise SampleError(
                    f"{identity}: objective.positives is label, but there is no {what}",
                    reason="no label",
                )
            return group_id(str(label))
        return group_id(identity)

    def batch(self, rows: Sequence[Row], skipped: Sequence[Skipped]) -> Batch:
        """Stacks rows."""
        return Batch(
            keys=tuple(row.key for row in rows),
            image_BCHW=torch.from_numpy(np.stack([row.image.pixels for row in rows])),
            tokens_BL=self.tokenizer([r.caption for r in rows]) if self.needs_caption else None,
            groups_B=torch.tensor([row.group for row in rows], dtype=torch.int64),
            samples_B=torch.tensor([row.number for row in rows], dtype=torch.int64),
            skipped=tuple(skipped),
            shards=tuple(row.shard for row in rows),
        )
