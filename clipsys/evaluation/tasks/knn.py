"""Votes of the nearest neighbours (Wu et al. 2018, section 3.4; Caron et al. 2021, DINO).

Each of the k nearest training images votes for its class with weight exp(cosine / 0.07). Cosines
are made block by block: memory is O(block * block), never the whole matrix.

Legend of shapes: N queries, M training images, C classes, K neighbours, B rows of a block.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from clipsys.evaluation.metrics.nearest import QUERIES, nearest

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

#: DINO reports the best of k = 10, 20, 100 and 200, and finds 20 to work best throughout.
KNN_NEIGHBOURS, KNN_TEMPERATURE = 20, 0.07


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
    for start in range(0, len(query_ND), QUERIES):
        rows = slice(start, start + QUERIES)
        own_B = None if groups_N is None else groups_N[rows]
        cosine_BK, index_BK = nearest(query_ND[rows], train_MD, k, own_B, groups_M)
        vote_BK = np.exp(cosine_BK / KNN_TEMPERATURE)
        votes_BC = votes_NC[rows]
        np.add.at(votes_BC, (np.arange(len(votes_BC))[:, None], targets_M[index_BK]), vote_BK)
    total_N1 = votes_NC.sum(axis=1, keepdims=True)
    shares_NC: Doubles = votes_NC / np.where(total_N1 > 0, total_N1, 1)
    return shares_NC
