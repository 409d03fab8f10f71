"""All stored vectors, block by block, with their items: no model is loaded and no image read.

The ids are those of one moment. Each block looks at the collection as it is then: an item that was
deleted meanwhile is left out, and vectors that compaction has moved are found where they are.

Shapes: B items of a block, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from clipsys.retrieval.search.view import View
from clipsys.retrieval.storage.conditions import Condition
from clipsys.retrieval.storage.items import Item
from clipsys.retrieval.storage.segments import Floats, Ints
from clipsys.retrieval.storage.snapshot import unit_rows
from clipsys.retrieval.storage.store import Store

#: Items of a block. Cosines to 1,000 classes then stay in a processor's cache: a million items take
#: 13 s, in blocks of 16,384 20 s.
BLOCK_ITEMS = 4_096


def chosen_ids(view: View, store: Store, conditions: Sequence[Condition]) -> Ints:
    """Ids of the live items that pass a filter, ascending; of all where there is no condition."""
    snapshot = view.snapshot()
    if not conditions:
        return snapshot.ids_N
    ids: Ints = snapshot.ids_N[snapshot.positions(store.select_ids(conditions))]
    return ids


def vector_blocks(
    view: View, ids_N: Ints, block: int = BLOCK_ITEMS
) -> Iterator[tuple[Ints, Floats]]:
    """Ids and unit vectors (B, D) float32 of items that are still live.

    Args:
        view: of the collection.
        ids_N: ascending.
        block: items at once.
    """
    for start in range(0, len(ids_N), block):
        snapshot = view.snapshot()
        positions = snapshot.positions(ids_N[start : start + block])
        if len(positions):
            yield snapshot.ids_N[positions], unit_rows(snapshot.take(positions))


def item_blocks(
    view: View, store: Store, ids_N: Ints, block: int = BLOCK_ITEMS
) -> Iterator[tuple[list[Item], Floats]]:
    """As `vector_blocks`, with the items themselves."""
    for ids_B, vectors_BD in vector_blocks(view, ids_N, block):
        items = store.items(ids_B.tolist())
        kept = np.array([int(item_id) in items for item_id in ids_B], bool)  # all, but for a purge
        yield [items[int(item_id)] for item_id in ids_B[kept]], vectors_BD[kept]
