"""Retrieval: texts find their images, and images their texts.

Every figure comes with the number of candidates and with chance level, without which a recall says
little. What counts as a hit is part of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from clipsys.errors import DataError
from clipsys.evaluation import resampling
from clipsys.evaluation.metrics import chance
from clipsys.evaluation.metrics.ranks import DEFAULT_KS, NO_HIT, Ranking, recall_at
from clipsys.evaluation.metrics.relation import Relation
from clipsys.evaluation.metrics.two_way import rank_both
from clipsys.evaluation.results import Figure, Miss, Outcomes, Result, RetrievalDetails

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Captions = Literal["first", "all"]
Duplicates = Literal["equal", "own"]

DIRECTIONS = ("text_to_image", "image_to_text")
#: Queries of each direction that a report shows.
_MISSES = 12
#: Largest k of a recall curve.
_CURVE_END = 100


@dataclass(frozen=True)
class RetrievalTargets:
    """Which texts belong to which images.

    Attributes:
        texts: M queries.
        relation: images that are correct for each text.
        image_of_M: (M,) the image that each text was written for.
        unit_of_N: (N,) equal for images that are the same picture.
        protocol: what counts as a hit, as a sentence.
    """

    texts: list[str]
    relation: Relation
    image_of_M: Integers
    unit_of_N: Integers
    protocol: str

    def __len__(self) -> int:
        return len(self.unit_of_N)


def retrieval_targets(
    items: Iterable[tuple[Sequence[str], dict[str, Any]]],
    *,
    contents: Sequence[str] | None = None,
    captions: Captions = "all",
    match: str | None = None,
    duplicates: Duplicates = "equal",
) -> RetrievalTargets:
    """Decides which images are correct for which texts.

    Args:
        items: captions and metadata of each image, in order.
        contents: hash of each image; equal ones are the same picture.
        captions: whether the first caption or every one is a query.
        match: metadata key; images with the same value are correct for each other's captions.
        duplicates: ``equal``: so are images of equal content, and all images that have a caption
            are correct for it. ``own``: a caption has one image, the one it was written for, as
            CLIP benchmark counts.

    Raises:
        DataError: an item lacks the key, or no item has a caption.
    """
    own_captions: list[list[str]] = []
    names: list[object] = []
    for number, (item_captions, metadata) in enumerate(items):
        if match is not None and match not in metadata:
            raise DataError(
                f"item {number} has no metadata key {match!r}; "
                f"it has {', '.join(sorted(metadata)) or 'none'}"
            )
        chosen = item_captions[:1] if captions == "first" else item_captions
        own_captions.append([text for text in chosen if text])
        names.append(number if match is None else repr(metadata[match]))
    joined = duplicates == "equal"
    picture_N = _numbered(contents) if contents is not None else np.arange(len(names))
    group_N = _numbered(names)
    if joined:
        group_N = _merge(group_N, picture_N)
    texts = [text for own in own_captions for text in own]
    if not texts:
        raise DataError(
            "no item has a caption, so there is nothing to search with; name the column with "
            "--caption-column, or put NAME.txt beside NAME.jpg"
        )
    image_of_M = np.repeat(np.arange(len(own_captions)), [len(own) for own in own_captions])
    groups_of: dict[object, dict[int, None]] = {}
    for number, (text, group) in enumerate(zip(texts, group_N[image_of_M].tolist(), strict=True)):
        groups_of.setdefault(text if joined else number, {})[group] = None
    lists = [list(groups_of[text if joined else number]) for number, text in enumerate(texts)]
    return RetrievalTargets(
        texts,
        Relation.of_lists(lists, group_N),
        image_of_M,
        picture_N,
        _protocol(captions, match, duplicates),
    )


def retrieval_figures(
    image_ND: Floats, text_MD: Floats, targets: RetrievalTargets
) -> dict[str, float]:
    """The values of `retrieval_result` by name, without intervals."""
    return _result(image_ND, text_MD, targets, with_intervals=False).metrics()


def retrieval_result(
    image_ND: Floats,
    text_MD: Floats,
    targets: RetrievalTargets,
    *,
    uris: Sequence[str],
    model: str,
    data: str,
    advance: Callable[[int], object] = lambda _: None,
) -> Result:
    """Recall at 1, 5 and 10, median rank and mean average precision, in both directions.

    Args:
        image_ND: (N, D) unit norm.
        text_MD: (M, D) unit norm.
        targets: what is correct.
        uris: of the images.
        model: name of the model.
        data: name of the data set.
        advance: called with the number of queries done, N + M in all.

    Raises:
        ModelError: a vector is not finite.
    """
    return _result(image_ND, text_MD, targets, uris=uris, model=model, data=data, advance=advance)


def _result(
    image_ND: Floats,
    text_MD: Floats,
    targets: RetrievalTargets,
    *,
    uris: Sequence[str] | None = None,
    model: str = "",
    data: str = "",
    with_intervals: bool = True,
    advance: Callable[[int], object] = lambda _: None,
) -> Result:
    uris = [str(number) for number in range(len(image_ND))] if uris is None else uris
    written_for = targets.image_of_M.tolist()
    keys = [f"{uris[one]} {text}" for one, text in zip(written_for, targets.texts, strict=True)]
    unit_of_M = targets.unit_of_N[targets.image_of_M]
    reverse = targets.relation.transposed(len(image_ND))
    sides = (
        _Side("text_to_image", text_MD, image_ND, targets.relation, keys, unit_of_M),
        _Side("image_to_text", image_ND, text_MD, reverse, uris, targets.unit_of_N),
    )
    figures: dict[str, Figure] = {}
    counts: dict[str, float] = {}
    outcomes: dict[str, Outcomes] = {}
    curves, chances, misses = {}, {}, {}
    rankings = rank_both(text_MD, image_ND, targets.relation, advance=advance)
    for side, ranking in zip(sides, rankings, strict=True):
        # An image without a caption is a candidate, and no query.
        asked = side.relation.counts() > 0
        measured = _measure(side, ranking, asked, with_intervals=with_intervals)
        figures |= measured.figures
        outcomes[side.name] = measured.outcomes
        counts[f"{side.name}/candidates"] = len(side.candidates)
        counts[f"{side.name}/queries"] = int(asked.sum())
        if with_intervals:
            ks = _curve_ks(len(side.candidates))
            first = ranking.first_Q[asked]
            curves[side.name] = {k: float((first < k).mean()) for k in ks}
            chances[side.name] = chance.chance_recall(
                side.relation.counts()[asked], len(side.candidates), ks
            )
            misses[side.name] = _misses(side, ranking, asked, targets.texts, uris)
    return Result(
        task="retrieval",
        model=model,
        data=data,
        protocol=targets.protocol,
        figures=figures,
        counts=counts,
        outcomes=outcomes,
        details=RetrievalDetails(curves, chances, misses) if with_intervals else None,
    )


@dataclass(frozen=True)
class _Side:
    """One direction: queries, candidates, and what is correct."""

    name: str
    queries: Floats
    candidates: Floats
    relation: Relation
    keys: Sequence[str]
    unit_of_Q: Integers


@dataclass(frozen=True)
class _Measured:
    figures: dict[str, Figure]
    outcomes: Outcomes


def _measure(
    side: _Side, ranking: Ranking, asked: npt.NDArray[np.bool_], *, with_intervals: bool
) -> _Measured:
    first = ranking.first_Q[asked]
    units = _numbered(side.unit_of_Q[asked].tolist())
    values = {f"recall@{k}": (first < k).astype(np.float64) for k in DEFAULT_KS}
    values["map"] = ranking.precision_Q[asked]
    ranks = first.astype(np.float64) + 1
    intervals: dict[str, tuple[float, float] | None] = {}
    if with_intervals:
        intervals = resampling.mean_intervals(values, units)
        intervals["median_rank"] = resampling.median_interval(ranks, units)
    correct = side.relation.counts()[asked]
    total = len(side.candidates)
    chances = {
        f"recall@{k}": v for k, v in chance.chance_recall(correct, total, DEFAULT_KS).items()
    }
    chances["map"] = chance.chance_precision(correct, total)
    chances["median_rank"] = chance.chance_median_rank(correct, total)
    found = recall_at(first) | {
        "median_rank": float(np.median(ranks)),
        "map": float(values["map"].mean()),
    }
    figures = {
        f"{side.name}/{name}": Figure(value, len(first), intervals.get(name), chances.get(name))
        for name, value in found.items()
    }
    keys = [key for key, one in zip(side.keys, asked, strict=True) if one]
    return _Measured(figures, Outcomes(keys, units, values))


def _misses(
    side: _Side,
    ranking: Ranking,
    asked: npt.NDArray[np.bool_],
    texts: Sequence[str],
    uris: Sequence[str],
) -> list[Miss]:
    queries, candidates = (texts, uris) if side.name == "text_to_image" else (uris, texts)
    missed = np.flatnonzero(asked & (ranking.first_Q > 0) & (ranking.first_Q < NO_HIT))
    worst = missed[np.argsort(-ranking.first_Q[missed], kind="stable")][:_MISSES]
    top = [int((side.candidates @ side.queries[place]).argmax()) for place in worst.tolist()]
    return [
        Miss(
            queries[place],
            candidates[ranking.best_Q[place]],
            candidates[found],
            int(ranking.first_Q[place]) + 1,
        )
        for place, found in zip(worst.tolist(), top, strict=True)
    ]


def _curve_ks(num_candidates: int) -> list[int]:
    end = min(_CURVE_END, num_candidates)
    return sorted(
        {int(k) for k in np.geomspace(1, end, 25).round()} | {*DEFAULT_KS} & {*range(end)}
    )


def _numbered(values: Sequence[object]) -> Integers:
    """Equal values have equal numbers, in the order of their first appearance."""
    known: dict[object, int] = {}
    return np.array([known.setdefault(value, len(known)) for value in values], np.int64)


def _merge(first_N: Integers, second_N: Integers) -> Integers:
    """Groups that contain both what is equal by one numbering and what is equal by the other."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    if len(first_N) == 0:
        return first_N
    offset = int(first_N.max()) + 1
    size = offset + int(second_N.max()) + 1
    edges = coo_matrix((np.ones(len(first_N)), (first_N, offset + second_N)), shape=(size, size))
    _, component = connected_components(edges, directed=False)
    return np.asarray(component, np.int64)[first_N]


def _protocol(captions: Captions, match: str | None, duplicates: Duplicates) -> str:
    queries = "every caption" if captions == "all" else "the first caption of each image"
    hits = ["the image it was written for"]
    if match is not None:
        hits.append(f"any image with the same {match}")
    if duplicates == "equal":
        hits += ["images of equal content", "images with an equal caption"]
    listed = hits[0] if len(hits) == 1 else f"{', '.join(hits[:-1])} and {hits[-1]}"
    return (
        f"{queries} is a query and its hits are {listed}; an image finds its captions likewise; a "
        "query counts by its best hit, and wrong candidates that tie with it count as better"
    )
