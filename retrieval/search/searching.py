"""From query vectors and words to hits: filter, rank, fuse, fold, cut.

    filter (SQL) --> allowed ids --.
    query vector -----------------> rank by cosine --.
    words (FTS5) -----------------> rank by BM25 -----+-> fuse -> cut -> fold -> sort -> k hits
    neither ----------------------> newest first -----'

Everything of one search sees one snapshot.

Shapes: K ranked items, D embedding width.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from clipsys.errors import QueryError
from clipsys.retrieval.indexes.generation import LoadedIndex
from clipsys.retrieval.search.calibration import MIN_ITEMS, RELEVANT, Background, Doubles, Scores
from clipsys.retrieval.search.options import NEAR_DUPLICATE, Options
from clipsys.retrieval.search.query import Hit
from clipsys.retrieval.search.ranking import Coverage, rank_batch
from clipsys.retrieval.search.rescoring import Ranking, exact_scores
from clipsys.retrieval.search.text_relevance import TextRelevance
from clipsys.retrieval.search.view import View
from clipsys.retrieval.storage import words
from clipsys.retrieval.storage.conditions import Condition
from clipsys.retrieval.storage.segments import Floats, Ints
from clipsys.retrieval.storage.snapshot import Snapshot, unit_rows
from clipsys.retrieval.storage.sorting import parse_sort
from clipsys.retrieval.storage.store import Store

__all__ = ["NEAR_DUPLICATE", "EncodedQuery", "Options", "Searcher"]

#: Ranks of the vectors that are fused with those of the words; those below hardly count.
_FUSED_RANKS = 200
#: Ranks in which those that a cut leaves are looked for, to sort all of them; more if all pass.
_SORTED_RANKS = 1_000
#: Filters whose result is remembered, as long as nothing is written.
_REMEMBERED_FILTERS = 16


@dataclass(frozen=True, eq=False)
class EncodedQuery:
    """A query after encoding: a vector (D,) of unit norm, words, both, or neither.

    Attributes:
        vector_D: The vector; None for a query without text, image and item.
        words: Words of captions and file names; None for a query without them.
        query_items: Ids of the items whose vectors are part of the query; they are not hits.
        texts: The texts that it is made of, where it is made of nothing else and they all count
            for it; else empty.
    """

    vector_D: Floats | None
    words: str | None = None
    query_items: frozenset[int] = frozenset()
    texts: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _State:
    """What one search sees from its beginning to its end."""

    index: LoadedIndex | None
    snapshot: Snapshot
    coverage: Coverage | None
    background: Background
    text_relevance: TextRelevance | None

    def relevance(self, query: EncodedQuery, scores_K: Scores) -> Doubles | None:
        """The relevance of hits; None where it is not known."""
        assert query.vector_D is not None
        enough = len(self.snapshot) >= MIN_ITEMS
        if self.text_relevance is not None and query.texts and enough:
            return self.text_relevance.relevance(query.texts, query.vector_D, scores_K)
        return self.background.relevance(query.vector_D, scores_K)


@dataclass(frozen=True, eq=False)
class _Ranked:
    """Ranked items; scores and relevance are None where the query has no vector."""

    ids_K: Ints
    scores_K: npt.NDArray[np.float32] | None
    relevance_K: npt.NDArray[np.float64] | None
    duplicates: tuple[tuple[int, ...], ...] = ()

    def take(self, chosen: Ints | slice) -> _Ranked:
        return replace(
            self,
            ids_K=self.ids_K[chosen],
            scores_K=None if self.scores_K is None else self.scores_K[chosen],
            relevance_K=None if self.relevance_K is None else self.relevance_K[chosen],
        )


class Searcher:
    """Answers queries about one collection. Thread-safe."""

    def __init__(self, store: Store, view: View) -> None:
        self._store = store
        self._view = view
        self._filtered: OrderedDict[tuple[str, int], Ints] = OrderedDict()
        self._lock = threading.Lock()

    def search(self, queries: Sequence[EncodedQuery], options: Options) -> list[list[Hit]]:
        """Hits of each query, best first."""
        index, snapshot = self._view.current()
        state = _State(
            index,
            snapshot,
            self._view.coverage(index, snapshot),
            self._view.background(snapshot),
            self._view.text_relevance(),
        )
        allowed = self._allowed(options.conditions, snapshot)
        wanted = options.offset + options.k
        depth = wanted + max(len(query.query_items) for query in queries)
        if any(query.words is not None for query in queries):
            depth = max(depth, _FUSED_RANKS)
        if options.sorts_all:
            depth = max(depth, _SORTED_RANKS)
        while True:
            ranked = self._rank(state, queries, depth, allowed, options.sort)
            cut = [_cut(one, query, options) for one, query in zip(ranked, queries, strict=True)]
            if options.diverse is not None:
                cut = [_fold(one, snapshot, options.diverse) for one in cut]
            # Folding leaves fewer than were ranked, and a sort wants all that a cut leaves: go
            # deeper while there may be more.
            if all(
                len(before.ids_K) < depth or _suffices(one, before, query, options)
                for one, before, query in zip(cut, ranked, queries, strict=True)
            ):
                break
            depth *= 4
        if options.sort is not None:
            cut = [
                self._sorted(one, query, options) for one, query in zip(cut, queries, strict=True)
            ]
        page = slice(options.offset, options.offset + options.k)
        return [self._hits(one, page) for one in cut]

    def _sorted(self, ranked: _Ranked, query: EncodedQuery, options: Options) -> _Ranked:
        """The hits in the order of a key; where nothing cuts a ranking, only its best."""
        if query.vector_D is not None and not options.sorts_all:
            ranked = ranked.take(slice(0, options.offset + options.k))
        return ranked.take(self._order(ranked.ids_K, options.sort))

    def _order(self, ids_K: Ints, sort: str | None) -> Ints:
        """Places of ids in the order of a key; those without it last, equal ones as they were."""
        if sort is None:
            return np.arange(len(ids_K))
        key, descending = parse_sort(sort)
        ids = ids_K.tolist()
        values = self._store.sort_values(ids, key)
        present = [place for place, item_id in enumerate(ids) if item_id in values]
        missing = [place for place, item_id in enumerate(ids) if item_id not in values]
        present.sort(key=lambda place: values[ids[place]], reverse=descending)
        return np.array(present + missing, np.int64)

    def _rank(
        self,
        state: _State,
        queries: Sequence[EncodedQuery],
        depth: int,
        allowed: Ints | None,
        sort: str | None,
    ) -> list[_Ranked]:
        given = [query.vector_D for query in queries if query.vector_D is not None]
        rankings: Iterator[Ranking] = iter(())
        if given:
            rankings = iter(
                rank_batch(
                    state.snapshot,
                    state.index,
                    np.stack(given),
                    depth,
                    allowed=allowed,
                    coverage=state.coverage,
                )
            )
        ranked = []
        for query in queries:
            matched, vector_D = None, query.vector_D
            if query.words is not None:
                matched = self._match_words(query.words, state.snapshot, allowed)
            if vector_D is None:
                if matched is None:  # nothing is asked for: what passes, the last added first
                    newest_N = (state.snapshot.ids_N if allowed is None else allowed)[::-1]
                    matched = newest_N[self._order(newest_N, sort)][:depth]
                ranked.append(_Ranked(matched, None, None))
                continue
            ids_K, scores_K = next(rankings)
            if matched is not None:
                ids_K = words.fuse([ids_K, matched[:depth]])
                positions = np.searchsorted(state.snapshot.ids_N, ids_K)
                scores_K = exact_scores(state.snapshot, positions, vector_D)
            relevance_K = state.relevance(query, scores_K)
            ranked.append(_Ranked(ids_K, scores_K, relevance_K))
        return ranked

    def _match_words(self, text: str, snapshot: Snapshot, allowed: Ints | None) -> Ints:
        ids = self._store.match_words(words.match_expression(text))
        live = np.isin(ids, snapshot.ids_N, assume_unique=True)
        if allowed is not None:
            live &= np.isin(ids, allowed, assume_unique=True)
        found: Ints = ids[live]
        return found

    def _allowed(self, conditions: tuple[Condition, ...], snapshot: Snapshot) -> Ints | None:
        """Ids that pass the filter; remembered until the next commit."""
        if not conditions:
            return None
        key = (repr(conditions), snapshot.change)
        with self._lock:
            if key in self._filtered:
                self._filtered.move_to_end(key)
                return self._filtered[key]
        allowed = self._store.select_ids(conditions)
        with self._lock:
            self._filtered[key] = allowed
            while len(self._filtered) > _REMEMBERED_FILTERS:
                self._filtered.popitem(last=False)
        return allowed

    def _hits(self, ranked: _Ranked, page: slice) -> list[Hit]:
        chosen = ranked.take(page)
        duplicates = ranked.duplicates[page] or ((),) * len(chosen.ids_K)
        items = self._store.items(chosen.ids_K.tolist())
        hits = []
        for place, item_id in enumerate(chosen.ids_K.tolist()):
            if item_id not in items:
                continue  # deleted and compacted away since the snapshot was taken
            item = items[item_id]
            score = None if chosen.scores_K is None else float(chosen.scores_K[place])
            relevance = None if chosen.relevance_K is None else float(chosen.relevance_K[place])
            hits.append(
                Hit(
                    page.start + place + 1,
                    item_id,
                    score,
                    item.uri,
                    item.caption,
                    item.metadata,
                    relevance,
                    duplicates[place],
                )
            )
        return hits


def _cut(ranked: _Ranked, query: EncodedQuery, options: Options) -> _Ranked:
    """Without the items that the query was made of, and without those that score too low."""
    keep_K = ~np.isin(ranked.ids_K, list(query.query_items))
    if options.needs_score and ranked.scores_K is None:
        alone = "words alone have" if query.words is not None else "a filter alone has"
        raise QueryError(f"{alone} no score to cut at; add something to look for")
    if options.min_score is not None and ranked.scores_K is not None:
        keep_K &= ranked.scores_K >= options.min_score
    if options.relevant_only and ranked.relevance_K is not None:
        keep_K &= ranked.relevance_K >= RELEVANT
    return ranked.take(np.flatnonzero(keep_K))


def _suffices(cut: _Ranked, ranked: _Ranked, query: EncodedQuery, options: Options) -> bool:
    """Whether ranking deeper would add nothing to what is asked for."""
    if options.sorts_all:
        return len(cut.ids_K) < len(ranked.ids_K) - len(query.query_items)  # the cut was reached
    return options.diverse is None or len(cut.ids_K) >= options.offset + options.k


def _fold(ranked: _Ranked, snapshot: Snapshot, threshold: float) -> _Ranked:
    """Each item joins the best hit before it that it is a near-duplicate of, if there is one."""
    positions = np.searchsorted(snapshot.ids_N, ranked.ids_K)
    vectors_KD = unit_rows(snapshot.take(positions))
    kept: list[int] = []
    groups: dict[int, list[int]] = {}
    for place, vector_D in enumerate(vectors_KD):
        near = np.flatnonzero(vectors_KD[kept] @ vector_D >= threshold)
        if len(near):
            groups[kept[int(near[0])]].append(int(ranked.ids_K[place]))
        else:
            kept.append(place)
            groups[place] = []
    chosen = ranked.take(np.array(kept, np.int64))
    return replace(chosen, duplicates=tuple(tuple(groups[place]) for place in kept))
