"""Which candidates are correct for which queries, without a matrix.

    query --groups of the query--> group --candidates of the group--> candidates

A caption that two images share has the groups of both; an image has one group, which it shares with
its copies. Groups are disjoint sets of candidates, so nothing is listed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Relation:
    """Two lists of lists, in compressed rows.

    Attributes:
        query_starts: (Q + 1,) where each query's groups start in ``query_groups``.
        query_groups: groups, by query.
        group_starts: (G + 1,) where each group's candidates start in ``group_candidates``.
        group_candidates: candidates, by group.
    """

    query_starts: Integers
    query_groups: Integers
    group_starts: Integers
    group_candidates: Integers

    @staticmethod
    def of_groups(query_groups: npt.ArrayLike, candidate_groups: npt.ArrayLike) -> Relation:
        """Each query and each candidate has one group; equal groups belong together."""
        queries = np.asarray(query_groups, np.int64)
        return Relation.of_lists([[group] for group in queries.tolist()], candidate_groups)

    @staticmethod
    def of_lists(
        query_groups: Sequence[Sequence[int]], candidate_groups: npt.ArrayLike
    ) -> Relation:
        """Each query has several groups, each candidate one."""
        candidates = np.asarray(candidate_groups, np.int64)
        flat = np.array([one for groups in query_groups for one in groups], np.int64)
        lengths = np.array([len(groups) for groups in query_groups], np.int64)
        num_groups = int(max(flat.max(initial=-1), candidates.max(initial=-1))) + 1
        return Relation(
            _starts(lengths),
            flat,
            _starts(np.bincount(candidates, minlength=num_groups)),
            np.argsort(candidates, kind="stable"),
        )

    def transposed(self, num_candidates: int) -> Relation:
        """The same pairs seen from the candidates, each of which has one group.

        Args:
            num_candidates: N.
        """
        num_groups = len(self.group_starts) - 1
        group_of = np.zeros(num_candidates, np.int64)
        group_of[self.group_candidates] = np.repeat(
            np.arange(num_groups), np.diff(self.group_starts)
        )
        query_of = np.repeat(np.arange(len(self.query_starts) - 1), np.diff(self.query_starts))
        order = np.argsort(self.query_groups, kind="stable")
        return Relation(
            np.arange(num_candidates + 1),
            group_of,
            _starts(np.bincount(self.query_groups, minlength=num_groups)),
            query_of[order],
        )

    def __len__(self) -> int:
        return len(self.query_starts) - 1

    def counts(self) -> Integers:
        """(Q,) how many candidates are correct for each query."""
        sizes = np.diff(self.group_starts)[self.query_groups]
        query_of = np.repeat(np.arange(len(self)), np.diff(self.query_starts))
        counts = np.bincount(query_of, weights=sizes, minlength=len(self))
        return counts.astype(np.int64)

    def pairs(self, start: int, stop: int) -> tuple[Integers, Integers]:
        """The correct pairs of some queries: their rows from ``start``, and candidates.

        Rows ascend.
        """
        begin, end = self.query_starts[start], self.query_starts[stop]
        groups = self.query_groups[begin:end]
        sizes = self.group_starts[groups + 1] - self.group_starts[groups]
        rows = np.repeat(
            np.repeat(np.arange(stop - start), np.diff(self.query_starts[start : stop + 1])), sizes
        )
        within = np.arange(sizes.sum()) - np.repeat(_starts(sizes)[:-1], sizes)
        places = np.repeat(self.group_starts[groups], sizes) + within
        return rows, self.group_candidates[places]


def _starts(lengths: Integers) -> Integers:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
