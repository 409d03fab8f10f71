"""Compaction: segments rewritten without the vectors of deleted items, small ones joined.

    segments a (3 rows, 1 deleted), b (2 rows)  ->  segment c (4 rows), a and b retired

Each step copies the rows of a few segments into one new file and moves their items to it in one
transaction; a kill between two steps leaves a sound collection. What was replaced is *retired*: it
stays on disk for `GRACE_S`, since a search that began before may still read it, and the writer that
comes after deletes it. Rows of deleted items stay as long in the database, without a vector.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipsys.errors import CollectionError
from clipsys.retrieval.storage import durable
from clipsys.retrieval.storage.row_writing import insert_segment
from clipsys.retrieval.storage.segments import SegmentFile, open_segment, write_segment
from clipsys.retrieval.storage.store import Store

#: Seconds for which a search may go on reading what a writer has replaced.
GRACE_S = 60.0
#: Rows of a segment that compaction fills; 32,768 x 512 float16 are 32 MB.
TARGET_ROWS = 32_768
#: So many segments of about the same size are joined when a writer ends: readers map each one.
SEGMENTS_PER_TIER = 32


@dataclass(frozen=True)
class CompactionReport:
    """What a compaction did.

    Attributes:
        vectors_dropped: rows of deleted items, or of none, that are no longer stored.
        segments_before, segments_after: how many segment files are in use.
        items_forgotten: deleted items whose last traces are gone from the database.
    """

    vectors_dropped: int
    segments_before: int
    segments_after: int
    items_forgotten: int


def compact(folder: Path, store: Store, dim: int) -> CompactionReport:
    """Drops every vector that no live item has, and joins small segments.

    Args:
        folder: the segments; call with the writer lock held.
        store: their items.
        dim: embedding width D.

    Raises:
        CollectionError: a segment is damaged, or the disk is full; what was done until then holds.
    """
    before = store.segments()
    used = _live_rows(store)
    fragmented = [
        segment_id
        for segment_id, segment in before.items()
        if used.get(segment_id, 0) < segment.num_rows or segment.num_rows < TARGET_ROWS // 2
    ]
    dropped = 0
    for group in _groups(fragmented, used):
        clean = len(group) == 1 and used.get(group[0], 0) == before[group[0]].num_rows
        if not clean:
            dropped += _rewrite(folder, store, {number: before[number] for number in group}, dim)
    return CompactionReport(dropped, len(before), len(store.segments()), _forget_deleted(store))


def join_small(folder: Path, store: Store, dim: int) -> None:
    """Joins segments of about the same size where there are many; call with the lock held.

    A tier holds segments whose sizes differ by a factor below `SEGMENTS_PER_TIER`, so a vector is
    copied a logarithmic number of times however many batches a collection grows by.
    """
    while True:
        tiers: dict[int, list[int]] = {}
        segments = store.segments()
        for segment_id, segment in segments.items():
            if segment.num_rows < TARGET_ROWS:
                tier = int(np.log(segment.num_rows) / np.log(SEGMENTS_PER_TIER))
                tiers.setdefault(tier, []).append(segment_id)
        full = next((ids for ids in tiers.values() if len(ids) >= SEGMENTS_PER_TIER), None)
        if full is None:
            return
        used = _live_rows(store)
        for group in _groups(full, used):
            if len(group) == 1:
                continue
            _rewrite(folder, store, {number: segments[number] for number in group}, dim)
        if len(store.segments()) == len(segments):
            return


def due(store: Store, *, now: float | None = None) -> list[str]:
    """Retired paths that may be deleted now."""
    latest = (time.time() if now is None else now) - GRACE_S
    return [
        path for (path,) in store.read("SELECT path FROM retired WHERE retired_at <= ?", (latest,))
    ]


def retired(store: Store) -> list[str]:
    """All retired paths, relative to the collection's data."""
    return [path for (path,) in store.read("SELECT path FROM retired")]


