"""Mending a collection without losing more than is lost.

    index damaged            -> built again from the vectors
    vectors damaged, gone    -> their items go to the failure ledger, to be encoded again
    vectors without an item  -> dropped
    words of captions wrong  -> taken from the items again
    index of metadata wrong  -> likewise
    counters behind          -> set right

What only the database or the manifest knew cannot be made up: that needs a backup.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from clipsys.errors import CollectionError
from clipsys.retrieval.maintenance.verification import (
    Bools,
    counter_faults,
    index_faults,
    metadata_faults,
    rows_without_vector,
    segment_problem,
    unused_rows,
    verify,
    word_faults,
)
from clipsys.retrieval.storage import metadata_index, words
from clipsys.retrieval.storage.creation import SEGMENTS
from clipsys.retrieval.storage.items import Batch, Failure
from clipsys.retrieval.storage.manifest import Manifest
from clipsys.retrieval.storage.store import Changes, Store
from clipsys.retrieval.writing.compaction import compact
from clipsys.retrieval.writing.writer import Writer

#: The ledger's reason for an image that has to be encoded again.
VECTOR_LOST = "vector lost"


@dataclass
class RepairReport:
    """What was mended.

    Attributes:
        requeued: items whose vector is lost; they are in the ledger, to be encoded again.
        segments_dropped: damaged segments.
        duplicates_removed: items that shared a uri with a newer one.
        vectors_dropped: vectors that belonged to no live item.
        words_rebuilt: whether the table of the captions' words was rebuilt.
        metadata_rebuilt: whether the index of metadata was rebuilt.
        counters_set: whether the database's counters were behind.
        index_rebuilt: whether there is a new index generation.
        remaining: what could not be mended, one line each.
    """

    requeued: int = 0
    segments_dropped: int = 0
    duplicates_removed: int = 0
    vectors_dropped: int = 0
    words_rebuilt: bool = False
    metadata_rebuilt: bool = False
    counters_set: bool = False
    index_rebuilt: bool = False
    remaining: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        """As ``clipsys repair --json`` prints it."""
        return asdict(self)


def repair(folder: Path, store: Store, writer: Writer) -> RepairReport:
    """Mends a collection as far as it can be mended without a backup, and checks it again.

    Raises:
        CollectionError: the database itself is damaged, or the disk is full.
    """
    report = _repair_data(folder, writer.manifest, store)
    manifest = writer.manifest
    if manifest.index is None or index_faults(folder, manifest, store):
        writer.publish_index()
        report.index_rebuilt = True
    report.remaining = [str(fault) for fault in verify(folder)]
    return report


def _repair_data(folder: Path, manifest: Manifest, store: Store) -> RepairReport:
    """Mends database and segments.

    Raises:
        CollectionError: the database itself is damaged, or the disk is full.
    """
    report = RepairReport()
    if word_faults(store):  # first: whatever changes items below changes their words as well
        with store.changing() as (connection, _):
            words.rebuild_table(connection)
        report.words_rebuilt = True
    if metadata_faults(store):  # likewise
        with store.changing() as (connection, _):
            metadata_index.rebuild_index(connection)
        report.metadata_rebuilt = True
    _repair_database(store, report)
    if counter_faults(store):
        _set_counters(store)
        report.counters_set = True
    segments = folder / manifest.edition / SEGMENTS
    dim = manifest.encoder.dim
    changes = store.changes_since(-1)
    damaged = [
        number
        for number, segment in changes.segments.items()
        if segment_problem(segments, segment, dim) is not None
    ]
    lost_N = rows_without_vector(changes) | np.isin(changes.segments_N, damaged)
    report.requeued = _requeue(store, changes, lost_N, damaged)
    report.segments_dropped = len(damaged)
    if unused_rows(store.changes_since(-1)):
        report.vectors_dropped = compact(segments, store, dim).vectors_dropped
    return report


def _repair_database(store: Store, report: RepairReport) -> None:
    problems = store.check_integrity()
    if problems:
        report.duplicates_removed = _remove_duplicates(store)
        with store.changing() as (connection, _):
            connection.execute("REINDEX")  # SQLite's own indexes are derived from the tables
        problems = store.check_integrity()
    if problems:
        raise CollectionError(f"{problems[0]}; this cannot be repaired, restore it from a backup")


def _set_counters(store: Store) -> None:
    with store.changing() as (connection, _):
        connection.execute(
            "UPDATE state SET value = max(value, (SELECT max(change) FROM items)) "
            "WHERE name = 'change'"
        )
        last_id = "(SELECT coalesce(max(id), 0) FROM items)"
        connection.execute(
            f"UPDATE sqlite_sequence SET seq = max(seq, {last_id}) WHERE name = 'items'"
        )
        connection.execute(
            f"INSERT INTO sqlite_sequence SELECT 'items', {last_id} WHERE NOT EXISTS "
            "(SELECT 1 FROM sqlite_sequence WHERE name = 'items')"
        )


def _requeue(store: Store, changes: Changes, lost_N: Bools, damaged: list[int]) -> int:
    """Moves items whose vector is lost to the ledger, with what is known of them."""
    lost_live = changes.ids_N[lost_N & changes.live_N.astype(bool)].tolist()
    failures = [
        Failure(
            item.uri,
            VECTOR_LOST,
            f"{item.uri}: its vector was damaged; encode it again with `clipsys failures --retry`",
            captions=item.captions,
            metadata=item.metadata,
        )
        for item in store.items(lost_live).values()
    ]
    if failures:
        # The ledger first: a kill in between leaves an entry too many, never an item forgotten.
        store.commit(Batch(failures=failures), None)
    with store.changing() as (connection, change):
        connection.executemany(
            "UPDATE items SET state = 'deleted', segment = NULL, row = NULL, change = ? "
            "WHERE id = ?",
            [(change, int(item_id)) for item_id in changes.ids_N[lost_N]],
        )
        connection.executemany(
            "DELETE FROM segments WHERE id = ?", [(number,) for number in damaged]
        )
    return len(lost_live)


def _remove_duplicates(store: Store) -> int:
    with store.changing() as (connection, change):
        return connection.execute(
            f"UPDATE items NOT INDEXED SET state = 'deleted', change = {change} "
            "WHERE state = 'live' AND id NOT IN "
            "(SELECT max(id) FROM items NOT INDEXED WHERE state = 'live' GROUP BY uri)"
        ).rowcount
