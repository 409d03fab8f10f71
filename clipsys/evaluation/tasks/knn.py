"""Votes of the nearest neighbours (Wu et al. 2018, section 3.4; Caron et al. 2021, DINO).

Each of the k nearest training images votes for its class with weight exp(cosine / 0.07). Cosines
are made block by block: memory is O(block * block), never the whole matrix.

Legend of shapes: N queries, M training images, C classes, K neighbours, B rows of a block.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

#: DINO reports the best of k = 10, 20, 100 and 200, and finds 20 to work best throughout.
KNN_NEIGHBOURS, KNN_TEMPERATURE = 20, 0.07
_QUERIES, _CANDIDATES = 1024, 16384


def neighbour_votes(
    query_ND: Floats,
    train_MD: Floats,
    targets_M: Integers,
    num_classes: int,
    *,
    k: int = KNN_NEIGHBOURS,
    groups_N: Integers | None = None,
    groups_M: Integers | None = None,
) -> Doubles:
    """(N, C) share of each class in the votes; zeros where no image may vote.

    Among equal cosines the earlier training image votes.

    Args:
        query_ND: unit norm.
        train_MD: unit norm.
        targets_M: class of each training image.
        k: number of voters; all training images where there are fewer.
        groups_N: a training image of an equal group does not vote; None: all may.
        groups_M: likewise, of the training images.
    """
    votes_NC = np.zeros((len(query_ND), num_classes))
    for start in range(0, len(query_ND), _QUERIES):
        rows = slice(start, start + _QUERIES)
        own_B = None if groups_N is None else groups_N[rows]
        cosine_BK, index_BK = _nearest(query_ND[rows], train_MD, k, own_B, groups_M)
        vote_BK = np.exp(cosine_BK / KNN_TEMPERATURE)
        votes_BC = votes_NC[rows]
        np.add.at(votes_BC, (np.arange(len(votes_BC))[:, None], targets_M[index_BK]), vote_BK)
    total_N1 = votes_NC.sum(axis=1, keepdims=True)
    shares_NC: Doubles = votes_NC / np.where(total_N1 > 0, total_N1, 1)
    return shares_NC


def _nearest(
    query_BD: Floats,
    train_MD: Floats,
    k: int,
    own_B: Integers | None,
    groups_M: Integers | None,
) -> tuple[Floats, Integers]:
    """The ``k`` largest cosines of each query, and whose they are; those of its group are -inf."""
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
