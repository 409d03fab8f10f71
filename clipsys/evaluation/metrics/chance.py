"""What a random order of the candidates would reach, exactly.

p of N candidates are correct for a query; H_N is the N-th harmonic number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


def chance_recall(counts_Q: Integers, num_candidates: int, ks: Sequence[int]) -> dict[int, float]:
    """Recall by k: the mean over queries of 1 - C(N - p, k) / C(N, k).

    Args:
        counts_Q: p of each query.
        num_candidates: N.
        ks: ranks.
    """
    return {k: 1.0 - _missed(counts_Q, num_candidates, k) for k in ks}


def chance_precision(counts_Q: Integers, num_candidates: int) -> float:
    """Mean average precision: the mean over queries of H_N / N + (p - 1) / (N - 1) (1 - H_N / N).

    A correct candidate stands at each rank i with the same probability; (i - 1)(p - 1) / (N - 1) of
    those before it are correct, on average.
    """
    if len(counts_Q) == 0 or num_candidates == 0:
        return 0.0
    mean_inverse = float(np.mean(1.0 / np.arange(1, num_candidates + 1)))
    share = (counts_Q - 1) / max(num_candidates - 1, 1)
    expected = mean_inverse + share * (1 - mean_inverse)
    return float(np.where(counts_Q > 0, expected, 0.0).mean())


def chance_median_rank(counts_Q: Integers, num_candidates: int) -> float:
    """The rank (1 is best) by which half of the queries have a correct candidate; else infinite."""
    low, high = 1, num_candidates
    if len(counts_Q) == 0 or _missed(counts_Q, num_candidates, num_candidates) > 0.5:
        return float("inf")
    while low < high:
        middle = (low + high) // 2
        if _missed(counts_Q, num_candidates, middle) <= 0.5:
            high = middle
        else:
            low = middle + 1
    return float(low)


def _missed(counts_Q: Integers, num_candidates: int, k: int) -> float:
    """The share of queries with none of their correct candidates among the first k."""
    from scipy.special import gammaln

    if len(counts_Q) == 0:
        return 1.0
    values, repeats = np.unique(counts_Q, return_counts=True)
    total, drawn = float(num_candidates), float(min(k, num_candidates))
    missed = np.zeros(len(values))
    possible = total - values >= drawn
    rest = total - values[possible]
    # log of C(N - p, k) / C(N, k)
    logs = gammaln(rest + 1) - gammaln(rest - drawn + 1)
    logs -= gammaln(total + 1) - gammaln(total - drawn + 1)
    missed[possible] = np.exp(np.minimum(logs, 0.0))
    missed[values == 0] = 1.0
    return float((missed * repeats).sum() / repeats.sum())
