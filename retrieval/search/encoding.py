"""From queries to `EncodedQuery`s: read the line, encode texts and images, check vectors.

Texts alone are encoded by the text tower in numpy where there is one, without loading the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from clipsys.errors import QueryError
from clipsys.retrieval.encoders.pinned import PinnedEncoder
from clipsys.retrieval.encoders.truncation import tokens_of_encoder, warn_of_cut_texts
from clipsys.retrieval.search.grammar import compose, parse_query
from clipsys.retrieval.search.options import Options
from clipsys.retrieval.search.query import ImageSource, Query, embed_queries
from clipsys.retrieval.search.searching import EncodedQuery
from clipsys.retrieval.storage.segments import Floats


def combine(
    query: str | Query | None,
    *,
    image: ImageSource | None,
    negative: str | None,
    words: str | None,
) -> str | Query | None:
    """One query of all that a search was given; None where it was given nothing.

    Raises:
        QueryError: something stands beside a `Query`, or the query is malformed.
    """
    has_others = any(one is not None for one in (image, negative, words))
    if isinstance(query, Query):
        if has_others:
            raise QueryError("give image, negative and words as parts of the Query")
        return query
    if query is None and not has_others:
        return None
    return compose(query, image=image, negative=negative, words=words)


def read_queries(queries: Sequence[str | Query | None], options: Options) -> list[Query | None]:
    """Reads the queries that are lines.

    Raises:
        QueryError: a line is malformed, or a query, filter and order are all missing.
    """
    if None in queries and not options.conditions and options.sort is None:
        raise QueryError(
            "a query needs something to look for: a text, an image, words, or a filter alone"
        )
    return [parse_query(query) if isinstance(query, str) else query for query in queries]


def encode(
    queries: Sequence[Query | None], embed: Callable[[list[Query]], list[Floats | None]]
) -> list[EncodedQuery]:
    """Encodes the queries that are not None, in one call of ``embed``."""
    vectors = iter(embed([query for query in queries if query is not None]))
    return [
        EncodedQuery(None)
        if query is None
        else EncodedQuery(next(vectors), query.words, query.items, texts_of(query))
        for query in queries
    ]


def texts_of(query: Query | None) -> tuple[str, ...]:
    """The texts of a query that is made of them alone, all for it; else none."""
    if query is None:
        return ()
    texts = [part.text for part in query.parts if part.text is not None and part.weight > 0]
    return tuple(texts) if len(texts) == len(query.parts) else ()


def embed_with_pinned(
    queries: Sequence[Query], encoder: PinnedEncoder, vector_of: Callable[[int], Floats]
) -> list[Floats | None]:
    """Encodes queries with a collection's encoder, and warns of texts that the model cuts.

    Args:
        queries: see `embed_queries`.
        encoder: its model is loaded only where the text tower in numpy does not suffice.
        vector_of: returns the stored vector of an item.
    """
    parts = [part for query in queries for part in query.parts]
    texts = [part.text for part in parts if part.text]
    if not any(part.image is not None for part in parts):
        tower = encoder.light_tower(sum(part.text is not None for part in parts))
        if tower is not None:
            warn_of_cut_texts(texts, tower.tokens)
            return embed_queries(queries, encoder.turns(), vector_of, encode_text=tower.encode_text)
    vectors = embed_queries(queries, encoder.turns(), vector_of)
    tokens_of = tokens_of_encoder(encoder.loaded)
    if tokens_of is not None:
        warn_of_cut_texts(texts, tokens_of)
    encoder.remember_light_tower()  # the next process needs no torch
    return vectors


def encode_vector(vector_D: Floats, dim: int) -> EncodedQuery:
    """A query of one vector (D,), scaled to unit norm.

    Raises:
        QueryError: the vector is of another width, not finite or zero.
    """
    vector_D = np.asarray(vector_D, np.float32)
    norm = float(np.linalg.norm(vector_D))
    if vector_D.shape != (dim,) or not 0 < norm < np.inf:
        raise QueryError(
            f"the query vector has shape {vector_D.shape} and norm {norm:.4g}; expected shape "
            f"({dim},) and a finite norm that is not zero"
        )
    return EncodedQuery(vector_D / norm)
