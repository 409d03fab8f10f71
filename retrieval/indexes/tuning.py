"""Measuring an index against exact search, and making it look just hard enough.

Two numbers decide what an approximate index finds: how many lists (or graph nodes) it visits, and
how many of its candidates are scored again from the stored vectors. Both are raised on one half of
the queries until the recall is reached, and confirmed on the other half, which the choice has not
seen. Text queries come from another distribution than the images that an index was trained on and
need more visits, so both kinds have to reach the recall, each by itself.

Shapes: Q queries, N items, K neighbours, C candidates, D embedding width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipsys.errors import ClipsysError, RecallError
from clipsys.retrieval.encoders.encoding import ImageTextEncoder
from clipsys.retrieval.indexes.generation import search_parameters
from clipsys.retrieval.indexes.planning import IndexPlan
from clipsys.retrieval.storage.manifest import SearchEffort
from clipsys.retrieval.storage.segments import Floats, Ints
from clipsys.retrieval.storage.snapshot import Snapshot, unit_rows
from clipsys.retrieval.storage.store import Store

_logger = logging.getLogger(__name__)

#: Recall is measured at this many neighbours.
NEIGHBOURS = 10
#: Queries of each kind, at most; half of them are held out.
NUM_QUERIES = 400
#: With fewer captions than this everyday words are the text queries.
_MIN_CAPTIONS = 50
_TEMPLATES = ("a photo of a {}", "{} outdoors at night", "a close-up of a {}")
_WORDS = (
    "dog cat horse bird fish cow sheep elephant bear flower tree forest mountain lake river beach "
    "sea island desert snow rain cloud sunset sky road street bridge house church castle tower "
    "station airport market kitchen bedroom office classroom garden park playground stadium car "
    "bus train bicycle motorcycle boat ship plane truck man woman child baby family crowd wedding "
    "concert party dance game football tennis skateboard surfboard kite book newspaper map letter "
    "sign screen phone computer keyboard camera clock lamp chair table sofa bed mirror window door "
    "bread cake pizza fruit apple banana vegetable coffee wine bottle cup plate knife shirt dress "
    "shoe hat bag umbrella glasses ring painting statue drawing diagram chart toy guitar piano drum"
)
#: Cosines that differ by less may come out either way in float32.
_TIE = 1e-5
#: Vectors that all queries are compared with at once.
_PIECE_ROWS = 4_096
#: Steps of the candidates that are scored again.
_CANDIDATES = (10, 20, 40, 80, 120, 160, 240, 320, 480, 640, 960, 1280)
#: Scoring a candidate again takes as long as scanning so many codes: 0.6 us against 0.025.
_CODES_PER_CANDIDATE = 24


@dataclass(frozen=True, eq=False)
class TuningQueries:
    """What an index is tuned and measured with, by kind.

    Attributes:
        vectors: unit-norm queries (Q, D), such as encoded captions under ``text``.
    """

    vectors: dict[str, Floats]


@dataclass(frozen=True, eq=False)
class _Examples:
    """Queries with their true neighbours."""

    queries_QD: Floats
    nearest_QK: Ints


def caption_queries(encoder: ImageTextEncoder, store: Store, snapshot: Snapshot) -> TuningQueries:
    """Text queries for a collection: its own captions, spread over it, if it has enough."""
    items = store.items(snapshot.spread(NUM_QUERIES).tolist())
    return text_queries(encoder, [item.caption for item in items.values() if item.caption])


def text_queries(encoder: ImageTextEncoder, captions: Sequence[str]) -> TuningQueries:
    """Encodes captions, or where a collection has none, everyday words, as queries.

    An encoder that cannot be loaded is no reason to go without an index: it is tuned with images.
    """
    texts = list(captions) if len(captions) >= _MIN_CAPTIONS else _everyday_texts()
    try:
        return TuningQueries({"text": encoder.encode_text(texts)})
    except ClipsysError as error:
        _logger.warning("the index is tuned without text queries: %s", error)
        return TuningQueries({})


def _everyday_texts() -> list[str]:
    return [template.format(word) for template in _TEMPLATES for word in _WORDS.split()]


def tune(
    index: Any, plan: IndexPlan, snapshot: Snapshot, queries: TuningQueries | None
) -> SearchEffort:
    """Finds the least effort that reaches the plan's recall on held-out queries.

    Args:
        index: filled with the snapshot's vectors.
        plan: what was built, and the recall to reach.
        snapshot: for exact search.
        queries: beside these, vectors of the collection itself are queries of kind ``image``.

    Raises:
        RecallError: even the greatest effort does not reach the recall.
    """
    kinds = {"image": _stored(snapshot)}
    for kind, vectors_QD in (queries.vectors if queries else {}).items():
        some_QD = vectors_QD[:NUM_QUERIES]
        kinds[kind] = _asked(snapshot, some_QD)
    seen = {kind: _every_other(examples, 0) for kind, examples in kinds.items()}
    held_out = {kind: _every_other(examples, 1) for kind, examples in kinds.items()}
    reached: dict[str, float] = {}
    best: SearchEffort | None = None
    for num_probes in _ladder(plan):
        wanted = _candidates_wanted(index, plan, num_probes, seen)
        if wanted is None:
            continue
        # What sufficed for the one half may be a little short for the other: then go on.
        for num_candidates in (step for step in _CANDIDATES if wanted <= step <= 4 * wanted):
            reached = {
                kind: recall_curve(index, plan.kind, examples, num_probes, num_candidates)[-1]
                for kind, examples in held_out.items()
            }
            if min(reached.values()) >= plan.recall:
                break
        else:
            continue
        effort = SearchEffort(
            num_probes=num_probes,
            num_candidates=num_candidates,
            recall={kind: round(value, 4) for kind, value in reached.items()},
            num_queries=min(len(one.queries_QD) for one in held_out.values()),
        )
        # The fewest lists that do may need the most candidates: go on while it gets cheaper.
        if best is not None and _cost(plan, effort) >= _cost(plan, best):
            break
        best = effort
    if best is None:
        raise RecallError(
            f"the {plan.kind} index reaches a recall of {_as_text(reached) or 'less'} at its "
            f"greatest effort, {plan.recall:g} was asked for; ask for less, or allow the memory "
            "of another kind"
        )
    _logger.info("index tuned: %d probes, %d candidates, recall %s", best.num_probes,
                 best.num_candidates, _as_text(best.recall))  # fmt: skip
    return best


def _cost(plan: IndexPlan, effort: SearchEffort) -> float:
    """What a query costs, in codes scanned."""
    scanned = effort.num_probes * plan.num_items / max(plan.num_lists, 1)
    return scanned + _CODES_PER_CANDIDATE * effort.num_candidates


def _as_text(recall: dict[str, float]) -> str:
    return ", ".join(f"{kind} {value:.3f}" for kind, value in recall.items())


def _every_other(examples: _Examples, first: int) -> _Examples:
    chosen = slice(first if len(examples.queries_QD) > 1 else 0, None, 2)
    return _Examples(examples.queries_QD[chosen], examples.nearest_QK[chosen])


def _ladder(plan: IndexPlan) -> Iterator[int]:
    """Efforts in steps of about a fifth, up to looking everywhere."""
    most = plan.num_lists or min(plan.num_items, 4_096)
    effort = 4.0 if plan.num_lists else 16.0
    while round(effort) < most:
        yield round(effort)
        effort *= 1.2
    yield most


def _candidates_wanted(
    index: Any, plan: IndexPlan, num_probes: int, kinds: dict[str, _Examples]
) -> int | None:
    """The fewest candidates with which all kinds reach the recall; None where none suffice."""
    most = 0
    for examples in kinds.values():
        curve = recall_curve(index, plan.kind, examples, num_probes, _CANDIDATES[-1])
        enough = [step for step in _CANDIDATES if curve[step - 1] >= plan.recall]
        if not enough:
            return None
        most = max(most, enough[0])
    return most


def recall_curve(
    index: Any, kind: str, examples: _Examples, num_probes: int, num_candidates: int
) -> list[float]:
    """Recall@10 if the first 1, 2, … candidates are scored again exactly."""
    _, ids_QC = index.search(
        examples.queries_QD, num_candidates, params=search_parameters(kind, num_probes)
    )
    num_sought = (examples.nearest_QK >= 0).sum()
    hits_C = np.zeros(num_candidates)
    for neighbour_Q in examples.nearest_QK.T:
        found_QC = (ids_QC == neighbour_Q[:, None]) & (neighbour_Q[:, None] >= 0)
        hits_C += found_QC.sum(axis=0)
    if num_sought == 0:
        return [1.0] * num_candidates  # of a single item nothing else is near
    curve: list[float] = (np.cumsum(hits_C) / num_sought).tolist()
    return curve


def _asked(snapshot: Snapshot, queries_QD: Floats) -> _Examples:
    return _Examples(queries_QD, _determined(*_nearest(snapshot, queries_QD, NEIGHBOURS + 1)))


def _stored(snapshot: Snapshot) -> _Examples:
    """Image queries: items of the collection, each with its true neighbours but itself.

    A stored vector finds itself, however little an index finds, so it does not count.
    """
    count = min(NUM_QUERIES, len(snapshot))
    chosen = np.linspace(0, len(snapshot) - 1, count).astype(np.int64)
    queries_QD = unit_rows(snapshot.take(chosen))
    nearest_QK, scores_QK = _nearest(snapshot, queries_QD, NEIGHBOURS + 2)
    others = nearest_QK != snapshot.ids_N[chosen, None]
    others[others.all(axis=1), -1] = False  # among equal vectors it may not be in the list at all
    ids_QK, others_QK = (
        table[others].reshape(count, NEIGHBOURS + 1) for table in (nearest_QK, scores_QK)
    )
    return _Examples(queries_QD, _determined(ids_QK, others_QK))


def _determined(ids_QK: Ints, scores_QK: Floats) -> Ints:
    """All neighbours but the last; -1 for those that are as near as that one.

    Where more items are equally near than are sought (a thousand copies of one picture), which of
    them is found is a matter of chance and no fault of an index.
    """
    beyond_Q1 = np.where(ids_QK[:, -1:] >= 0, scores_QK[:, -1:], -np.inf)
    found: Ints = np.where(scores_QK[:, :-1] > beyond_Q1 + _TIE, ids_QK[:, :-1], -1)
    return found


def exact_neighbours(snapshot: Snapshot, queries_QD: Floats, k: int) -> Ints:
    """Ids of the true nearest, (Q, K), by comparing everything block by block; -1 where fewer."""
    return _nearest(snapshot, queries_QD, k)[0]


def _nearest(snapshot: Snapshot, queries_QD: Floats, k: int) -> tuple[Ints, Floats]:
    """As `exact_neighbours`, with the cosines."""
    best_QK = np.full((len(queries_QD), k), -np.inf, np.float32)
    ids_QK = np.full((len(queries_QD), k), -1, np.int64)
    for ids_N, vectors_ND in _pieces(snapshot):
        scores_QC = np.concatenate([best_QK, queries_QD @ vectors_ND.T], axis=1)
        chosen_QK = np.argpartition(scores_QC, -k, axis=1)[:, -k:]
        best_QK = np.take_along_axis(scores_QC, chosen_QK, axis=1)
        known_QK = np.take_along_axis(ids_QK, np.minimum(chosen_QK, k - 1), axis=1)
        new_QK = ids_N[np.maximum(chosen_QK - k, 0)]
        ids_QK = np.where(chosen_QK < k, known_QK, new_QK)
    order_QK = np.argsort(-best_QK, axis=1, kind="stable")
    return (
        np.take_along_axis(ids_QK, order_QK, axis=1),
        np.take_along_axis(best_QK, order_QK, axis=1),
    )


def _pieces(snapshot: Snapshot) -> Iterator[tuple[Ints, Floats]]:
    """`Snapshot.blocks` in shorter pieces: some hundred queries are compared with each at once."""
    for ids_N, vectors_ND in snapshot.blocks():
        for start in range(0, len(ids_N), _PIECE_ROWS):
            yield ids_N[start : start + _PIECE_ROWS], vectors_ND[start : start + _PIECE_ROWS]
