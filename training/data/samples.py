"""From raw samples to the rows of a batch: decoding, caption, group."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from clipsys.errors import DataError, SampleError
from clipsys.images.decoding import decode_image, decode_stored
from clipsys.images.preprocessing import Preprocessing
from clipsys.models.tokenization import Tokenizer
from clipsys.shards.samples import NUMBER, Sample, parse_sample, place_of, require_captions
from clipsys.training.data.sentences import draw_sentences
from clipsys.training.data.subset import LabelNoise

Pixels = npt.NDArray[np.uint8]
Positives = Literal["pair", "image", "caption", "label"]

#: The group of a text that is no sample's caption; those of samples are not negative.
NO_GROUP = -1


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
        image_BCHW: uint8, not yet augmented or normalised; None where no image is trained. Of
            windows of T frames (B·T, 3, H, W), those of a row side by side.
        texts: T of int64 (B, L), padded to the model's context length; none where no text is
            trained.
        groups_B: int64; equal ids are positives of each other.
        samples_B: int64; the number of each sample among all samples of the shards.
        classes_B: int64; the number of each sample's class; None where classes are not needed.
        present_BT: bool; whether a sample has its t-th text; None where there is one at most.
        skipped: samples of this batch that were replaced by a neighbour.
        shards: (B,) the shard of each sample.
        captions: (B,) the first text of each sample, before it was tokenized.
        further_groups_BT: int64; for each text but the first the group of the sample that it is a
            caption of, `NO_GROUP` where there is none; None where there are no such texts.
        teacher_BL: int64 (B, L); the first text of each sample in the tokens of a teacher; None
            where there is none, or its vectors are stored.
        stored_B2: int64; which of the stored views of its image and which of its captions a sample
            shows; None where a teacher's vectors are not stored.
        is_encoded: whether images are features of a locked tower, float16 (B, F), in the place of
            pixels, and texts too unless their tower is trained.
    """

    keys: tuple[str, ...]
    image_BCHW: torch.Tensor | None
    texts: tuple[torch.Tensor, ...]
    groups_B: torch.Tensor
    samples_B: torch.Tensor
    classes_B: torch.Tensor | None = None
    present_BT: torch.Tensor | None = None
    skipped: tuple[Skipped, ...] = ()
    shards: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    further_groups_BT: torch.Tensor | None = None
    teacher_BL: torch.Tensor | None = None
    stored_B2: torch.Tensor | None = None
    is_encoded: bool = False

    @property
    def places(self) -> tuple[str, ...]:
        """``SHARD#KEY`` of each sample, for messages."""
        return tuple(f"{shard}#{key}" for shard, key in zip(self.shards, self.keys, strict=True))

    def pin_memory(self) -> Batch:
        """Called by torch's DataLoader, for fast copies to a GPU."""
        return replace(
            self,
            image_BCHW=_pinned(self.image_BCHW),
            texts=tuple(tokens_BL.pin_memory() for tokens_BL in self.texts),
            groups_B=self.groups_B.pin_memory(),
            samples_B=self.samples_B.pin_memory(),
            classes_B=_pinned(self.classes_B),
            present_BT=_pinned(self.present_BT),
            further_groups_BT=_pinned(self.further_groups_BT),
            teacher_BL=_pinned(self.teacher_BL),
            stored_B2=_pinned(self.stored_B2),
        )


