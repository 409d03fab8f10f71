"""Exact scores of candidates, from the stored vectors.

Each candidate is scored in float32, and those that may be among the best k once more, row by row in
float64. Scores are therefore exact cosines of the stored vectors, and equal scores are ordered by
id, whether an index was used or not.

Shapes: Q queries, N candidates, D embedding width.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from clipsys.retrieval.storage.segments import Floats, Ints
from clipsys.retrieval.storage.snapshot import Snapshot

Ranking = tuple[Ints, npt.NDArray[np.float32]]

#: Above the rounding error of a float32 inner product of unit vectors (about 1e-6 at D = 1,024).
SCORE_MARGIN = 1e-5
_RESCORE_ROWS = 4_096


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
        near = near_best(np.arange(len(chosen)), scores_N, k)
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


def near_best(ids_N: Ints, scores_N: npt.NDArray[np.float32], k: int) -> Ints:
    """The ids whose scores are not clearly below the k-th best."""
    if len(ids_N) <= k:
        return ids_N
    kth = np.partition(scores_N, len(scores_N) - k)[len(scores_N) - k]
    near: Ints = ids_N[scores_N >= kth - SCORE_MARGIN]
    return near
