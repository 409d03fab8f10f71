"""The database of a collection: items, failures and segments, in SQLite.

This is the truth; the FAISS index is derived from it. One transaction commits a batch:

    vectors -> segment file, fsynced --.
    new items, updates, failures ------+--> BEGIN .. COMMIT

so after a kill at any point each item has its vector and each vector its item. Each commit raises a
change number and stamps the rows it touched with it, so that a reader follows by asking for what is
newer than what it knows.

Ids come from AUTOINCREMENT and are never used twice: an item whose image changed is deleted and
inserted again, which keeps index generations immutable and true.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipsys.errors import QueryError
from clipsys.retrieval.storage import metadata_index, words
from clipsys.retrieval.storage.conditions import Condition
from clipsys.retrieval.storage.database import Database, create_database
from clipsys.retrieval.storage.filter_hints import explain_nothing, explain_unknown, unknown_key
from clipsys.retrieval.storage.filters import split_path, to_selection
from clipsys.retrieval.storage.items import Batch, Failure, Item, Location, plain_text
from clipsys.retrieval.storage.row_writing import (
    insert_item,
    insert_segment,
    mark_deleted,
    next_change,
    record_claim,
    record_failure,
    record_origin,
    update_item,
)
from clipsys.retrieval.storage.schema import (
    LATER_TABLES,
    SELECT_FAILURE,
    SELECT_ITEM,
    failure_of,
    item_of,
    sql_text,
)
from clipsys.retrieval.storage.segments import Ints, SegmentFile
from clipsys.retrieval.storage.sorting import (
    SORT_COLUMNS,
    SortValue,
    sort_queries,
    sort_value,
)

FILE_NAME = "items.sqlite"
#: Ids bound in one statement; SQLite's own bound is 32,766 from 3.32 on.
_IDS_PER_STATEMENT = 5_000

_logger = logging.getLogger(__name__)
#: Read from an index that has nothing else.
_LIVE_IDS = "SELECT id FROM items INDEXED BY items_live WHERE state = 'live'"


@dataclass(frozen=True)
class Changes:
    """Which items changed after some change number, as parallel arrays sorted by id.

    ``segments_N`` and ``rows_N`` are -1 for a deleted item whose vector is gone. ``segments`` are
    all segments as of the same moment. ``from_start``: deleted items were purged since, so these
    are all items there are, and what was known before is to be forgotten.
    """

    change: int
    from_start: bool
    ids_N: Ints
    live_N: Ints
    segments_N: Ints
    rows_N: Ints
    segments: dict[int, SegmentFile]


class Store:
    """One connection to a collection's database. Thread-safe: statements take turns."""

    def __init__(self, path: Path) -> None:
        """Opens an existing database.

        Raises:
            CollectionError: it is missing or not a database of this version.
        """
        self.path = path
        self._database = Database(path)

    @classmethod
    def create(cls, path: Path) -> Store:
        """Makes an empty database and opens it.

        Raises:
            CollectionError: it cannot be written.
        """
        create_database(path)
        return cls(path)

    def close(self) -> None:
        """Closes the connection; using the store afterwards is an error."""
        self._database.close()

    # ---- reading ---------------------------------------------------------------------------

    def change(self) -> int:
        """The number of the last commit."""
        return int(self._database.row("SELECT value FROM state WHERE name = 'change'")[0])

    def count_items(self) -> int:
        """How many live items there are."""
        return int(self._database.row("SELECT count(*) FROM items WHERE state = 'live'")[0])

    def count_deleted(self) -> int:
        """How many deleted items still occupy vector rows."""
        return int(self._database.row("SELECT count(*) FROM items WHERE state = 'deleted'")[0])

    def count_failures(self) -> int:
        """How many files are in the failure ledger."""
        return int(self._database.row("SELECT count(*) FROM failures")[0])

    def find(self, uri: str) -> Item | None:
        """The live item of a uri."""
        rows = self._database.rows(
            f"{SELECT_ITEM} WHERE uri = ? AND state = 'live'", (sql_text(uri),)
        )
        return item_of(rows[0]) if rows else None

    def items(self, ids: Sequence[int]) -> dict[int, Item]:
        """The stored items with these ids, deleted ones too."""
        found: dict[int, Item] = {}
        for start in range(0, len(ids), _IDS_PER_STATEMENT):
            chunk = [int(item_id) for item_id in ids[start : start + _IDS_PER_STATEMENT]]
            marks = ",".join("?" * len(chunk))
            for row in self._database.rows(f"{SELECT_ITEM} WHERE id IN ({marks})", chunk):
                item = item_of(row)
                found[item.id] = item
        return found

    def live_items(self, *, start_after: int = 0, limit: int = 1_000) -> list[Item]:
        """Live items in the order of their ids, a page at a time."""
        query = f"{SELECT_ITEM} WHERE state = 'live' AND id > ? ORDER BY id LIMIT ?"
        return [item_of(row) for row in self._database.rows(query, (start_after, limit))]

    def find_vector(self, content_hash: str) -> Location | None:
        """Where the vector of a live item with this content lies."""
        query = "SELECT segment, row FROM items WHERE content_hash = ? AND state = 'live' LIMIT 1"
        rows = self._database.rows(query, (content_hash,))
        return Location(*rows[0]) if rows else None

    def items_of_content(self, content_hash: str) -> list[Item]:
        """Live items whose files have this content, the oldest first."""
        query = f"{SELECT_ITEM} WHERE content_hash = ? AND state = 'live' ORDER BY id"
        return [item_of(row) for row in self._database.rows(query, (content_hash,))]

    def find_failure(self, uri: str) -> Failure | None:
        """The ledger's entry of a uri."""
        rows = self._database.rows(f"{SELECT_FAILURE} WHERE uri = ?", (sql_text(uri),))
        return failure_of(rows[0]) if rows else None

    def failures(self, limit: int | None = None) -> list[Failure]:
        """The failure ledger, in the order of the uris."""
        rows = self._database.rows(
            f"{SELECT_FAILURE} ORDER BY uri LIMIT ?", (-1 if limit is None else limit,)
        )
        return [failure_of(row) for row in rows]

    def segments(self) -> dict[int, SegmentFile]:
        """All committed segments by database id."""
        rows = self._database.rows("SELECT id, file, num_rows, sha256, mtime_ns FROM segments")
        return {row[0]: SegmentFile(*row[1:]) for row in rows}

    def changes_since(self, change: int) -> Changes:
        """Every item stamped after a change number, and all segments, as of one moment."""
        with self._database.transaction("BEGIN"):
            current = self.change()
            from_start = change < self.state("floor")
            rows = self._database.rows(
                "SELECT id, state = 'live', coalesce(segment, -1), coalesce(row, -1) FROM items "
                "WHERE change > ? ORDER BY id",
                (-1 if from_start else change,),
            )
            segments = self.segments()
        table = np.array(rows, np.int64).reshape(-1, 4)
        ids_N, live_N, segments_N, rows_N = (np.ascontiguousarray(column) for column in table.T)
        return Changes(current, from_start, ids_N, live_N, segments_N, rows_N, segments)

    def state(self, name: str) -> int:
        """A counter of the collection; see the schema."""
        return int(self._database.row("SELECT value FROM state WHERE name = ?", (name,))[0])

    def read(self, query: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows of a query, for the modules that look after a collection."""
        return self._database.rows(query, parameters)

    def select_ids(self, conditions: Sequence[Condition]) -> Ints:
        """Ids of live items for which all conditions hold, ascending, as of one moment.

        Where none does, or all do since a key is unknown, a warning says why: as a rule a key or a
        value is misspelt.
        """
        found = self._select_ids(conditions)
        if len(found):
            reason = explain_unknown(conditions, self._database.rows)
        else:
            reason = self.explain_nothing(conditions)
        if reason:
            _logger.warning("%s", reason)
        return found

    def _select_ids(self, conditions: Sequence[Condition]) -> Ints:
        selections = [to_selection(condition) for condition in conditions]
        with self._database.transaction("BEGIN") as connection:
            if all(selection.excluded for selection in selections):
                found = _ids(connection.execute(_LIVE_IDS))
            for number, selection in enumerate(sorted(selections, key=lambda one: one.excluded)):
                ids = _ids(connection.execute(selection.statement, selection.parameters))
                if selection.excluded:
                    found = np.setdiff1d(found, ids, assume_unique=True)
                else:
                    found = np.intersect1d(found, ids, assume_unique=True) if number else ids
        return found

    def explain_nothing(self, conditions: Sequence[Condition]) -> str | None:
        """Why a filter selects nothing, with the nearest key or value; None if it does select."""
        return explain_nothing(
            conditions,
            count=lambda chosen: len(self._select_ids(chosen)),
            read=self._database.rows,
        )

    def sort_values(self, ids: Sequence[int], key: str) -> dict[int, SortValue]:
        """What items are sorted by, by id; items that lack the key are left out.

        Args:
            ids: of the items.
            key: a metadata key, a field of a struct as ``a.b``; or where no item has such metadata
                ``uri``, ``caption``, ``added`` or ``modified``.

        Raises:
            QueryError: no item has it.
        """
        column = None if self._has_key(key) else SORT_COLUMNS.get(key)
        below = split_path(key)
        if column is None and not self._has_key(key) and not (below and self._has_key(below[0])):
            known = [*self.metadata_keys(), *SORT_COLUMNS]
            raise QueryError(f"cannot sort by {key!r}: {unknown_key(key, known)}")
        found: dict[int, SortValue] = {}
        for start in range(0, len(ids), _IDS_PER_STATEMENT):
            chunk = [int(item_id) for item_id in ids[start : start + _IDS_PER_STATEMENT]]
            marks = ",".join("?" * len(chunk))
            for query, parameters in sort_queries(key, column, below):
                rows = self._database.rows(f"{query} WHERE id IN ({marks})", (*parameters, *chunk))
                for item_id, kind, value in rows:
                    compared = sort_value(kind, value)
                    if compared is not None:
                        found[item_id] = compared
        return found

    def _has_key(self, key: str) -> bool:
        query = "SELECT 1 FROM metadata_keys WHERE key = ?"
        return bool(self._database.rows(query, (plain_text(key),)))

    def match_words(self, expression: str) -> Ints:
        """Ids of live items whose captions and file names match, best first (BM25), then by id.

        ``expression`` comes from :func:`clipsys.retrieval.storage.words.match_expression`.
        """
        query = f"SELECT rowid FROM {words.TABLE} WHERE {words.TABLE} MATCH ? ORDER BY rank, rowid"
        if not self.read(words.IS_CURRENT, (words.SCHEMA[0],)):
            if not self._database.is_writable:
                self._database.use_copy("has no words of file names yet")
            with self._database.turn() as connection:
                words.ensure_table(connection)
        rows = self.read(query, (expression,))
        return np.fromiter((row[0] for row in rows), np.int64, len(rows))

    def metadata_keys(self) -> list[str]:
        """Every metadata key that some live item has."""
        return [key for (key,) in self._database.rows("SELECT key FROM metadata_keys ORDER BY 1")]

    def find_metadata_problems(self) -> list[str]:
        """What in the index of metadata is not what the items say, as of one moment."""
        with self._database.transaction("BEGIN") as connection:
            return metadata_index.find_problems(connection)

    def check_integrity(self) -> list[str]:
        """SQLite's own check of the file; an empty list when it is sound."""
        return self._database.check_integrity()

    # ---- writing, with the writer lock held ---------------------------------------------------

    @contextmanager
    def changing(self) -> Iterator[tuple[sqlite3.Connection, int]]:
        """One transaction of changes: yields the connection and the number to stamp rows with."""
        with self._database.transaction("BEGIN IMMEDIATE") as connection:
            yield connection, next_change(connection)

    def commit(self, batch: Batch, segment: SegmentFile | None) -> list[int]:
        """Commits a batch in one transaction. Returns the ids of the new items, in their order.

        Args:
            batch: its new items without a location take the rows of ``segment`` in order.
            segment: the durable file with exactly those rows, or None if there are none.
        """
        num_fresh = sum(item.location is None for item in batch.new)
        assert num_fresh == (segment.num_rows if segment else 0)
        with self._database.transaction("BEGIN IMMEDIATE") as connection:
            change = next_change(connection)
            segment_id = 0
            if segment is not None:
                segment_id = insert_segment(connection, segment)
            row, ids = 0, []
            for item in batch.new:
                location = item.location or Location(segment_id, row)
                row += item.location is None
                if item.replaces is not None:
                    mark_deleted(connection, [item.replaces], change)
                ids.append(insert_item(connection, item, location, change))
            for changed in batch.updates:
                update_item(connection, changed, change)
            for failure in batch.failures:
                record_failure(connection, failure)
            for source, uri in batch.origins:
                record_origin(connection, source, uri)
            for source, uri, captions, keys in batch.claims:
                record_claim(connection, source, uri, captions, keys)
        return ids

    def add_later_tables(self) -> None:
        """Adds the tables that the database of an earlier version lacks."""
        if not self.read("SELECT 1 FROM sqlite_master WHERE name = 'annotations'"):
            with self._database.transaction("BEGIN IMMEDIATE") as connection:
                for statement in LATER_TABLES:
                    connection.execute(statement)

    def note_segment_times(self, times_ns: Mapping[int, int]) -> None:
        """Records when segments were written, by database id."""
        with self._database.transaction("BEGIN IMMEDIATE") as connection:
            connection.executemany(
                "UPDATE segments SET mtime_ns = ? WHERE id = ?",
                [(mtime_ns, segment_id) for segment_id, mtime_ns in times_ns.items()],
            )

    def delete(self, ids: Sequence[int]) -> int:
        """Marks live items as deleted. Returns how many there were."""
        with self._database.transaction("BEGIN IMMEDIATE") as connection:
            return mark_deleted(connection, ids, next_change(connection))


def _ids(cursor: sqlite3.Cursor) -> Ints:
    """The ids that a statement gives, ascending, each once."""
    rows = cursor.fetchall()
    ids = np.sort(np.fromiter((row[0] for row in rows), np.int64, len(rows)))
    once: Ints = ids[np.diff(ids, prepend=-1) > 0]  # np.unique takes ten times as long
    return once
