"""Ranks of correct candidates, and what is made of them.

Candidates that score the same as a correct one count as better: a constant encoder must not look
good. `rank` goes through blocks of queries; `clipsys.evaluation.metrics.two_way` ranks both ways
from one product, and builds on what is here.

Legend of shapes: Q queries, N candidates, U distinct candidates, D embedding width, P correct
pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from clipsys.errors import ModelError
from clipsys.evaluation.metrics.distinct import Distinct, distinct_rows
from clipsys.evaluation.metrics.relation import Relation

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

DEFAULT_KS = (1, 5, 10)
#: Rank of a query without any correct candidate: a miss at every k.
NO_HIT = int(np.iinfo(np.int64).max)
#: Scores held at once.
_BLOCK_BYTES = 256_000_000
#: What a correct pair takes beside the scores.
_BYTES_OF_A_PAIR = 64
_CHECKED_ROWS = 65_536
#: Correct candidates of a query beyond which its scores are sorted, instead of compared with each.
_COMPARED = 16


@dataclass(frozen=True)
class Ranking:
    """How each query's correct candidates stand among all.

    Attributes:
        first_Q: rank (0 is best) of the best correct candidate; `NO_HIT` where there is none.
        precision_Q: average precision; 0 where no candidate is correct.
        best_Q: the correct candidate that scores highest; -1 where there is none.
    """

    first_Q: Integers
    precision_Q: Doubles
    best_Q: Integers


def rank(
    query_QD: Floats,
    candidate_ND: Floats,
    relation: Relation,
    *,
    block: int | None = None,
    device: torch.device | str | None = None,
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
        device: where scores are computed; None: a GPU where there is one.
        advance: called with the number of queries done.

    Raises:
        ModelError: a vector is not finite.
    """
    check_finite(query_QD, candidate_ND)
    device = scoring_device(device)
    candidates = distinct_rows(candidate_ND)
    counts_Q = relation.counts()
    if block is None:
        widest = max(len(candidate_ND), 1, _BYTES_OF_A_PAIR // 4 * int(counts_Q.max(initial=0)))
        block = max(1, _BLOCK_BYTES // (4 * widest))
    parts = []
    candidates_DU = torch.from_numpy(candidates.rows_UD).to(device).T
    queries = torch.from_numpy(np.ascontiguousarray(query_QD))
    # One buffer for all blocks: fresh memory costs as much as a third of the product.
    buffer = torch.empty(min(block, len(query_QD)), len(candidates.rows_UD), device=device)
    for start in range(0, len(query_QD), block):
        stop = min(start + block, len(query_QD))
        rows, columns = relation.pairs(start, stop)
        scores_QU = buffer[: stop - start]
        torch.mm(queries[start:stop].to(device), candidates_DU, out=scores_QU)
        own = torch.from_numpy(rows), torch.from_numpy(candidates.number_N[columns])
        score_P = scores_QU[own].cpu().numpy()
        bounds = Bounds.of(rows, score_P, stop - start)
        at_least_P = count_at_least(scores_QU, bounds, candidates)
        parts.append(ranking_of(rows, columns, score_P, at_least_P, stop - start))
        advance(stop - start)
    if not parts:
        return Ranking(np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64))
    columns_of = zip(*((one.first_Q, one.precision_Q, one.best_Q) for one in parts), strict=True)
    return Ranking(*(np.concatenate(column) for column in columns_of))


def check_finite(*matrices: Floats) -> None:
    """Refuses vectors that are not finite.

    Raises:
        ModelError: one is not.
    """
    for vectors in matrices:
        for start in range(0, len(vectors), _CHECKED_ROWS):
            if not np.isfinite(vectors[start : start + _CHECKED_ROWS]).all():
                raise ModelError(
                    "some embeddings are not finite (NaN); evaluate with --precision fp32, or "
                    "check the model's weights"
                )


def scoring_device(device: torch.device | str | None = None) -> torch.device:
    """The device that scores are computed on: the one that is named, or a GPU if there is one."""
    if device is not None:
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Bounds:
    """Scores of correct pairs, which the scores of all candidates are compared with.

    Attributes:
        score_P: of each pair, ordered by query.
        starts_Q: (Q + 1,) where each query's pairs start.
    """

    score_P: Floats
    starts_Q: Integers

    @staticmethod
    def of(row_P: Integers, score_P: Floats, num_queries: int) -> Bounds:
        """Of pairs whose rows ascend."""
        counts_Q = np.bincount(row_P, minlength=num_queries)
        return Bounds(score_P, np.concatenate([[0], np.cumsum(counts_Q)]))

    def take(self, start: int, stop: int) -> Bounds:
        """Those of some queries."""
        starts = self.starts_Q[start : stop + 1]
        return Bounds(self.score_P[starts[0] : starts[-1]], starts - starts[0])


def count_at_least(scores_QU: torch.Tensor, bounds: Bounds, columns: Distinct) -> Integers:
    """(P,) how many candidates of a pair's query score as high or higher.

    Args:
        scores_QU: of distinct candidates.
        bounds: scores of the pairs.
        columns: how often each distinct candidate counts.
    """
    found = np.zeros(len(bounds.score_P), np.int64)
    starts, counts = bounds.starts_Q[:-1], np.diff(bounds.starts_Q)
    few = counts <= _COMPARED
    # 0 and 1 as floats, of which the sum is 50 times faster than that of booleans (torch 2.15).
    buffer = torch.empty_like(scores_QU, memory_format=torch.contiguous_format)
    repeats = torch.from_numpy(columns.repeats_U).to(scores_QU.device)
    # A sum of whole numbers in float32 is exact below 2**24.
    exact = torch.float32 if int(columns.repeats_U.sum()) < 2**24 else torch.float64
    for position in range(int(counts[few].max(initial=0))):
        chosen = np.flatnonzero(few & (counts > position))
        pairs = starts[chosen] + position
        bound = torch.from_numpy(bounds.score_P[pairs]).to(scores_QU.device)[:, None]
        # All queries of a block have a first correct candidate, as a rule: they are not copied.
        is_whole = len(chosen) == len(scores_QU)
        selected = scores_QU if is_whole else scores_QU[torch.from_numpy(chosen)]
        ones = torch.ge(selected, bound, out=buffer[: len(chosen)])
        if columns.has_repeats:
            sums = ones.to(exact) @ repeats.to(exact)
        else:
            sums = ones.sum(dim=1, dtype=exact)
        found[pairs] = sums.cpu().numpy().astype(np.int64)
    for row in np.flatnonzero(~few).tolist():
        own = slice(starts[row], starts[row] + counts[row])
        scores = scores_QU[row].cpu().numpy()
        ascending = np.sort(np.repeat(scores, columns.repeats_U) if columns.has_repeats else scores)
        found[own] = len(ascending) - np.searchsorted(ascending, bounds.score_P[own], side="left")
    return found


def ranking_of(
    row_P: Integers, column_P: Integers, score_P: Floats, at_least_P: Integers, num_queries: int
) -> Ranking:
    """Ranks and average precision from correct pairs.

    Args:
        row_P: query of each pair, ascending.
        column_P: candidate of each pair.
        score_P: of each pair.
        at_least_P: candidates of its query, correct ones included, that score as high or higher.
        num_queries: Q.
    """
    first = np.full(num_queries, NO_HIT)
    precision = np.zeros(num_queries)
    best = np.full(num_queries, -1)
    if len(row_P):
        order = np.lexsort((-score_P, row_P))  # by query, best first
        rows, columns, scores = row_P[order], column_P[order], score_P[order]
        counts = np.bincount(rows, minlength=num_queries)
        starts = np.cumsum(counts) - counts
        place = np.arange(len(rows)) - starts[rows]  # 0 is the best of its query
        wrong = at_least_P[order] - _correct_at_least(rows, scores, starts)
        has_correct = counts > 0
        first[has_correct] = wrong[starts[has_correct]]
        best[has_correct] = columns[starts[has_correct]]
        sums = np.bincount(rows, weights=(place + 1) / (place + 1 + wrong), minlength=num_queries)
        precision[has_correct] = sums[has_correct] / counts[has_correct]
    return Ranking(first, precision, best)


def _correct_at_least(rows: Integers, scores: Floats, starts: Integers) -> Integers:
    """For each correct pair: how many correct candidates of its query score as high or higher."""
    last = np.ones(len(rows), bool)  # of a run of equal scores
    last[:-1] = (rows[1:] != rows[:-1]) | (scores[1:] != scores[:-1])
    ends = np.flatnonzero(last)
    end_of_run = ends[np.searchsorted(ends, np.arange(len(rows)))]
    return end_of_run + 1 - starts[rows]


def recall_at(ranks: Integers, ks: Sequence[int] = DEFAULT_KS) -> dict[str, float]:
    """``recall@k``: the share of queries with a correct candidate among the first k."""
    return {f"recall@{k}": float((ranks < k).mean()) if len(ranks) else 0.0 for k in ks}
