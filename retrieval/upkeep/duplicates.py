"""Near-duplicates of a whole collection: groups of items whose vectors are nearly the same.

    distinct vectors, block x block --FAISS range search--> pairs above the threshold --> groups

Every pair is compared exactly, and each only once (a block meets itself and those after it). Items
that share one stored vector, copies of a file, are a group without arithmetic. Groups are connected
components: two members of a large group may be less alike than the threshold, by way of others.

Memory holds two blocks of vectors, whatever the collection's size; time grows with its square:
100,000 items x 512 take minutes on two cores.

Shapes: N distinct vectors, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from clipsys.errors import QueryError
from clipsys.retrieval.storage.items import Item
from clipsys.retrieval.storage.segments import Ints
from clipsys.retrieval.storage.snapshot import BLOCK_ROWS, Snapshot, unit_rows

#: Cosine from which two images count as nearly the same. Depends on the model: ViT-B/32 gives
#: re-encoded, resized or lightly cropped photographs 0.95 and more, other views of a scene less.
DEFAULT_THRESHOLD = 0.95
#: Queries of one range search: at worst each matches a whole block, 1,024 x 16,384 x 12 bytes.
_QUERY_ROWS = 1_024

_faiss: Any = faiss


@dataclass(frozen=True)
class DuplicateGroup:
    """Items that are nearly the same.

    Attributes:
        items: two or more, in the order of their ids; the first was there first.
        scores: cosine of each with the first.
    """

    items: tuple[Item, ...]
    scores: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """As ``clipsys duplicates --json`` prints it."""
        members = zip(self.items, self.scores, strict=True)
        return {
            "items": [
                {"id": item.id, "uri": item.uri, "caption": item.caption, "score": score}
                for item, score in members
            ]
        }


def find_groups(
    snapshot: Snapshot,
    threshold: float,
    *,
    advance: Callable[[int], object] = lambda _: None,
    block_rows: int = BLOCK_ROWS,
) -> list[Ints]:
    """Positions of near-duplicates in a snapshot: ascending in each group, groups by their first.

    Args:
        snapshot: the items.
        threshold: cosine from which two are nearly the same, above 0 and at most 1.
        advance: called with the number of vectors compared with all that follow them.
        block_rows: vectors held at once, twice.

    Raises:
        QueryError: the threshold is no such cosine.
    """
    if not 0 < threshold <= 1:
        raise QueryError(f"the threshold is {threshold}; expected a cosine above 0, up to 1")
    places_N2 = np.stack([snapshot.segments_N, snapshot.rows_N], axis=1)
    _, first_N, owner = np.unique(places_N2, axis=0, return_index=True, return_inverse=True)
    joined = _Components(len(first_N))
    # Stored vectors are float16: equal images differ by rounding only, 1e-3 at most in the cosine.
    radius = min(threshold, 1 - 1e-6) - 1e-6
    for start in range(0, len(first_N), block_rows):
        mine_ND = unit_rows(snapshot.take(first_N[start : start + block_rows]))
        for other in range(start, len(first_N), block_rows):
            index = _faiss.IndexFlatIP(snapshot.vectors.dim)
            index.add(
                mine_ND
                if other == start
                else unit_rows(snapshot.take(first_N[other : other + block_rows]))
            )
            for row in range(0, len(mine_ND), _QUERY_ROWS):
                limits, _, found = index.range_search(mine_ND[row : row + _QUERY_ROWS], radius)
                queries = np.repeat(np.arange(len(limits) - 1), np.diff(limits.astype(np.int64)))
                joined.join(start + row + queries, other + found)
        advance(len(mine_ND))
    roots_N = joined.roots()[owner.reshape(-1)]
    order = np.argsort(roots_N, kind="stable")
    starts = np.flatnonzero(np.diff(roots_N[order])) + 1
    groups = [group for group in np.split(order, starts) if len(group) > 1]
    return sorted(groups, key=lambda group: int(group[0]))


class _Components:
    """Connected components of a growing graph (union-find, arrays of edges at once)."""

    def __init__(self, size: int) -> None:
        self._parents_N = np.arange(size)

    def join(self, left_E: Ints, right_E: Ints) -> None:
        """Adds edges. Their own components first, so that millions of them join few nodes."""
        distinct = left_E != right_E
        nodes, ends = np.unique(
            np.stack([left_E[distinct], right_E[distinct]]), return_inverse=True
        )
        ends = ends.reshape(2, -1)
        labels = np.arange(len(nodes))
        while len(nodes):
            lower = labels.copy()
            np.minimum.at(lower, ends[0], labels[ends[1]])
            np.minimum.at(lower, ends[1], labels[ends[0]])
            lower = lower[lower]
            if np.array_equal(lower, labels):
                break
            labels = lower
        for node, label in zip(nodes.tolist(), nodes[labels].tolist(), strict=True):
            first, second = self._root(node), self._root(label)
            if first != second:
                self._parents_N[max(first, second)] = min(first, second)

    def roots(self) -> Ints:
        """The smallest member of each node's component."""
        while True:  # a root's index never exceeds its members', so pointers only shrink
            parents_N = self._parents_N[self._parents_N]
            if np.array_equal(parents_N, self._parents_N):
                return parents_N
            self._parents_N = parents_N

    def _root(self, node: int) -> int:
        parents = self._parents_N
        while parents[node] != node:
            parents[node] = parents[parents[node]]
            node = int(parents[node])
        return node


def scores_with_first(snapshot: Snapshot, group: Ints) -> list[float]:
    """Exact cosines of a group's stored vectors with its first one's."""
    vectors = snapshot.take(group).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return [round(float(score), 6) for score in vectors @ vectors[0]]
