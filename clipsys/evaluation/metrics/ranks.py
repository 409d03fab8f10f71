"""Ranks of correct candidates, and what is made of them, in blocks of queries.

Candidates that score the same as a correct one count as better: a constant encoder must not look
good. Whole rows of scores are compared with correct scores of the same rows, so that candidates of
equal vectors tie to the last bit.

Legend of shapes: Q queries, N candidates, D embedding width, b queries of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from clipsys.errors import ModelError
from clipsys.evaluation.metrics.relation import Relation

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

DEFAULT_KS = (1, 5, 10)
#: Rank of a query without any correct candidate: a miss at every k.
NO_HIT = int(np.iinfo(np.int64).max)
#: Scores held at once.
_BLOCK_BYTES = 256_000_000
#: Correct candidates of a query beyond which its scores are sorted, instead of compared with each.
_COMPARED = 16


@dataclass(frozen=True)
class Ranking:
    """How each query's correct candidates stand among all.

    Attributes:
        first_Q: rank (0 is best) of the best correct candidate; `NO_HIT` where there is none.
        precision_Q: average precision; 0 where no candidate is correct.
        top_Q: the candidate that scores highest.
        best_Q: the correct candidate that scores highest; -1 where there is none.
    """

    first_Q: Integers
    precision_Q: Doubles
    top_Q: Integers
    best_Q: Integers


def rank(
    query_QD: Floats,
    candidate_ND: Floats,
    relation: Relation,
    *,
    block: int | None = None,
    device: torch.device | str = "cpu",
    advance: Callable[[int], object] = lambda _: None,
) -> Ranking:
    """Ranks every candidate for every query.

    The product of a block of queries with all candidates is held at once: 256 MB, or ``block``
    queries. Average precision of a query is the mean over its correct candidates, the i-th best of
    which has precision i / (i + wrong candidates that score as high or higher).

    Args:
        query_QD: unit vectors.
        candidate_ND: unit vectors.
        relation: correct candidates of each query.
        block: queries scored at once.
        device: where scores are computed.
        advance: called with the number of queries done.

    Raises:
        ModelError: a vector is not finite.
    """
    for vectors in (query_QD, candidate_ND):
        if not np.isfinite(vectors).all():
            raise ModelError(
                "some embeddings are not finite (NaN); evaluate with --precision fp32, or check "
                "the model's weights"
            )
    num_queries, num_candidates = len(query_QD), len(candidate_ND)
    if block is None:
        block = max(1, _BLOCK_BYTES // (4 * max(num_candidates, 1)))
    parts = []
    candidates_DN = torch.from_numpy(np.ascontiguousarray(candidate_ND)).to(device).T
    queries = torch.from_numpy(np.ascontiguousarray(query_QD))
    # One buffer for all blocks: fresh memory costs as much as a third of the product.
    buffer = torch.empty(min(block, num_queries), num_candidates, device=device)
    for start in range(0, num_queries, block):
        stop = min(start + block, num_queries)
        scores = buffer[: stop - start]
        torch.matmul(queries[start:stop].to(device), candidates_DN, out=scores)
        parts.append(_rank_block(scores, *relation.pairs(start, stop)))
        advance(stop - start)
    if not parts:
        empty = np.zeros(0, np.int64)
        return Ranking(empty, np.zeros(0), empty, empty)
    return Ranking(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _rank_block(
    scores: torch.Tensor, rows: Integers, candidates: Integers
) -> tuple[Integers, Doubles, Integers, Integers]:
    size = len(scores)
    first = np.full(size, NO_HIT)
    precision = np.zeros(size)
    best = np.full(size, -1)
    num_candidates = scores.shape[1]
    top = scores.argmax(dim=1).cpu().numpy() if num_candidates else np.full(size, -1)
    if len(rows) == 0:
        return first, precision, top, best
    correct = scores[torch.from_numpy(rows), torch.from_numpy(candidates)].cpu().numpy()
    order = np.lexsort((-correct, rows))  # by query, best first
    correct, candidates = correct[order], candidates[order]
    counts = np.bincount(rows, minlength=size)
    starts = np.cumsum(counts) - counts
    place = np.arange(len(rows)) - starts[rows]  # 0 is the best of its query
    at_least = _count_at_least(scores, rows, place, correct, counts)
    wrong = at_least - _correct_at_least(rows, correct, starts, counts)
    has_correct = counts > 0
    first[has_correct] = wrong[starts[has_correct]]
    best[has_correct] = candidates[starts[has_correct]]
    sums = np.bincount(rows, weights=(place + 1) / (place + 1 + wrong), minlength=size)
    precision[has_correct] = sums[has_correct] / counts[has_correct]
    return first, precision, top, best


def _count_at_least(
    scores: torch.Tensor,
    rows: Integers,
    place: Integers,
    correct: npt.NDArray[np.float32],
    counts: Integers,
) -> Integers:
    """For each correct pair: how many candidates of its query score as high or higher."""
    found = np.empty(len(rows), np.int64)
    few = counts[rows] <= _COMPARED
    if scores.device.type == "cpu":
        # Row by row: numpy counts a row of comparisons in a tenth of the time of torch's sum.
        values = scores.numpy()
        for pair in np.flatnonzero(few).tolist():
            found[pair] = np.count_nonzero(values[rows[pair]] >= correct[pair])
    else:
        for position in range(int(counts[counts <= _COMPARED].max(initial=0))):
            chosen = few & (place == position)
            own = torch.from_numpy(rows[chosen]).to(scores.device)
            # All rows have a first correct candidate, as a rule: they are not copied then.
            selected = scores if len(own) == len(scores) else scores[own]
            bound = torch.from_numpy(correct[chosen]).to(scores.device)[:, None]
            found[chosen] = (selected >= bound).sum(dim=1).cpu().numpy()
    for row in np.unique(rows[~few]).tolist():
        chosen = rows == row
        ascending = torch.sort(scores[row]).values.cpu().numpy()
        found[chosen] = len(ascending) - np.searchsorted(ascending, correct[chosen], side="left")
    return found


def _correct_at_least(
    rows: Integers, correct: npt.NDArray[np.float32], starts: Integers, counts: Integers
) -> Integers:
    """For each correct pair: how many correct candidates of its query score as high or higher."""
    last = np.ones(len(rows), bool)  # of a run of equal scores
    last[:-1] = (rows[1:] != rows[:-1]) | (correct[1:] != correct[:-1])
    ends = np.flatnonzero(last)
    end_of_run = ends[np.searchsorted(ends, np.arange(len(rows)))]
    return end_of_run + 1 - starts[rows]


def recall_at(ranks: Integers, ks: Sequence[int] = DEFAULT_KS) -> dict[str, float]:
    """``recall@k``: the share of queries with a correct candidate among the first k."""
    return {f"recall@{k}": float((ranks < k).mean()) if len(ranks) else 0.0 for k in ks}
