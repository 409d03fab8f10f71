"""Near-duplicates of a whole collection: groups of items whose vectors are nearly the same.

    distinct vectors in the order of their items --.
        the first that is in no group yet           }--FAISS range search--> its group
        all those after it that are in none        --'

Every member of a group is nearly the same as the group's first item, so keeping that one and
removing the others loses nothing that is not nearly there. Connected components would not have
that: by way of others they join images that are nothing alike.

Comparisons are exact. Items that share one stored vector, copies of a file, are a group without
arithmetic. Memory holds two blocks of vectors, whatever the collection's size; time grows with the
square of the number of groups and lone items: 100,000 of them x 512 take minutes on two cores.

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
from clipsys.retrieval.storage.segments import Floats, Ints
from clipsys.retrieval.storage.snapshot import BLOCK_ROWS, Snapshot, unit_rows
from clipsys.retrieval.storage.store import Store

#: Queries of one range search: at worst each matches a whole block, 1,024 x 16,384 x 12 bytes.
_QUERY_ROWS = 1_024

_faiss: Any = faiss


@dataclass(frozen=True)
class DuplicateGroup:
    """Items that are nearly the same.

    Attributes:
        items: two or more, in the order of their ids; the first was there first.
        scores: cosine of each with the first, the threshold at least.
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


def list_groups(
    snapshot: Snapshot,
    store: Store,
    threshold: float,
    *,
    advance: Callable[[int], object] = lambda _: None,
) -> list[DuplicateGroup]:
    """Groups of near-duplicates with their items and cosines; see `find_groups`.

    Raises:
        QueryError: the threshold is no cosine above 0.
    """
    listed = []
    for group in find_groups(snapshot, threshold, advance=advance):
        ids = snapshot.ids_N[group].tolist()
        items = store.items(ids)
        scores = scores_with_first(snapshot, group)
        listed.append(DuplicateGroup(tuple(items[number] for number in ids), tuple(scores)))
    return listed


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
        advance: called with the number of vectors that are settled.
        block_rows: vectors held at once, twice.

    Raises:
        QueryError: the threshold is no such cosine.
    """
    if not 0 < threshold <= 1:
        raise QueryError(f"the threshold is {threshold}; expected a cosine above 0, up to 1")
    first_N, distinct = _distinct(snapshot)
    leaders_N = np.arange(len(first_N))  # of the group that each is in, or itself
    # Stored vectors are float16: equal images differ by rounding only, 1e-3 at most in the cosine.
    radius = min(threshold, 1 - 1e-6) - 1e-6
    for start in range(0, len(first_N), block_rows):
        mine = np.arange(start, min(start + block_rows, len(first_N)))
        mine = mine[leaders_N[mine] == mine]
        mine_ND = unit_rows(snapshot.take(first_N[mine]))
        _gather(mine, mine_ND, mine, mine_ND, leaders_N, radius)
        leads = leaders_N[mine] == mine
        for other in range(start + block_rows, len(first_N), block_rows):
            free = np.arange(other, min(other + block_rows, len(first_N)))
            free = free[leaders_N[free] == free]
            free_ND = unit_rows(snapshot.take(first_N[free]))
            _gather(mine[leads], mine_ND[leads], free, free_ND, leaders_N, radius)
        advance(min(block_rows, len(first_N) - start))
    leaders = leaders_N[distinct]
    order = np.argsort(leaders, kind="stable")
    starts = np.flatnonzero(np.diff(leaders[order])) + 1
    groups = [group for group in np.split(order, starts) if len(group) > 1]
    return sorted(groups, key=lambda group: int(group[0]))


def _distinct(snapshot: Snapshot) -> tuple[Ints, Ints]:
    """Where each distinct vector is first, ascending, and which of them each item has."""
    places_N2 = np.stack([snapshot.segments_N, snapshot.rows_N], axis=1)
    _, first_N, of_item = np.unique(places_N2, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first_N)
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(order))
    return first_N[order], ranks[of_item.reshape(-1)]


def _gather(
    first: Ints,
    first_MD: Floats,
    others: Ints,
    others_ND: Floats,
    leaders_N: Ints,
    radius: float,
) -> None:
    """Gives those of ``others`` that are in no group to the earliest of ``first`` near them.

    One of ``first`` that comes into a group itself leads none.
    """
    if not len(first) or not len(others):
        return
    index = _faiss.IndexFlatIP(others_ND.shape[1])
    index.add(others_ND)
    for row in range(0, len(first), _QUERY_ROWS):
        part = slice(row, row + _QUERY_ROWS)
        leads = leaders_N[first[part]] == first[part]
        queries = first[part][leads]
        if not len(queries):
            continue
        limits, _, found = index.range_search(first_MD[part][leads], radius)
        limits = limits.astype(np.int64)
        for query in np.flatnonzero(np.diff(limits)):
            leader = queries[query]
            if leaders_N[leader] != leader:
                continue
            near = others[found[limits[query] : limits[query + 1]]]
            near = near[(near > leader) & (leaders_N[near] == near)]
            leaders_N[near] = leader


def scores_with_first(snapshot: Snapshot, group: Ints) -> list[float]:
    """Exact cosines of a group's stored vectors with its first one's."""
    vectors = snapshot.take(group).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return [round(float(score), 6) for score in vectors @ vectors[0]]
