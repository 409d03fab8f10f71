"""What is searched for, and what comes back.

A query is a weighted sum of parts: texts, images, items that are already in the collection
("more like this"), each positive or negative. The parts become unit vectors, their weighted sum is
scaled to unit norm, and an item's score is its cosine with that. Besides, or instead, it may hold
words for the captions to contain. `clipsys.retrieval.search.grammar` reads a query in one line.

Shapes: D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from clipsys.errors import QueryError
from clipsys.images.decoding import decode_image, finish_opened
from clipsys.retrieval.encoders.encoding import ImageTextEncoder
from clipsys.retrieval.storage.segments import Floats

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
    """Parts that are added up, and words that captions and file names are searched for.

    With both, the two rankings are fused.

    Raises:
        QueryError: there is no positive part, and there are no words without parts.
    """

    parts: tuple[Part, ...] = ()
    words: str | None = None

    def __post_init__(self) -> None:
        words_alone = self.words is not None and not self.parts
        if not words_alone and not any(part.weight > 0 for part in self.parts):
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
        words: str | None = None,
    ) -> Query:
        """The common query: a text and/or an image and/or an item, without something.

        The texts are taken as they are; signs and weights in them mean nothing.
        """
        parts = [
            Part(text=text) if text is not None else None,
            Part(image=image) if image is not None else None,
            Part(item=item) if item is not None else None,
            Part(text=negative, weight=NEGATIVE_WEIGHT) if negative is not None else None,
        ]
        return cls(tuple(part for part in parts if part is not None), words)

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
        score: cosine similarity of the query with the item's stored vector, in [-1, 1]; None where
            only words were asked for, or nothing.
        uri: where the image is: a file's path, or ``/path/shard.tar#KEY``.
        caption: its first caption, if it has one.
        metadata: as the source gave it.
        relevance: from 1.3 on the hit is hardly chance; None without a score, or where that cannot
            be told. Of a text, where its model's captions are known, 2.3 is what the best hit of a
            typical caption has (`clipsys.retrieval.search.text_relevance`); else it is minus the
            decimal logarithm of how many unrelated items would score as high, 0 for one, 2 for a
            hundredth (`clipsys.retrieval.search.calibration`).
        duplicates: ids of near-duplicates that were folded into this hit, best first.
    """

    rank: int
    id: int
    score: float | None
    uri: str
    caption: str | None
    metadata: Mapping[str, Any]
    relevance: float | None = None
    duplicates: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The JSON form that `clipsys search --json` prints."""
        return {
            "rank": self.rank,
            "id": self.id,
            "score": self.score,
            "uri": self.uri,
            "caption": self.caption,
            "metadata": dict(self.metadata),
            "relevance": self.relevance,
            "duplicates": list(self.duplicates),
        }


def embed_query(
    query: Query, encoder: ImageTextEncoder, vector_of: Callable[[int], Floats]
) -> Floats:
    """Encodes a query that has parts. Returns (D,) float32 of unit norm; see `embed_queries`."""
    (vector_D,) = embed_queries([query], encoder, vector_of)
    assert vector_D is not None
    return vector_D


def embed_queries(
    queries: Sequence[Query],
    encoder: ImageTextEncoder,
    vector_of: Callable[[int], Floats],
    *,
    encode_text: Callable[[list[str]], Floats] | None = None,
) -> list[Floats | None]:
    """Encodes queries: (D,) float32 of unit norm each, None where there are words alone.

    Args:
        queries: the texts of all are encoded in one batch, the images in another.
        encoder: the one that made the collection's vectors; not touched if there are no images and
            ``encode_text`` is given.
        vector_of: gives the stored vector of an item; raises `QueryError` for an unknown id.
        encode_text: encodes texts in the encoder's place.

    Raises:
        ImageDecodeError: an image part does not decode.
        QueryError: the parts of a query cancel out.
    """
    parts = [part for query in queries for part in query.parts]
    # Before a model is loaded: a path that names no image is said at once.
    decoded = {
        place: _decoded(part.image) for place, part in enumerate(parts) if part.image is not None
    }
    vectors: dict[int, Floats] = {}  # by the part's place in `parts`
    texts = [place for place, part in enumerate(parts) if part.text is not None]
    if texts:
        encode_text = encode_text or encoder.encode_text
        encoded_ND = encode_text([parts[place].text or "" for place in texts])
        vectors.update(zip(texts, encoded_ND, strict=True))
    if decoded:
        pixels = np.stack([encoder.preprocess(image) for image in decoded.values()])
        vectors.update(zip(decoded, encoder.encode_pixels(pixels), strict=True))
    for place, part in enumerate(parts):
        if part.item is not None:
            vectors[place] = vector_of(part.item)
    summed: list[Floats | None] = []
    first = 0
    for query in queries:
        places = range(first, first + len(query.parts))
        first += len(query.parts)
        summed.append(_unit_sum(query, [vectors[place] for place in places]))
    return summed


def _unit_sum(query: Query, vectors: Sequence[Floats]) -> Floats | None:
    if not query.parts:
        return None
    weights = np.array([part.weight for part in query.parts])
    total_D = weights @ np.stack(vectors).astype(np.float64)
    norm = float(np.linalg.norm(total_D))
    if norm < 1e-6:
        raise QueryError("the parts of the query cancel out; change their weights or leave one out")
    unit_D: Floats = (total_D / norm).astype(np.float32)
    return unit_D


def _decoded(image: ImageSource) -> Image.Image:
    return finish_opened(image) if isinstance(image, Image.Image) else decode_image(image)