def _live_rows(store: Store) -> dict[int, int]:
    query = "SELECT segment, count(DISTINCT row) FROM items WHERE state = 'live' GROUP BY segment"
    return dict(store.read(query))


def _groups(segment_ids: Sequence[int], used: dict[int, int]) -> Iterator[list[int]]:
    group: list[int] = []
    rows = 0
    for segment_id in sorted(segment_ids):
        size = used.get(segment_id, 0)
        if group and rows + size > TARGET_ROWS:
            yield group
            group, rows = [], 0
        group.append(segment_id)
        rows += size
    if group:
        yield group


def _rewrite(folder: Path, store: Store, group: dict[int, SegmentFile], dim: int) -> int:
    """Copies the live rows of some segments into a new one. Returns how many rows were dropped."""
    marks = ",".join(str(int(segment_id)) for segment_id in group)
    places = store.read(
        f"SELECT id, segment, row FROM items WHERE state = 'live' AND segment IN ({marks}) "
        "ORDER BY id"
    )
    rows = {
        place: number for number, place in enumerate(dict.fromkeys((s, r) for _, s, r in places))
    }
    vectors_ND = np.empty((len(rows), dim), np.float32)
    for segment_id, segment in group.items():
        mine = [(row, number) for (owner, row), number in rows.items() if owner == segment_id]
        if mine:
            source = _trusted(folder, segment, dim)
            sources, targets = np.array(mine, np.int64).T
            vectors_ND[targets] = source[sources]
    fresh = write_segment(folder, vectors_ND) if rows else None
    now = time.time()
    with store.changing() as (connection, change):
        if fresh is not None:
            fresh_id = insert_segment(connection, fresh)
            connection.executemany(
                f"UPDATE items SET segment = {fresh_id}, row = ?, change = {change} WHERE id = ?",
                [(rows[segment_id, row], item_id) for item_id, segment_id, row in places],
            )
        connection.execute(
            "UPDATE items SET segment = NULL, row = NULL "
            f"WHERE state = 'deleted' AND segment IN ({marks})"
        )
        connection.execute(f"DELETE FROM segments WHERE id IN ({marks})")
        connection.executemany(
            "INSERT INTO retired VALUES (?, ?)",
            [(f"{folder.name}/{segment.name}", now) for segment in group.values()],
        )
    return sum(segment.num_rows for segment in group.values()) - len(rows)


def _trusted(
    folder: Path, segment: SegmentFile, dim: int
) -> np.ndarray[tuple[int, int], np.dtype[np.float16]]:
    """A segment whose bytes are those that were committed: altered ones must not be copied on."""
    rows = open_segment(folder, segment, dim)
    if durable.sha256_of(folder / segment.name) != segment.sha256:
        raise CollectionError(
            f"{folder / segment.name}: its content is not what was committed (SHA-256 differs); "
            "run `clipsys repair`"
        )
    return rows


def _forget_deleted(store: Store) -> int:
    """Deletes the rows of items that were deleted before the last compaction but a grace ago.

    A reader that has not followed since then reads everything again; ``floor`` tells it to.
    """
    now, purgeable = int(time.time()), store.state("purgeable")
    forgotten = 0
    with store.changing() as (connection, change):
        if now - store.state("purgeable_at") >= GRACE_S and purgeable > 0:
            forgotten = connection.execute(
                "DELETE FROM items WHERE state = 'deleted' AND change <= ?", (purgeable,)
            ).rowcount
            connection.execute("UPDATE state SET value = ? WHERE name = 'floor'", (purgeable,))
            connection.execute("UPDATE state SET value = 0 WHERE name = 'purgeable'")
            purgeable = 0
        if purgeable == 0:
            connection.execute("UPDATE state SET value = ? WHERE name = 'purgeable'", (change,))
            connection.execute("UPDATE state SET value = ? WHERE name = 'purgeable_at'", (now,))
    return forgotten
