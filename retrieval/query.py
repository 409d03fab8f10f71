"""What is searched for, and what comes back.

A query is a weighted sum of parts: texts, images, items that are already in the collection
("more like this"), each positive or negative. The parts become unit vectors, their weighted sum is
scaled to unit norm, and an item's score is its cosine with that.

Shapes: D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from clipsys.errors import QueryError
from clipsys.images import decode_image
from clipsys.retrieval.encoding import ImageTextEncoder
from clipsys.retrieval.segments import Floats

ImageSource: TypeAlias = str | Path | bytes | Image.Image

#: Weight of a negative part unless one is given. At -1 what the two texts share (everything that
#: makes them *texts* to CLIP) cancels, and the hits are whatever differs most from the negative.
NEGATIVE_WEIGHT = -0.5


@dataclass(frozen=True)
class Part:
    """One part of a query: exactly one of text, image and item, with a weight.

    Raises:
        QueryError: it is none or several of them, the text is blank or the weight is zero.
    """

    text: str | None = None
    image: ImageSource | None = field(default=None, repr=False)
    item: int | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        given = [value for value in (self.text, self.image, self.item) if value is not None]
        if len(given) != 1:
            raise QueryError(
                f"a query part is one of text, image and item; this one has {len(given)} of them"
            )
        if self.text is not None and not self.text.strip():
            raise QueryError("the query text is empty; say what to look for")
        if not np.isfinite(self.weight) or self.weight == 0:
            raise QueryError(
                f"the weight of a query part is {self.weight}; expected a number not 0"
            )


@dataclass(frozen=True)
class Query:
    """Parts that are added up.

    Raises:
        QueryError: there is no positive part.
    """

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if not any(part.weight > 0 for part in self.parts):
            raise QueryError(
                "a query needs something to look for; give a text or an image besides what to avoid"
            )

    @classmethod
    def of(
        cls,
        text: str | None = None,
        *,
        image: ImageSource | None = None,
        negative: str | None = None,
        item: int | None = None,
    ) -> Query:
        """The common query: a text and/or an image and/or an item, without something."""
        parts = [
            Part(text=text) if text is not None else None,
            Part(image=image) if image is not None else None,
            Part(item=item) if item is not None else None,
            Part(text=negative, weight=NEGATIVE_WEIGHT) if negative is not None else None,
        ]
        return cls(tuple(part for part in parts if part is not None))

    @property
    def items(self) -> frozenset[int]:
        """Ids of the items that the query builds on."""
        return frozenset(part.item for part in self.parts if part.item is not None)


@dataclass(frozen=True)
class Hit:
    """One search result.

    Attributes:
        rank: 1 is the best.
        id: the item's id in the collection; never used for another item.
        score: cosine similarity of the query with the item's stored vector, in [-1, 1].
        uri: where the image is: a file's path, or ``/path/shard.tar#KEY``.
        caption: its first caption, if it has one.
        metadata: as the source gave it.
    """

    rank: int
    id: int
    score: float
    uri: str
    caption: str | None
    metadata: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form that `clipsys search --json` prints."""
        return {
            "rank": self.rank,
            "id": self.id,
            "score": self.score,
            "uri": self.uri,
            "caption": self.caption,
            "metadata": dict(self.metadata),
        }


def embed_query(
    query: Query, encoder: ImageTextEncoder, vector_of: Callable[[int], Floats]
) -> Floats:
    """Encodes a query. Returns (D,) float32 of unit norm.

    Args:
        query: its texts are encoded in one batch, its images in another.
        encoder: the one that made the collection's vectors.
        vector_of: gives the stored vector of an item; raises `QueryError` for an unknown id.

    Raises:
        ImageDecodeError: an image part does not decode.
        QueryError: the parts cancel out.
    """
    total_D = np.zeros(encoder.dim, np.float64)
    texts = [part for part in query.parts if part.text is not None]
    images = [part for part in query.parts if part.image is not None]
    if texts:
        vectors_ND = encoder.encode_text([part.text or "" for part in texts])
        total_D += np.array([part.weight for part in texts]) @ vectors_ND.astype(np.float64)
    if images:
        pixels = np.stack([encoder.preprocess(_decoded(part.image)) for part in images])
        vectors_ND = encoder.encode_pixels(pixels)
        total_D += np.array([part.weight for part in images]) @ vectors_ND.astype(np.float64)
    for part in query.parts:
        if part.item is not None:
            total_D += part.weight * vector_of(part.item).astype(np.float64)
    norm = float(np.linalg.norm(total_D))
    if norm < 1e-6:
        raise QueryError("the parts of the query cancel out; change their weights or leave one out")
    unit_D: Floats = (total_D / norm).astype(np.float32)
    return unit_D


def _decoded(image: ImageSource | None) -> Image.Image:
    assert image is not None
    return image.convert("RGB") if isinstance(image, Image.Image) else decode_image(image)
