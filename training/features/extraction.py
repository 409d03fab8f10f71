"""From shards to the stored features of locked towers.

Every rank computes a share of the blocks that are missing; all ranks then read all of them. What
is stored is a function of the towers, the data, the augmentation and the seed, which name the
folder: a run that is repeated, resumed or changed elsewhere finds it again.

Each view of a sample is drawn from a seed of its own, so that the same view can be drawn again.

Shapes: R samples of a block, V views, T captions of all of them, F width of a trunk's features.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from clipsys.errors import DataError, TrainingError
from clipsys.files.drive_faults import drive_errors_explained
from clipsys.files.user_cache import cache_folder
from clipsys.models.parts import ModelParts
from clipsys.progress import progress_if
from clipsys.shards.random_access import ShardReader
from clipsys.shards.remote import is_remote
from clipsys.shards.samples import parse_sample, place_of, require_captions
from clipsys.training.data.augmentation import (
    AugmentationConfig,
    augment,
    normalisation,
    to_input,
)
from clipsys.training.data.samples import (
    Decoder,
    Pixels,
    group_id,
    identity_of,
    image_group,
    label_of,
    normalise_caption,
    skip_reason,
)
from clipsys.training.data.shard_set import ShardSet
from clipsys.training.distributed.collectives import gather_objects, rank, world_size
from clipsys.training.features.config import FeaturesConfig
from clipsys.training.features.store import Array, BlockStore, block_size
from clipsys.training.model.layers import Tower

_logger = logging.getLogger(__name__)

#: Changes when the same settings would give other features.
FORMAT = "clipsys-features/1"


@dataclass(frozen=True)
class FeatureSource:
    """Whose features are computed, of what, and how.

    Attributes:
        settings: the recipe's section.
        augmentation: of the views.
        decoder: decodes samples, and says which of them belong together.
        shard_set: the shards.
        numbers: of the samples that are trained on, among all of the shards.
        seed: of the views.
        cache: copies of remote shards.
        drawn_for: size of the views as another model sees them, of equal draws; None: no other.
        setting: the one that names the folder, for messages.
    """

    settings: FeaturesConfig
    augmentation: AugmentationConfig
    decoder: Decoder
    shard_set: ShardSet
    numbers: Sequence[int]
    seed: int
    cache: Any = None
    drawn_for: tuple[int, int] | None = None
    setting: str = "features.folder"

    @property
    def block_size(self) -> int:
        """Samples of a block."""
        return block_size(len(self.numbers))

    @property
    def num_blocks(self) -> int:
        """Blocks of all samples."""
        return -(-len(self.numbers) // self.block_size)


class Encoders(Protocol):
    """What features are computed with: `Trunks`, or a whole model."""

    device: torch.device
    #: The towers whose features are stored; of the others their inputs are.
    stored: tuple[Tower, ...]

    def images(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, F) float32 of normalised images."""

    def texts(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """(B, F) float32 of tokens."""

    def fingerprint(self, parts: ModelParts, tower: Tower) -> str:
        """Equal if and only if features are."""


def view_seed(seed: int, number: int, view: int) -> int:
    """What a view of a sample is drawn from."""
    return group_id(f"{seed}/{number}/{view}")


def stored_features(
    source: FeatureSource, trunks: Encoders, parts: ModelParts, *, precision: str
) -> tuple[BlockStore, BlockStore]:
    """Image and text features of all samples, computed where they are not stored yet.

    Of a text tower that is trained the tokens. Every rank calls it.

    Raises:
        TrainingError: the ranks do not see the same folder, or there is no room in it.
    """
    root = Path(source.settings.folder) if source.settings.folder else cache_folder("features")
    stores = {
        tower: BlockStore(
            root / f"{tower}-{_key(source, trunks, parts, tower, precision)}", source.num_blocks
        )
        for tower in ("image", "text")
    }
    work = (
        ("image", _ImageBlocks(source, trunks, parts)),
        ("text", _TextBlocks(source, trunks, parts)),
    )
    for tower, blocks in work:
        what = f"{tower} features" if tower in trunks.stored else "tokens"
        _fill(stores[tower], source, what, blocks)
    return stores["image"], stores["text"]


def _fill(store: BlockStore, source: FeatureSource, what: str, blocks: _Blocks) -> None:
    missing = gather_objects(store.missing())[0]
    own = missing[rank() :: world_size()]
    if rank() == 0:
        found = store.num_blocks - len(missing)
        _logger.info(
            "%s: %s",
            what,
            f"{found} of {store.num_blocks} blocks are stored in {store.folder}"
            if found
            else f"computed once, and stored in {store.folder}",
        )
    title = f"Computing {what}" if rank() == 0 and own else None
    samples = sum(len(_of_block(source, number)) for number in own)
    with (
        drive_errors_explained(
            store.folder.parent, TrainingError, f"make room, or set {source.setting}"
        ),
        progress_if(title is not None, title or "", samples, unit="samples") as advance,
        ThreadPoolExecutor(max_workers=2) as pool,
    ):
        # Decoded one block ahead, while the tower is at work.
        ahead = None
        for place, number in enumerate(own):
            decoded = ahead.result() if ahead else blocks.read(number)
            ahead = pool.submit(blocks.read, own[place + 1]) if place + 1 < len(own) else None
            store.write(number, *blocks.encode(decoded))
            advance(len(_of_block(source, number)))
    gather_objects(None)  # all blocks are written from here on
    if absent := store.missing():
        raise TrainingError(
            f"{store.folder}: rank {rank()} does not see {len(absent)} blocks of features that "
            f"other ranks have written; set {source.setting} to a folder that all machines share"
        )


def _of_block(source: FeatureSource, number: int) -> Sequence[int]:
    size = source.block_size
    return source.numbers[number * size : (number + 1) * size]


class _Blocks:
    """What a store's blocks are made of; one for each tower."""

    def __init__(self, source: FeatureSource, trunks: Encoders, parts: ModelParts) -> None:
        self.source, self.trunks, self.parts = source, trunks, parts
        shard_set = source.shard_set
        self._first = (*itertools.accumulate(shard_set.counts, initial=0),)
        self._reader = ShardReader(shard_set.shards, shard_set.counts, cache=source.cache)

    def read(self, number: int) -> list[dict[str, Any] | DataError]:
        """The samples of a block, prepared on the CPU; what is wrong with one in its place."""
        found: list[dict[str, Any] | DataError] = []
        for sample in _of_block(self.source, number):
            shard = int(np.searchsorted(self._first, sample, side="right")) - 1
            try:
                raw = self._reader.read(shard, sample - self._first[shard])
                found.append({"number": sample, "key": str(raw["__key__"])} | self.prepare(raw))
            except DataError as error:
                found.append(error)
        return found

    def prepare(self, raw: dict[str, Any]) -> dict[str, Any]:
        """What is needed of a sample."""
        raise NotImplementedError

    def encode(self, decoded: list[Any]) -> tuple[Any, dict[str, Array]]:
        """Features of a block, and what belongs to them."""
        raise NotImplementedError

    def _in_batches(
        self, items: Sequence[Any], encode: Callable[[Sequence[Any]], torch.Tensor]
    ) -> Any:
        size = self.source.settings.batch_size
        parts = [encode(items[first : first + size]) for first in range(0, len(items), size)]
        features = torch.cat(parts).cpu().numpy() if parts else np.zeros((0, 1), np.float32)
        if features.dtype.kind == "i":
            return features.astype(np.int32)  # tokens
        halves = features.astype(np.float16)
        if not np.isfinite(halves).all():
            raise TrainingError(
                "features of a locked tower are not finite in float16; use engine.precision fp32, "
                "or unlock a block of it, so that its features are not stored"
            )
        return halves


class _ImageBlocks(_Blocks):
    """V features of each image, views side by side; and which images are equal."""

    def prepare(self, raw: dict[str, Any]) -> dict[str, Any]:
        sample = parse_sample(raw, caption_key=self.source.decoder.caption_key)
        pixels = self.source.decoder.pixels(sample.image, place_of(raw))
        return {"pixels": pixels, "group": image_group(sample.image)}

    def encode(self, decoded: list[Any]) -> tuple[Any, dict[str, Array]]:
        usable = [one for one in decoded if not isinstance(one, DataError)]
        views = [
            (one["pixels"], one["number"], view)
            for one in usable
            for view in range(self.source.settings.views)
        ]
        features = self._in_batches(views, self._encode_views)
        return features, {
            "groups": np.array(_spread(decoded, "group"), np.int64),
            **_outcome(decoded),
        }

    def _encode_views(self, views: Sequence[tuple[Pixels, int, int]]) -> torch.Tensor:
        source, look = self.source, self.parts.preprocessing
        device = self.trunks.device
        mean, std = normalisation(look, device)
        if source.settings.views == 1:
            pixels = torch.from_numpy(np.stack([pixels for pixels, _, _ in views])).to(device)
            return self.trunks.images(to_input(pixels, look.size, mean, std))
        drawn = [
            augment(
                torch.from_numpy(pixels[None]).to(device),
                source.augmentation,
                look.size,
                mean,
                std,
                torch.Generator().manual_seed(view_seed(source.seed, number, view)),
                drawn_for=source.drawn_for,
            )
            for pixels, number, view in views
        ]
        return self.trunks.images(torch.cat(drawn))


class _TextBlocks(_Blocks):
    """Features of all captions of each sample; and which captions and labels are equal."""

    def prepare(self, raw: dict[str, Any]) -> dict[str, Any]:
        decoder = self.source.decoder
        sample = parse_sample(raw, caption_key=decoder.caption_key, needs_image=False)
        require_captions(sample, raw)
        captions = sample.captions if decoder.captions == "random" else sample.captions[:1]
        label = 0
        if decoder.positives == "label":
            label = group_id(label_of(sample, decoder.label_key, identity_of(raw, sample)))
        return {"captions": captions, "label": label}

    def encode(self, decoded: list[Any]) -> tuple[Any, dict[str, Array]]:
        usable = [one for one in decoded if not isinstance(one, DataError)]
        captions = [caption for one in usable for caption in one["captions"]]
        # Texts of about one length pass together, and are cut to the longest of them.
        order = sorted(range(len(captions)), key=lambda place: len(captions[place]))
        features = self._in_batches([captions[place] for place in order], self._encode_texts)
        unsorted = np.empty_like(features)
        unsorted[order] = features
        counts = [0 if isinstance(one, DataError) else len(one["captions"]) for one in decoded]
        groups = [group_id(normalise_caption(caption)) for caption in captions]
        return unsorted, {
            "counts": np.array(counts, np.int64),
            "captions": np.array(groups, np.int64),
            "labels": np.array(_spread(decoded, "label"), np.int64),
            **_outcome(decoded),
        }

    def _encode_texts(self, captions: Sequence[str]) -> torch.Tensor:
        tokens_BL = self.parts.tokenizer(list(captions))
        return self.trunks.texts(tokens_BL) if "text" in self.trunks.stored else tokens_BL


def _spread(decoded: list[Any], name: str) -> list[int]:
    return [0 if isinstance(one, DataError) else one[name] for one in decoded]


def _outcome(decoded: list[Any]) -> dict[str, Array]:
    """Keys of the samples, and why each that cannot be used cannot; empty for the others."""
    keys = ["" if isinstance(one, DataError) else one["key"] for one in decoded]
    reasons = [
        (skip_reason(one) or "unusable") if isinstance(one, DataError) else "" for one in decoded
    ]
    return {"keys": np.array(keys, np.str_), "reasons": np.array(reasons, np.str_)}


def _key(
    source: FeatureSource, trunks: Encoders, parts: ModelParts, tower: Tower, precision: str
) -> str:
    """Names the folder of a tower's features: everything that they depend on."""
    decoder, shards = source.decoder, source.shard_set
    of_image = {
        "views": source.settings.views,
        "augmentation": source.augmentation.model_dump() if source.settings.views > 1 else None,
        "seed": source.seed if source.settings.views > 1 else None,
        "decode": decoder.decode,
        "pixels": decoder.max_image_pixels,
        "loaded": repr(decoder.preprocessing),
        "drawn_for": source.drawn_for,
    }
    of_text = {
        "captions": decoder.captions,
        "label_key": decoder.label_key if decoder.positives == "label" else None,
        "labels": decoder.positives == "label",
    }
    described = {
        "format": FORMAT,
        "trunk": trunks.fingerprint(parts, tower),
        "precision": precision if tower in trunks.stored else None,
        "caption_key": decoder.caption_key,
        "shards": [*_stamps(shards.shards)],
        "counts": shards.counts,
        "numbers": hashlib.sha256(np.asarray(source.numbers, np.int64).tobytes()).hexdigest(),
        **(of_image if tower == "image" else of_text),
    }
    text = json.dumps(described, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _stamps(shards: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Name, size and time of change of each shard: another file has others."""
    for shard in shards:
        name = shard.rpartition("/")[2]
        if is_remote(shard):
            yield name, 0, 0
            continue
        stat = Path(shard).stat()
        yield name, stat.st_size, stat.st_mtime_ns // 1_000_000_000
