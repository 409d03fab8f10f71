"""What a reader sees: the live items' ids and where their vectors lie, as of one commit.

A snapshot is immutable; a search works on one from beginning to end, whatever a writer does
meanwhile. Following the database costs one small query when nothing changed, and reads only the
changed rows when something did.

Shapes: N live items, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from clipsys.retrieval.storage.segments import Floats, Ints, SegmentReader
from clipsys.retrieval.storage.store import Store

#: Rows read at once by a full scan: 16,384 x 512 float32 are 32 MB.
BLOCK_ROWS = 16_384


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Live items as of a change number: parallel arrays, ascending by id; 24 bytes an item."""

    change: int
    ids_N: Ints
    segments_N: Ints
    rows_N: Ints
    vectors: SegmentReader

    def __len__(self) -> int:
        return len(self.ids_N)

    def positions(self, ids: Ints) -> Ints:
        """Positions of those of the ids that are live here, ascending. ``ids`` must ascend."""
        if len(self.ids_N) == 0 or len(ids) == 0:
            return np.empty(0, np.int64)
        positions = np.searchsorted(self.ids_N, ids)
        inside = positions < len(self.ids_N)
        positions, ids = positions[inside], ids[inside]
        found: Ints = positions[self.ids_N[positions] == ids]
        return found

    def spread(self, count: int) -> Ints:
        """At most so many ids, spread evenly, ascending."""
        places = np.linspace(0, len(self.ids_N) - 1, min(count, len(self.ids_N))).astype(np.int64)
        chosen: Ints = self.ids_N[places]
        return chosen

    def take(self, positions: Ints) -> Floats:
        """Stored vectors at positions, (len(positions), D) float32, unit norm to float16."""
        return self.vectors.take(self.segments_N[positions], self.rows_N[positions])

    def blocks(self, positions: Ints | None = None) -> Iterator[tuple[Ints, Floats]]:
        """Yields (ids, unit-norm float32 vectors) over all or some positions, block by block."""
        chosen = np.arange(len(self.ids_N)) if positions is None else positions
        for start in range(0, len(chosen), BLOCK_ROWS):
            part = chosen[start : start + BLOCK_ROWS]
            yield self.ids_N[part], unit_rows(self.take(part))


def unit_rows(vectors_ND: Floats) -> Floats:
    """Rows scaled to unit norm: float16 storage leaves them off by up to 1e-3."""
    norms_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    unit_ND: Floats = vectors_ND / np.maximum(norms_N1, np.float32(1e-12))
    return unit_ND


def empty_snapshot(vectors: SegmentReader) -> Snapshot:
    """The snapshot before any commit; `follow` brings it up to date."""
    nothing = np.empty(0, np.int64)
    return Snapshot(0, nothing, nothing, nothing, vectors)


def follow(snapshot: Snapshot, store: Store) -> Snapshot:
    """Returns the snapshot of the database's last commit, the same object if nothing changed."""
    if store.change() == snapshot.change:
        return snapshot
    changes = store.changes_since(snapshot.change)
    snapshot.vectors.register(changes.segments)
    if changes.from_start:
        snapshot = empty_snapshot(snapshot.vectors)
    keep_N = ~np.isin(snapshot.ids_N, changes.ids_N, assume_unique=True)
    live_N = changes.live_N.astype(bool)
    ids_N = np.concatenate([snapshot.ids_N[keep_N], changes.ids_N[live_N]])
    order_N = np.argsort(ids_N, kind="stable")
    return Snapshot(
        changes.change,
        ids_N[order_N],
        np.concatenate([snapshot.segments_N[keep_N], changes.segments_N[live_N]])[order_N],
        np.concatenate([snapshot.rows_N[keep_N], changes.rows_N[live_N]])[order_N],
        snapshot.vectors,
    )
