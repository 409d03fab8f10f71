"""The exact top k of a snapshot, by way of an index where there is one.

    index ------ candidates (id <= last_id) --.
    segments --- candidates newer than that --+--> re-scored from stored vectors --> sorted --> k

Candidates come from float32 arithmetic, which differs in the last digits between FAISS and numpy
and between batch sizes. So more than k are taken, until the last one is clearly below the k-th;
then each is scored again, row by row in float64. Scores are therefore exact cosines of the stored
vectors, and equal scores are ordered by id, whether an index was used or not.

Shapes: N candidates, D embedding width.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from clipsys.retrieval.index import LoadedIndex
from clipsys.retrieval.segments import Floats, Ints
from clipsys.retrieval.snapshot import Snapshot

#: Above the rounding error of a float32 inner product of unit vectors (about 1e-6 at D = 1,024).
SCORE_MARGIN = 1e-5
#: Candidates beyond k that an index is asked for at first.
_EXTRA = 16
#: With a filter that leaves no more than this, or 1/20 of all, scanning the rows beats the index.
_SCAN_BELOW = 4_096
_RESCORE_ROWS = 4_096


def rank(
    snapshot: Snapshot,
    index: LoadedIndex | None,
    query_D: Floats,
    k: int,
    *,
    allowed: Ints | None = None,
) -> tuple[Ints, npt.NDArray[np.float32]]:
    """The k live items nearest to the query: (ids, cosines), best first, ties by id.

    Args:
        snapshot: what exists. Ids that the index knows and the snapshot does not are not returned.
        index: covers the ids up to its ``last_id``; the rest is scanned. None scans everything.
        query_D: unit norm, float32.
        k: may exceed the number of items; all are returned then.
        allowed: ascending ids; only these may be returned. Applied before ranking.
    """
    positions = np.arange(len(snapshot)) if allowed is None else snapshot.positions(allowed)
    k = min(k, len(positions))
    if k == 0:
        return np.empty(0, np.int64), np.empty(0, np.float32)
    few = allowed is not None and len(positions) <= max(_SCAN_BELOW, len(snapshot) // 20)
    if index is None or few:
        candidates = scan(snapshot, positions, query_D, k)
    else:
        covered_N = snapshot.ids_N[positions] <= index.generation.last_id
        indexed = snapshot.ids_N[positions[covered_N]]
        whole = allowed is None and len(indexed) == index.generation.num_items
        candidates = np.concatenate(
            [
                ask_index(index, query_D, k, None if whole else indexed, len(indexed)),
                scan(snapshot, positions[~covered_N], query_D, k),
            ]
        )
    return rescore(snapshot, np.sort(candidates), query_D, k)


def scan(snapshot: Snapshot, positions: Ints, query_D: Floats, k: int) -> Ints:
    """Ids among which the true top k of the positions are, by scoring every one."""
    k = min(k, len(positions))
    if k == 0:
        return np.empty(0, np.int64)
    ids_N = np.empty(len(positions), np.int64)
    scores_N = np.empty(len(positions), np.float32)
    start = 0
    for block_ids, vectors_ND in snapshot.blocks(positions):
        stop = start + len(block_ids)
        ids_N[start:stop], scores_N[start:stop] = block_ids, vectors_ND @ query_D
        start = stop
    kth = np.partition(scores_N, len(scores_N) - k)[len(scores_N) - k]
    near: Ints = ids_N[scores_N >= kth - SCORE_MARGIN]
    return near


def ask_index(
    index: LoadedIndex, query_D: Floats, k: int, allowed: Ints | None, total: int
) -> Ints:
    """Ids among which the true top k of the index are. ``total``: how many may be found."""
    k = min(k, total)
    fetch = min(total, k + _EXTRA)
    while fetch > 0:
        ids_N, scores_N = index.search(query_D, fetch, allowed=allowed)
        if fetch == total or scores_N[-1] < scores_N[k - 1] - SCORE_MARGIN:
            return ids_N
        fetch = min(total, 2 * fetch)  # many near-ties at the k-th place
    return np.empty(0, np.int64)


def rescore(
    snapshot: Snapshot, ids_N: Ints, query_D: Floats, k: int
) -> tuple[Ints, npt.NDArray[np.float32]]:
    """The best k of the candidates by exact cosine with their stored vectors, ties by id."""
    positions = snapshot.positions(ids_N)
    query64_D = query_D.astype(np.float64)
    query64_D /= np.linalg.norm(query64_D)
    scores_N = np.empty(len(positions), np.float32)
    for start in range(0, len(positions), _RESCORE_ROWS):
        part = slice(start, start + _RESCORE_ROWS)
        vectors_ND = snapshot.take(positions[part]).astype(np.float64)
        # Row-wise sums, not a matrix product: BLAS treats rows at the edge of a block differently,
        # and equal vectors must get equal scores wherever they stand.
        norms_N = np.sqrt((vectors_ND * vectors_ND).sum(axis=1))
        scores_N[part] = (vectors_ND * query64_D).sum(axis=1) / norms_N
    found_N = snapshot.ids_N[positions]
    best = np.lexsort((found_N, -scores_N))[:k]
    return found_N[best], scores_N[best]
