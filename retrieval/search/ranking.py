"""The top k of a snapshot by exact cosine, by way of an index where there is one.

    index ------ candidates (id <= last_id) --.
    segments --- candidates newer than that --+--> re-scored from stored vectors --> sorted --> k

Candidates come from float32 arithmetic, which differs in the last digits between FAISS and numpy
and between batch sizes, or from compressed vectors. So more than k are taken: until the last one is
clearly below the k-th where the index is exact, as many as tuning found to suffice where it is not.
`clipsys.retrieval.search.rescoring` then scores each from its stored vector.

Shapes: Q queries, N candidates, D embedding width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from clipsys.retrieval.indexes.generation import LoadedIndex
from clipsys.retrieval.indexes.id_set import IdSet
from clipsys.retrieval.search.rescoring import SCORE_MARGIN, Ranking, near_best, rescore
from clipsys.retrieval.storage.manifest import SearchEffort
from clipsys.retrieval.storage.segments import Floats, Ints
from clipsys.retrieval.storage.snapshot import Snapshot, unit_rows

#: Candidates beyond k that an index is asked for at first.
_EXTRA = 16
#: With a filter that leaves no more than this, or one in so many, scanning beats the index.
_SCAN_BELOW, _SCAN_SHARE = 4_096, 200
#: Vectors newer than the index that stay in memory: 16,384 x 512 float32 are 32 MB.
_KEEP_ROWS = 16_384
#: Scores held at once by a scan for several queries.
_SCAN_SCORES = 1 << 25


@dataclass(frozen=True, eq=False)
class Coverage:
    """How an index and a snapshot fit together; the same for every search between two commits.

    Attributes:
        num_live: live items that the index covers.
        live: these, where the index has deleted ones too; None where all of its items are live.
        newer_ND: unit vectors of the live items that it does not cover; None: too many to keep.
    """

    num_live: int
    live: IdSet | None
    newer_ND: Floats | None


def cover(snapshot: Snapshot, index: LoadedIndex) -> Coverage:
    """Works out what an index covers of a snapshot."""
    num_live = int(np.searchsorted(snapshot.ids_N, index.generation.last_id, side="right"))
    whole = num_live == index.generation.num_items
    newer_ND = None
    if len(snapshot) - num_live <= _KEEP_ROWS:
        newer_ND = unit_rows(snapshot.take(np.arange(num_live, len(snapshot))))
    return Coverage(num_live, None if whole else IdSet(snapshot.ids_N[:num_live]), newer_ND)


def rank(
    snapshot: Snapshot,
    index: LoadedIndex | None,
    query_D: Floats,
    k: int,
    *,
    allowed: Ints | None = None,
    coverage: Coverage | None = None,
) -> Ranking:
    """The k live items nearest to the query: (ids, cosines), best first, ties by id.

    Args:
        snapshot: what exists. Ids that the index knows and the snapshot does not are not returned.
        index: covers the ids up to its ``last_id``; the rest is scanned. None scans everything.
        query_D: unit norm, float32.
        k: may exceed the number of items; all are returned then.
        allowed: ascending ids; only these may be returned. Applied before ranking.
        coverage: of this index and snapshot, if it is known already.
    """
    return rank_batch(snapshot, index, query_D[None, :], k, allowed=allowed, coverage=coverage)[0]


def rank_batch(
    snapshot: Snapshot,
    index: LoadedIndex | None,
    query_QD: Floats,
    k: int,
    *,
    allowed: Ints | None = None,
    coverage: Coverage | None = None,
) -> list[Ranking]:
    """`rank` for several queries (Q, D): one pass over the index or the vectors for all."""
    positions = None if allowed is None else snapshot.positions(allowed)
    total = len(snapshot) if positions is None else len(positions)
    k = min(k, total)
    if k == 0:
        nothing = (np.empty(0, np.int64), np.empty(0, np.float32))
        return [nothing for _ in query_QD]
    few = positions is not None and total <= max(_SCAN_BELOW, len(snapshot) // _SCAN_SHARE)
    if index is None or few:
        found = scan(snapshot, positions, query_QD, k)
    else:
        coverage = coverage or cover(snapshot, index)
        found = _with_index(snapshot, index, coverage, query_QD, k, positions)
    return rescore(snapshot, found, query_QD, k)


def _with_index(
    snapshot: Snapshot,
    index: LoadedIndex,
    coverage: Coverage,
    query_QD: Floats,
    k: int,
    positions: Ints | None,
) -> list[Ints]:
    if positions is None:
        covered = np.arange(coverage.num_live)
        old = ask_index(index, snapshot, query_QD, k, covered, coverage.live)
        if coverage.newer_ND is None:
            new = scan(snapshot, np.arange(coverage.num_live, len(snapshot)), query_QD, k)
        else:
            ids_N = snapshot.ids_N[coverage.num_live :]
            new = [near_best(ids_N, coverage.newer_ND @ query_D, k) for query_D in query_QD]
    else:
        num_live = int(np.searchsorted(positions, coverage.num_live))
        covered = positions[:num_live]
        live = IdSet(snapshot.ids_N[covered])
        old = ask_index(index, snapshot, query_QD, k, covered, live)
        new = scan(snapshot, positions[num_live:], query_QD, k)
    return [np.concatenate(pair) for pair in zip(old, new, strict=True)]


def scan(snapshot: Snapshot, positions: Ints | None, query_QD: Floats, k: int) -> list[Ints]:
    """For each query, ids among which the true top k of the positions are: scores every one."""
    ids_N = snapshot.ids_N if positions is None else snapshot.ids_N[positions]
    num_rows = len(ids_N)
    if num_rows == 0:
        return [np.empty(0, np.int64) for _ in query_QD]
    found: list[Ints] = []
    at_once = max(1, _SCAN_SCORES // num_rows)
    for first in range(0, len(query_QD), at_once):
        some_QD = query_QD[first : first + at_once]
        scores_QN = np.empty((len(some_QD), num_rows), np.float32)
        start = 0
        for block_ids, vectors_ND in snapshot.blocks(positions):
            stop = start + len(block_ids)
            scores_QN[:, start:stop] = some_QD @ vectors_ND.T
            start = stop
        found += [near_best(ids_N, scores_N, k) for scores_N in scores_QN]
    return found


def ask_index(
    index: LoadedIndex,
    snapshot: Snapshot,
    query_QD: Floats,
    k: int,
    positions: Ints,
    allowed: IdSet | None,
) -> list[Ints]:
    """For each query, ids among which the top k of some items of the index are.

    Args:
        positions: the items that may be found, in the snapshot.
        allowed: the same as a set of ids; None where these are all of the index.
    """
    k = min(k, len(positions))
    if k == 0:
        return [np.empty(0, np.int64) for _ in query_QD]
    if index.effort is None:
        return [_ask_exact(index, query_D, k, len(positions), allowed) for query_D in query_QD]
    found = _ask_tuned(index, index.effort, query_QD, k, len(positions), allowed)
    return [
        # A graph may have nodes that no way leads to; k hits come back whenever k items match.
        ids if len(ids) >= k else scan(snapshot, positions, query_D[None, :], k)[0]
        for ids, query_D in zip(found, query_QD, strict=True)
    ]


def _ask_exact(
    index: LoadedIndex, query_D: Floats, k: int, total: int, allowed: IdSet | None
) -> Ints:
    fetch = min(total, k + _EXTRA)
    while True:
        ids_N, scores_N = index.search(query_D, fetch, allowed=allowed)
        if fetch == total or scores_N[-1] < scores_N[k - 1] - SCORE_MARGIN:
            return ids_N
        fetch = min(total, 2 * fetch)  # many near-ties at the k-th place


def _ask_tuned(
    index: LoadedIndex,
    effort: SearchEffort,
    query_QD: Floats,
    k: int,
    total: int,
    allowed: IdSet | None,
) -> list[Ints]:
    # The effort was tuned for ten hits among all items. The nearest of the one item in s that a
    # filter leaves lie farther out, as do more hits: visits grow with the root of both.
    fetch = min(total, math.ceil(effort.num_candidates * max(k, 10) / 10) + _EXTRA)
    farther = index.generation.num_items / total * max(k, 10) / 10
    start = min(index.max_probes(), math.ceil(effort.num_probes * math.sqrt(farther)))
    _, ids_QN = index.search_batch(query_QD, fetch, allowed=allowed, num_probes=start)
    found: list[Ints] = []
    for ids_N, query_D in zip(ids_QN, query_QD, strict=True):
        ids, num_probes = ids_N[ids_N >= 0], start
        while len(ids) < k and num_probes < index.max_probes():
            num_probes = min(index.max_probes(), 4 * num_probes)
            ids, _ = index.search(query_D, fetch, allowed=allowed, num_probes=num_probes)
        found.append(ids)
    return found
