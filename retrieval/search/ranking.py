"""The top k of a snapshot by exact cosine, by way of an index where there is one.

    index ------ candidates (id <= last_id) --.
    segments --- candidates newer than that --+--> re-scored from stored vectors --> sorted --> k

Candidates come from float32 arithmetic, which differs in the last digits between FAISS and numpy
and between batch sizes, or from compressed vectors. So more than k are taken: until the last one is
clearly below the k-th where the index is exact, as many as tuning found to suffice where it is not.
Then each is scored again in float32 from its stored vector, and those that may be among the best k
once more, row by row in float64. Scores are therefore exact cosines of the stored
vectors, and equal scores are ordered by id, whether an index was used or not.

Shapes: Q queries, N candidates, D embedding width.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clipsys.retrieval.indexes.generation import LoadedIndex
from clipsys.retrieval.indexes.id_set import IdSet
from clipsys.retrieval.storage.manifest import SearchEffort
from clipsys.retrieval.storage.segments import Floats, Ints
from clipsys.retrieval.storage.snapshot import Snapshot, unit_rows

Ranking = tuple[Ints, npt.NDArray[np.float32]]

#: Above the rounding error of a float32 inner product of unit vectors (about 1e-6 at D = 1,024).
SCORE_MARGIN = 1e-5
#: Candidates beyond k that an index is asked for at first.
_EXTRA = 16
#: With a filter that leaves no more than this, or one in so many, scanning beats the index.
_SCAN_BELOW, _SCAN_SHARE = 4_096, 200
_RESCORE_ROWS = 4_096
#: Vectors newer than the index that are kept in memory: 16,384 x 512 float32 are 32 MB.
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
            new = [_near(ids_N, coverage.newer_ND @ query_D, k) for query_D in query_QD]
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
        found += [_near(ids_N, scores_N, k) for scores_N in scores_QN]
    return found


def _near(ids_N: Ints, scores_N: npt.NDArray[np.float32], k: int) -> Ints:
    """The ids whose scores are not clearly below the k-th best."""
    if len(ids_N) <= k:
        return ids_N
    kth = np.partition(scores_N, len(scores_N) - k)[len(scores_N) - k]
    near: Ints = ids_N[scores_N >= kth - SCORE_MARGIN]
    return near


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


def rescore(
    snapshot: Snapshot, candidates: Sequence[Ints], query_QD: Floats, k: int
) -> list[Ranking]:
    """For each query the best k of its candidates by exact cosine, ties by id.

    The vectors of several queries are read at once, on several threads where there are many.
    """
    groups = list(_groups([len(ids) for ids in candidates]))

    def rank_group(group: slice) -> list[Ranking]:
        return _rescore_group(snapshot, candidates[group], query_QD[group], k)

    if len(groups) <= 2:
        ranked = map(rank_group, groups)
        return [one for some in ranked for one in some]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [one for some in pool.map(rank_group, groups) for one in some]


def _groups(lengths: Sequence[int]) -> Iterator[slice]:
    """Queries in groups with up to `_RESCORE_ROWS` candidates, or one query."""
    first = total = 0
    for place, length in enumerate(lengths):
        if place > first and total + length > _RESCORE_ROWS:
            yield slice(first, place)
            first, total = place, 0
        total += length
    yield slice(first, len(lengths))


def _rescore_group(
    snapshot: Snapshot, candidates: Sequence[Ints], query_QD: Floats, k: int
) -> list[Ranking]:
    positions = [snapshot.positions(np.sort(ids)) for ids in candidates]
    if sum(map(len, positions)) > 2 * _RESCORE_ROWS:  # one query, and all that ties with its best
        return [_best(snapshot, positions[0], query_QD[0], k)]
    vectors_ND = snapshot.take(np.concatenate(positions))
    norms_N = np.sqrt(np.einsum("nd,nd->n", vectors_ND, vectors_ND))
    ranked = []
    start = 0
    for chosen, query_D in zip(positions, query_QD, strict=True):
        rows = slice(start, start + len(chosen))
        start = rows.stop
        # einsum, not BLAS, whose threads cost more than they bring at this size.
        scores_N = np.einsum("nd,d->n", vectors_ND[rows], query_D) / norms_N[rows]
        near = _near(np.arange(len(chosen)), scores_N, k)
        exact_N = _cosines(vectors_ND[rows][near], query_D)
        best = np.lexsort((near, -exact_N))[:k]  # candidates ascend by id
        ranked.append((snapshot.ids_N[chosen[near[best]]], exact_N[best]))
    return ranked


def _best(snapshot: Snapshot, positions: Ints, query_D: Floats, k: int) -> Ranking:
    scores_N = exact_scores(snapshot, positions, query_D)
    best = np.lexsort((positions, -scores_N))[:k]
    return snapshot.ids_N[positions[best]], scores_N[best]


def exact_scores(snapshot: Snapshot, positions: Ints, query_D: Floats) -> npt.NDArray[np.float32]:
    """Cosines of the query with the stored vectors at positions, computed in float64."""
    scores_N = np.empty(len(positions), np.float32)
    for start in range(0, len(positions), _RESCORE_ROWS):
        part = slice(start, start + _RESCORE_ROWS)
        scores_N[part] = _cosines(snapshot.take(positions[part]), query_D)
    return scores_N


def _cosines(vectors_ND: Floats, query_D: Floats) -> npt.NDArray[np.float32]:
    """Row-wise sums in float64, not a matrix product.

    BLAS treats rows at the edge of a block differently, and equal vectors must get equal scores
    wherever they stand.
    """
    rows_ND = vectors_ND.astype(np.float64)
    query64_D = query_D.astype(np.float64)
    query64_D /= np.linalg.norm(query64_D)
    norms_N = np.sqrt((rows_ND * rows_ND).sum(axis=1))
    scores_N: npt.NDArray[np.float32] = (rows_ND * query64_D).sum(axis=1) / norms_N
    return scores_N.astype(np.float32)