def _pinned(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.pin_memory()


def group_id(text: str) -> int:
    """A 63-bit id that is the same on every rank and machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def normalise_caption(caption: str) -> str:
    """Captions that differ only in case, spaces or final punctuation count as equal."""
    return " ".join(caption.lower().split()).rstrip(" .!?,;")


def image_group(data: bytes) -> int:
    """A 63-bit id that is equal for equal files."""
    # SHA-256 because processors compute it: half the time of BLAKE2.
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 1


def identity_of(raw: Mapping[str, Any], sample: Sample) -> str:
    """Shard of a sample and its number there: keys occur in several shards."""
    return f"{raw.get('__url__')}#{raw.get(NUMBER, sample.key)}"


def caption_choice(seed: int, epoch: int, position: int, num_captions: int) -> int:
    """Which caption the sample at a position of an epoch's order shows."""
    return group_id(f"{seed}/{epoch}/{position}") % num_captions


def view_choice(seed: int, epoch: int, position: int, num_views: int) -> int:
    """Which of its stored views it shows."""
    return group_id(f"{seed}/{epoch}/{position}/view") % num_views


def skip_reason(error: DataError) -> str:
    """Why a sample cannot be used, in a few words."""
    return getattr(error, "reason", None) or str(error).rpartition(": ")[2]


@dataclass(frozen=True)
class DecodedImage:
    """What a sample's image file becomes, the same in each epoch.

    Attributes:
        pixels: uint8 (3, H, W).
        group: equal for equal files; 0 unless ``objective.positives`` is ``image``.
    """

    pixels: Pixels
    group: int


class FurtherText(NamedTuple):
    """A text of a sample beside its caption.

    Attributes:
        text: the text.
        group: group of the sample that it is a caption of.
    """

    text: str
    group: int = NO_GROUP


class FurtherTexts(Protocol):
    """Where texts beside the caption come from; travels to the worker processes."""

    @property
    def count(self) -> int:
        """Texts of each sample."""

    def drawn(self, sample: Sample, number: int, entropy: int) -> list[FurtherText]:
        """Those of a sample for one use of it, at most ``count``.

        Args:
            sample: the sample.
            number: its number among all samples of the shards.
            entropy: what is drawn depends on it alone.
        """


@dataclass(frozen=True)
class Row:
    """One sample as it is used once.

    Attributes:
        shard: shard that the sample is in.
        key: key of the sample.
        image: decoded; None where no image is trained.
        later: the frames that follow ``image`` in its window.
        texts: the chosen ones; None for each that the sample lacks.
        group: equal ids are positives of each other.
        number: number of the sample among all samples of the shards.
        class_number: number of its class; None where classes are not needed.
        further_groups: group of each text but the first; `NO_GROUP` for those without.
        stored: which stored view and which caption it shows.
    """

    shard: str
    key: str
    image: DecodedImage | None
    texts: tuple[str | None, ...]
    group: int
    number: int
    class_number: int | None = None
    later: tuple[DecodedImage, ...] = ()
    further_groups: tuple[int, ...] = ()
    stored: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Decoder:
    """Turns raw samples into rows of a batch; travels to the worker processes.

    Attributes:
        preprocessing: what the images are decoded for.
        tokenizer: tokenizer of the text tower.
        captions: which caption is used each time.
        positives: which samples get equal group ids.
        label_key: metadata key of the label; None is the ``.cls`` member.
        max_image_pixels: images that claim more are refused.
        seed: of the choice of captions.
        decode: how images are decoded.
        needs_image: whether a sample needs an image.
        needs_caption: whether a sample needs a caption.
        caption_key: metadata key of the captions.
        class_numbers: number of each class by its label; None where classes are not needed.
        further: where texts beside the caption come from; None: there are none.
        label_noise: replaces labels; None leaves them.
        num_sentences: how many sentences of a caption are the texts; 0: the whole caption is one.
        teacher_tokenizer: tokenizer of a teacher's text tower; None where there is none.
        stored_views: views of each image of which a teacher's vectors are stored; 0: none are.
    """

    preprocessing: Preprocessing
    tokenizer: Tokenizer
    captions: Literal["first", "random"]
    positives: Positives
    label_key: str | None
    max_image_pixels: int
    seed: int
    decode: Literal["fast", "exact"] = "fast"
    needs_image: bool = True
    needs_caption: bool = True
    caption_key: str | None = None
    class_numbers: Mapping[str, int] | None = None
    further: FurtherTexts | None = None
    label_noise: LabelNoise | None = None
    num_sentences: int = 0
    teacher_tokenizer: Tokenizer | None = None
    stored_views: int = 0

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
        sample = parse_sample(raw, caption_key=self.caption_key, needs_image=self.needs_image)
        if self.needs_caption:
            require_captions(sample, raw)
        if image is None and self.needs_image:
            image = self._image(sample.image, place_of(raw))
        choice = 0
        if self.captions == "random" and len(sample.captions) > 1:
            choice = caption_choice(self.seed, epoch, position, len(sample.captions))
        caption = sample.captions[choice] if sample.captions else ""
        view = 0
        if self.stored_views:
            view = view_choice(self.seed, epoch, position, self.stored_views)
        shard, identity = str(raw.get("__url__")), identity_of(raw, sample)
        group = self._group(sample, caption, image, identity, number)
        further = self._further(sample, number, f"{self.seed}/{epoch}/{position}/further")
        texts: tuple[str | None, ...] = (
            (caption, *(one and one.text for one in further)) if self.needs_caption else ()
        )
        if self.num_sentences:
            draw = group_id(f"{self.seed}/{epoch}/{position}/sentences")
            texts = draw_sentences(caption, self.num_sentences, draw, place_of(raw))
        class_number = None
        if self.class_numbers is not None:
            label = self._label(sample, identity, number)
            class_number = self._class_number(self.class_numbers, label, identity)
        return Row(
            *(shard, sample.key, image, texts, group, number, class_number),
            further_groups=tuple(NO_GROUP if one is None else one.group for one in further),
            stored=(view, choice),
        )

    def _further(self, sample: Sample, number: int, draw: str) -> list[FurtherText | None]:
        """Texts beside the caption; None for each that there is none for."""
        if self.further is None:
            return []
        found: list[FurtherText | None] = [*self.further.drawn(sample, number, group_id(draw))]
        return found + [None] * (self.further.count - len(found))

    def frame(self, raw: dict[str, Any]) -> DecodedImage:
        """The image of a sample, which is a later frame of a window.

        Raises:
            DataError: no usable image.
        """
        return self._image(parse_sample(raw).image, place_of(raw))

    def _image(self, data: bytes, place: str) -> DecodedImage:
        group = 0
        if self.positives == "image":
            group = image_group(data)
        return DecodedImage(self.pixels(data, place), group)

    def pixels(self, data: bytes, place: str) -> Pixels:
        """Decodes an image file: uint8 (3, H, W).

        Args:
            data: the file.
            place: what messages call it.

        Raises:
            DataError: it cannot be used.
        """
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

    def _group(
        self,
        sample: Sample,
        caption: str,
        image: DecodedImage | None,
        identity: str,
        number: int,
    ) -> int:
        if self.positives == "image" and image is not None:
            return image.group
        if self.positives == "caption":
            return group_id(normalise_caption(caption))
        if self.positives == "label":
            return group_id(self._label(sample, identity, number))
        return group_id(identity)

    def _label(self, sample: Sample, identity: str, number: int) -> str:
        label = label_of(sample, self.label_key, identity)
        return self.label_noise.of(label, number) if self.label_noise else label

    def _class_number(self, numbers: Mapping[str, int], label: str, identity: str) -> int:
        if label not in numbers:
            raise SampleError(
                f"{identity}: the label {label!r} is none of the {len(numbers)} classes of "
                "data.classes; add it there, or leave the sample out",
                reason="label not in data.classes",
            )
        return numbers[label]

    def batch(self, rows: Sequence[Row], skipped: Sequence[Skipped]) -> Batch:
        """Stacks rows."""
        captions = tuple((row.texts[0] if row.texts else "") or "" for row in rows)
        return Batch(
            keys=tuple(row.key for row in rows),
            image_BCHW=_stacked(
                [image for row in rows if row.image for image in (row.image, *row.later)]
            ),
            texts=tuple(
                self.tokenizer([text or "" for text in texts])
                for texts in zip(*(row.texts for row in rows), strict=True)
            ),
            groups_B=torch.tensor([row.group for row in rows], dtype=torch.int64),
            samples_B=torch.tensor([row.number for row in rows], dtype=torch.int64),
            classes_B=None
            if self.class_numbers is None
            else torch.tensor([row.class_number for row in rows], dtype=torch.int64),
            present_BT=_presence([row.texts for row in rows]),
            skipped=tuple(skipped),
            shards=tuple(row.shard for row in rows),
            captions=captions,
            further_groups_BT=None
            if self.further is None
            else torch.tensor([row.further_groups for row in rows], dtype=torch.int64),
            teacher_BL=self.teacher_tokenizer and self.teacher_tokenizer(list(captions)),
            stored_B2=torch.tensor([row.stored for row in rows]) if self.stored_views else None,
        )


def label_of(sample: Sample, label_key: str | None, identity: str) -> str:
    """The label of a sample.

    Args:
        sample: the sample.
        label_key: the metadata key that is the label; None is the ``.cls`` member.
        identity: what the sample is called in messages.

    Raises:
        SampleError: it has none.
    """
    label = sample.metadata.get(label_key) if label_key else sample.label
    if label is not None:
        return str(label)
    what = "label (.cls); data.label_key names a metadata key that is one"
    if label_key:
        what = f"metadata key {label_key!r} (data.label_key)"
    raise SampleError(
        f"{identity}: the objective needs a label, but there is no {what}", reason="no label"
    )


def _stacked(images: Sequence[DecodedImage]) -> torch.Tensor | None:
    if not images:
        return None
    return torch.from_numpy(np.stack([image.pixels for image in images]))


def _presence(texts: Sequence[tuple[str | None, ...]]) -> torch.Tensor | None:
    """(B, T); None where samples have one text at most, which none lacks.

    Not where all of these samples have all: objectives gather it, and on every rank or none.
    """
    if len(texts[0]) < 2:
        return None
    return torch.tensor([[text is not None for text in of_one] for of_one in texts])
