"""Nearest vectors, in blocks, so that no matrix of similarities is whole.

Legend of shapes: B queries of a block, M images, D width, K neighbours.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

#: Queries and images of one block of similarities.
QUERIES, _CANDIDATES = 1024, 16384


def nearest(
    query_BD: Floats,
    train_MD: Floats,
    k: int,
    own_B: Integers | None,
    groups_M: Integers | None,
) -> tuple[Floats, Integers]:
    """The ``k`` largest cosines of each query, largest first, and whose they are: (B, k) each.

    Of equal cosines the earlier image's comes first. Those of the query's own group are -inf.

    Args:
        query_BD: unit norm; at most about `QUERIES`, since memory is O(B).
        train_MD: unit norm.
        k: all M where there are fewer.
        own_B: group of each query; None: no image is left out.
        groups_M: groups of the images.
    """
    best_BK = np.empty((len(query_BD), 0), np.float32)
    index_BK = np.empty((len(query_BD), 0), np.int64)
    for start in range(0, len(train_MD), _CANDIDATES):
        rows = slice(start, start + _CANDIDATES)
        cosine_BM = query_BD @ train_MD[rows].T
        if own_B is not None and groups_M is not None:
            cosine_BM[own_B[:, None] == groups_M[rows]] = -np.inf
        chosen_BK = _largest(cosine_BM, k)
        best_BK = np.concatenate([best_BK, np.take_along_axis(cosine_BM, chosen_BK, 1)], axis=1)
        index_BK = np.concatenate([index_BK, chosen_BK + start], axis=1)
        # Earlier images stand first, so that a stable sort keeps them among equals.
        order_BK = np.argsort(-best_BK, axis=1, kind="stable")[:, :k]
        best_BK = np.take_along_axis(best_BK, order_BK, axis=1)
        index_BK = np.take_along_axis(index_BK, order_BK, axis=1)
    return best_BK, index_BK


def _largest(cosine_BM: Floats, k: int) -> Integers:
    """(B, K) positions of the ``k`` largest of each row, ascending; the earlier among equals."""
    if cosine_BM.shape[1] <= k:
        return np.broadcast_to(np.arange(cosine_BM.shape[1]), cosine_BM.shape)
    chosen_BK = np.argpartition(-cosine_BM, k - 1, axis=1)[:, :k]
    smallest_B1 = np.take_along_axis(cosine_BM, chosen_BK, axis=1).min(axis=1, keepdims=True)
    # A partition takes any of several equal ones at its edge; those rows are sorted.
    for row in np.flatnonzero((cosine_BM >= smallest_B1).sum(axis=1) > k):
        chosen_BK[row] = np.argsort(-cosine_BM[row], kind="stable")[:k]
    return np.sort(chosen_BK, axis=1)
