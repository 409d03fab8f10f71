"""Spherical k-means, and the nearest of many centroids, by matrix products.

FAISS has both. numpy's BLAS does the same products four to five times faster than the one that
FAISS's wheels are built with (48 against 11 GFLOP/s a core, AVX-512), and they are nearly all of an
index's building time.

Shapes: N vectors, L lists, D embedding width.
"""

from __future__ import annotations

import numpy as np

from clipsys.retrieval.segments import Floats, Ints

#: Rows compared with all centroids at once: with 4,000 centroids their scores are 64 MB.
_ROWS = 4_096


def spherical_kmeans(sample_ND: Floats, num_lists: int, *, rounds: int, seed: int = 0) -> Floats:
    """Unit-norm centroids (L, D) of unit vectors, by inner product. Deterministic.

    A list that loses all its vectors starts anew at the vector that is farthest from its centroid.
    """
    generator = np.random.default_rng(seed)
    centroids_LD = sample_ND[generator.choice(len(sample_ND), num_lists, replace=False)].copy()
    for _ in range(rounds):
        list_N, score_N = nearest(sample_ND, centroids_LD)
        order_N = np.argsort(list_N, kind="stable")
        filled, starts = np.unique(list_N[order_N], return_index=True)
        sums_FD = np.add.reduceat(sample_ND[order_N], starts, axis=0)
        norms_F1 = np.linalg.norm(sums_FD, axis=1, keepdims=True)
        centroids_LD[filled] = sums_FD / np.maximum(norms_F1, np.float32(1e-12))
        empty = np.setdiff1d(np.arange(num_lists), filled)
        if len(empty):
            centroids_LD[empty] = sample_ND[np.argsort(score_N, kind="stable")[: len(empty)]]
    return centroids_LD


def nearest(vectors_ND: Floats, centroids_LD: Floats) -> tuple[Ints, Floats]:
    """The centroid with the largest inner product for each vector, and that product: (N,) each."""
    list_N = np.empty(len(vectors_ND), np.int64)
    score_N = np.empty(len(vectors_ND), np.float32)
    for start in range(0, len(vectors_ND), _ROWS):
        scores_BL = vectors_ND[start : start + _ROWS] @ centroids_LD.T
        best_B = scores_BL.argmax(axis=1)
        list_N[start : start + _ROWS] = best_B
        score_N[start : start + _ROWS] = scores_BL[np.arange(len(best_B)), best_B]
    return list_N, score_N
