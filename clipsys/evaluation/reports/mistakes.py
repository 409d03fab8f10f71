"""Contact sheets of a result: the worst mistakes, and nearest neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from clipsys.evaluation.embedded import EmbeddedImages
from clipsys.evaluation.reports.sheets import Sheet, Tile
from clipsys.evaluation.results import (
    ClassificationDetails,
    Miss,
    Result,
    RetrievalDetails,
)
from clipsys.evaluation.tasks.neighbours import Neighbours, spread_queries

_NUM_MISTAKES = 18
_A_ROW = 6
Read = Callable[[str], bytes]


def mistake_sheets(result: Result, read: Read) -> list[Sheet]:
    """What a result got most wrong; empty where it has nothing to show.

    Args:
        result: of a classification or a retrieval.
        read: gives an image's bytes by its uri.
    """
    details = result.details
    if isinstance(details, ClassificationDetails):
        return _classification(result, details, read)
    if isinstance(details, RetrievalDetails):
        return _retrieval(result, details, read)
    return []


def neighbour_sheet(images: EmbeddedImages, found: Neighbours, *, model: str, read: Read) -> Sheet:
    """Some images with their nearest neighbours, a row each."""
    rows = []
    for query in spread_queries(images, among=found.queries_S):
        own = images.records[query]
        tiles = [Tile((f"query: {own.label}" if own.label else "query",), own.uri)]
        for place, cosine in zip(*found.of(query), strict=True):
            if place < 0:
                continue
            other = images.records[place]
            mark = ""
            if own.label is not None:
                mark = "right" if other.label == own.label else "wrong"
            lines = (f"{cosine:.3f}", *([other.label] if other.label else []))
            tiles.append(Tile(lines, other.uri, mark))
        rows.append(tiles)
    note = "Each row: an image, and the nearest other ones with their cosine similarity."
    return Sheet(f"Nearest neighbours, {model}", note, rows, read)


def _classification(result: Result, details: ClassificationDetails, read: Read) -> list[Sheet]:
    wrong = np.flatnonzero(details.targets_N != details.predicted_N)
    confidence = np.nan_to_num(details.confidence_N[wrong])
    worst = wrong[np.argsort(-confidence, kind="stable")][:_NUM_MISTAKES]
    if len(worst) == 0:
        return []
    tiles = [
        Tile(
            (
                f"is {details.classes[details.targets_N[place]]}",
                f"predicted {details.classes[details.predicted_N[place]]}"
                + (
                    f", {details.confidence_N[place]:.2f}"
                    if np.isfinite(details.confidence_N[place])
                    else ""
                ),
            ),
            details.uris[place],
            "wrong",
        )
        for place in worst.tolist()
    ]
    note = "The model was surest of these wrong predictions."
    title = f"Worst mistakes, {result.title} of {result.model}"
    return [Sheet(title, note, _in_rows(tiles), read)]


def _retrieval(result: Result, details: RetrievalDetails, read: Read) -> list[Sheet]:
    sheets = []
    for direction, misses in details.misses.items():
        if not misses:
            continue
        by_text = direction == "text_to_image"
        rows = [_miss(one, by_text=by_text) for one in misses]
        note = (
            "Each row: a query, its best correct candidate, and the candidate that was found first."
        )
        title = f"Worst queries, {direction.replace('_', ' ')}, {result.model}"
        sheets.append(Sheet(title, note, rows, read))
    return sheets


def _miss(miss: Miss, *, by_text: bool) -> list[Tile]:
    rank = f"expected, rank {miss.rank:,}"
    if by_text:
        return [
            Tile((miss.query,)),
            Tile((rank,), miss.expected, "right"),
            Tile(("found first",), miss.found, "wrong"),
        ]
    return [
        Tile(("query",), miss.query),
        Tile((rank, miss.expected), mark="right"),
        Tile(("found first", miss.found), mark="wrong"),
    ]


def _in_rows(tiles: Sequence[Tile]) -> list[Sequence[Tile]]:
    return [tiles[start : start + _A_ROW] for start in range(0, len(tiles), _A_ROW)]
