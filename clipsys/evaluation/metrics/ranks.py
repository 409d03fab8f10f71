"""Retrieval and classification figures, in blocks, so that no score matrix is held whole."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

DEFAULT_KS = (1, 5, 10)
#: Rank of a query without any correct candidate: a miss at every k.
NO_HIT = int(np.iinfo(np.int64).max)


def first_hit_ranks(
    query_MD: Floats,
    candidate_ND: Floats,
    query_groups: npt.ArrayLike,
    candidate_groups: npt.ArrayLike,
    *,
    block: int = 1024,
) -> Integers:
    """The rank (0 is best) of each query's best-ranked correct candidate.

    A candidate is correct if its group equals the query's. Candidates that score the same as the
    correct one count as better: a constant encoder must not look good (the pessimistic rank).

    Args:
        query_MD: unit vectors.
        candidate_ND: unit vectors.
        query_groups: (M,) integers.
        candidate_groups: (N,) integers.
        block: queries scored at once; memory is O(block * N).

    Returns:
        (M,) int64; `NO_HIT` where no candidate is correct.
    """
    query_labels, present = np.asarray(query_groups), np.asarray(candidate_groups)
    ranks = np.full(len(query_MD), NO_HIT, np.int64)
    for start in range(0, len(query_MD), block):
        scores = query_MD[start : start + block] @ candidate_ND.T
        correct = query_labels[start : start + block, None] == present[None, :]
        best = np.where(correct, scores, -np.inf).max(axis=1, initial=-np.inf, keepdims=True)
        better = ((scores >= best) & ~correct).sum(axis=1)
        found = correct.any(axis=1)
        ranks[start : start + block][found] = better[found]
    return ranks


def recall_at(ranks: Integers, ks: Sequence[int] = DEFAULT_KS) -> dict[str, float]:
    """``recall@k``: the share of queries with a correct candidate among the first k."""
    return {f"recall@{k}": float((ranks < k).mean()) if len(ranks) else 0.0 for k in ks}


def chance_recall(
    query_groups: npt.ArrayLike, candidate_groups: npt.ArrayLike, ks: Sequence[int] = DEFAULT_KS
) -> dict[str, float]:
    """``recall@k`` of a random order: 1 - C(N-p, k) / C(N, k), p correct candidates of N."""
    present = np.asarray(candidate_groups)
    total = len(present)
    groups, counts = np.unique(present, return_counts=True)
    positives = dict(zip(groups.tolist(), counts.tolist(), strict=True))
    result = {}
    for k in ks:
        misses = []
        for group in np.asarray(query_groups).tolist():
            p = positives.get(group, 0)
            draws = np.arange(min(k, total))
            misses.append(float(np.prod(np.clip((total - p - draws) / (total - draws), 0, 1))))
        result[f"recall@{k}"] = 1.0 - float(np.mean(misses)) if misses else 0.0
    return result
