"""The database of a collection: items, failures and segments, in SQLite.

This is the truth; the FAISS index is derived from it. One transaction commits a batch:

    vectors -> segment file, fsynced --.
    new items, updates, failures ------+--> BEGIN .. COMMIT

so after a kill at any point each item has its vector and each vector its item. The database runs in
WAL mode: any number of readers, in this process or others, go on while one writer commits. Each
commit raises a change number and stamps the rows it touched with it, so that a reader follows by
asking for what is newer than what it knows.

Ids come from AUTOINCREMENT and are never used twice: an item whose image changed is deleted and
inserted anew, which keeps index generations immutable and true.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipsys.errors import CollectionError
from clipsys.retrieval import words
from clipsys.retrieval.items import (
    Batch,
    Failure,
    Item,
    ItemUpdate,
    Location,
    NewItem,
    plain_text,
    to_json,
)
from clipsys.retrieval.schema import (
    SCHEMA,
    SELECT_FAILURE,
    SELECT_ITEM,
    VERSION,
    check_length,
    failure_of,
    item_of,
    sql_text,
)
from clipsys.retrieval.segments import Ints, SegmentFile

FILE_NAME = "items.sqlite"
#: Seconds a statement waits for another connection's lock (commits take milliseconds).
BUSY_TIMEOUT_S = 30.0
#: Ids bound in one statement; SQLite's own bound is 32,766 from 3.32 on.
_IDS_PER_STATEMENT = 5_000


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
        self._lock = threading.RLock()
        check_length(path)
        try:
            self._connection = sqlite3.connect(
                f"{path.resolve().as_uri()}?mode=rw",
                uri=True,
                timeout=BUSY_TIMEOUT_S,
                isolation_level=None,  # transactions are begun and ended explicitly
                check_same_thread=False,
            )
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
            self._connection.create_function("casefold", 1, _casefold, deterministic=True)
            self._connection.execute("PRAGMA foreign_keys = ON")
            # WAL with FULL fsyncs the log at each commit: a commit survives a power cut.
            self._connection.execute("PRAGMA synchronous = FULL")
        except sqlite3.Error as error:
            raise CollectionError(
                f"{path}: the item database cannot be opened ({error}); restore it from a backup"
            ) from error
        try:
            self._check_version(version)
        except CollectionError:
            self._connection.close()
            raise

    @classmethod
    def create(cls, path: Path) -> Store:
        """Makes an empty database and opens it.

        Raises:
            CollectionError: it cannot be written.
        """
        try:
            connection = sqlite3.connect(path, isolation_level=None)
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.executescript(SCHEMA)
                words.ensure_table(connection)
            finally:
                connection.close()
        except sqlite3.Error as error:
            raise CollectionError(
                f"{path}: the item database cannot be made ({error}); free some space"
            ) from error
        return cls(path)

    def close(self) -> None:
        """Closes the connection; using the store afterwards is an error."""
        with self._lock:
            self._connection.close()

    # ---- reading ---------------------------------------------------------------------------

    def change(self) -> int:
        """The number of the last commit."""
        return int(self._one("SELECT value FROM state WHERE name = 'change'")[0])

    def count_items(self) -> int:
        """How many live items there are."""
        return int(self._one("SELECT count(*) FROM items WHERE state = 'live'")[0])

    def count_deleted(self) -> int:
        """How many deleted items still occupy vector rows."""
        return int(self._one("SELECT count(*) FROM items WHERE state = 'deleted'")[0])

    def count_failures(self) -> int:
        """How many files are in the failure ledger."""
        return int(self._one("SELECT count(*) FROM failures")[0])

    def find(self, uri: str) -> Item | None:
        """The live item of a uri."""
        rows = self._all(f"{SELECT_ITEM} WHERE uri = ? AND state = 'live'", (sql_text(uri),))
        return item_of(rows[0]) if rows else None

    def items(self, ids: Sequence[int]) -> dict[int, Item]:
        """The stored items with these ids, deleted ones too."""
        found: dict[int, Item] = {}
        for start in range(0, len(ids), _IDS_PER_STATEMENT):
            chunk = [int(item_id) for item_id in ids[start : start + _IDS_PER_STATEMENT]]
            marks = ",".join("?" * len(chunk))
            for row in self._all(f"{SELECT_ITEM} WHERE id IN ({marks})", chunk):
                item = item_of(row)
                found[item.id] = item
        return found

    def live_items(self, *, start_after: int = 0, limit: int = 1_000) -> list[Item]:
        """Live items in the order of their ids, a page at a time."""
        query = f"{SELECT_ITEM} WHERE state = 'live' AND id > ? ORDER BY id LIMIT ?"
        return [item_of(row) for row in self._all(query, (start_after, limit))]

    def find_vector(self, content_hash: str) -> Location | None:
        """Where the vector of a live item with this content lies."""
        query = "SELECT segment, row FROM items WHERE content_hash = ? AND state = 'live' LIMIT 1"
        rows = self._all(query, (content_hash,))
        return Location(*rows[0]) if rows else None

    def find_failure(self, uri: str) -> Failure | None:
        """The ledger's entry of a uri."""
        rows = self._all(f"{SELECT_FAILURE} WHERE uri = ?", (sql_text(uri),))
        return failure_of(rows[0]) if rows else None

    def failures(self, limit: int | None = None) -> list[Failure]:
        """The failure ledger, in the order of the uris."""
        rows = self._all(
            f"{SELECT_FAILURE} ORDER BY uri LIMIT ?", (-1 if limit is None else limit,)
        )
        return [failure_of(row) for row in rows]

    def segments(self) -> dict[int, SegmentFile]:
        """All committed segments by database id."""
        rows = self._all("SELECT id, file, num_rows, sha256 FROM segments")
        return {row[0]: SegmentFile(*row[1:]) for row in rows}

    def changes_since(self, change: int) -> Changes:
        """Every item stamped after a change number, and all segments, as of one moment."""
        with self._transaction("BEGIN"):
            current = self.change()
            from_start = change < self.state("floor")
            rows = self._all(
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
        return int(self._one("SELECT value FROM state WHERE name = ?", (name,))[0])

    def has_origin(self, source: str, uri: str) -> bool:
        """Whether a source is known to give a uri."""
        query = (
            "SELECT 1 FROM origins JOIN sources ON sources.id = origins.source "
            "WHERE origins.uri = ? AND sources.name = ?"
        )
        return bool(self._all(query, (sql_text(uri), sql_text(source))))

    def read(self, query: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows of a query, for the modules that look after a collection."""
        return self._all(query, parameters)

    def select_ids(self, condition: str, parameters: Sequence[Any]) -> Ints:
        """Ids of live items for which an SQL condition holds, ascending.

        ``condition`` comes from :mod:`clipsys.retrieval.filters`; values travel as parameters.
        """
        query = f"SELECT id FROM items WHERE state = 'live' AND ({condition}) ORDER BY id"
        rows = self._all(query, parameters)
        return np.fromiter((row[0] for row in rows), np.int64, len(rows))

    def match_words(self, expression: str) -> Ints:
        """Ids of live items whose captions match, best first (BM25), equal ones by id.

        ``expression`` comes from :func:`clipsys.retrieval.words.match_expression`.
        """
        query = f"SELECT rowid FROM {words.TABLE} WHERE text MATCH ? ORDER BY rank, rowid"
        with self._lock:
            try:
                words.ensure_table(self._connection)
            except sqlite3.Error as error:
                raise self._explained(error) from error
            rows = self._all(query, (expression,))
        return np.fromiter((row[0] for row in rows), np.int64, len(rows))

    def metadata_keys(self) -> list[str]:
        """Every metadata key that some live item has. Reads all items."""
        query = (
            "SELECT DISTINCT fields.key FROM items, json_each(items.metadata) AS fields "
            "WHERE state = 'live' ORDER BY 1"
        )
        return [row[0] for row in self._all(query)]

    def check_integrity(self) -> list[str]:
        """SQLite's own check of the file; an empty list when it is sound."""
        try:
            rows = self._all("PRAGMA integrity_check(10)")
        except CollectionError as error:
            return [str(error)]
        return [] if rows == [("ok",)] else [f"{self.path}: {row[0]}" for row in rows]

    # ---- writing, with the writer lock held ---------------------------------------------------

    @contextmanager
    def changing(self) -> Iterator[tuple[sqlite3.Connection, int]]:
        """One transaction of changes: yields the connection and the number to stamp rows with."""
        with self._transaction("BEGIN IMMEDIATE") as connection:
            yield connection, self._next_change()

    def commit(self, batch: Batch, segment: SegmentFile | None) -> list[int]:
        """Commits a batch in one transaction. Returns the ids of the new items, in their order.

        Args:
            batch: its new items without a location take the rows of ``segment`` in order.
            segment: the durable file with exactly those rows, or None if there are none.
        """
        num_fresh = sum(item.location is None for item in batch.new)
        assert num_fresh == (segment.num_rows if segment else 0)
        with self._transaction("BEGIN IMMEDIATE") as connection:
            change = self._next_change()
            segment_id = 0
            if segment is not None:
                cursor = connection.execute(
                    "INSERT INTO segments (file, num_rows, sha256) VALUES (?, ?, ?)",
                    (segment.name, segment.num_rows, segment.sha256),
                )
                segment_id = int(cursor.lastrowid or 0)
            row, ids = 0, []
            for item in batch.new:
                location = item.location or Location(segment_id, row)
                row += item.location is None
                if item.replaces is not None:
                    self._mark_deleted([item.replaces], change)
                ids.append(self._insert(item, location, change))
            for update in batch.updates:
                self._update(update, change)
            for failure in batch.failures:
                self._record_failure(failure)
            for source, uri in batch.origins:
                self._record_origin(source, uri)
        return ids

    def delete(self, ids: Sequence[int]) -> int:
        """Marks live items as deleted. Returns how many there were."""
        with self._transaction("BEGIN IMMEDIATE"):
            return self._mark_deleted(ids, self._next_change())

    def _next_change(self) -> int:
        query = "UPDATE state SET value = value + 1 WHERE name = 'change' RETURNING value"
        return int(self._connection.execute(query).fetchone()[0])

    def _mark_deleted(self, ids: Sequence[int], change: int) -> int:
        query = "UPDATE items SET state = 'deleted', change = ? WHERE id = ? AND state = 'live'"
        return self._connection.executemany(query, [(change, int(i)) for i in ids]).rowcount

    def _insert(self, item: NewItem, location: Location, change: int) -> int:
        captions = [plain_text(caption) for caption in item.captions]
        cursor = self._connection.execute(
            "INSERT INTO items (id, uri, content_hash, size_bytes, mtime_ns, caption, captions, "
            "metadata, segment, row, change) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                item.id,
                sql_text(item.uri),
                item.content_hash,
                item.size_bytes,
                item.mtime_ns,
                captions[0] if captions else None,
                to_json(captions),
                to_json(dict(item.metadata)),
                location.segment,
                location.row,
                change,
            ),
        )
        self._connection.execute("DELETE FROM failures WHERE uri = ?", (sql_text(item.uri),))
        return int(cursor.lastrowid or 0)

    def _update(self, update: ItemUpdate, change: int) -> None:
        captions = [plain_text(caption) for caption in update.captions]
        self._connection.execute(
            "UPDATE items SET size_bytes = ?, mtime_ns = ?, caption = ?, captions = ?, "
            "metadata = ?, change = ? WHERE id = ?",
            (
                update.size_bytes,
                update.mtime_ns,
                captions[0] if captions else None,
                to_json(captions),
                to_json(dict(update.metadata)),
                change,
                update.id,
            ),
        )
        self._connection.execute(
            "DELETE FROM failures WHERE uri = (SELECT uri FROM items WHERE id = ?)", (update.id,)
        )

    def _record_failure(self, failure: Failure) -> None:
        self._connection.execute(
            "INSERT INTO failures (uri, reason, message, size_bytes, mtime_ns, captions, metadata) "
            "VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (uri) DO UPDATE SET "
            "reason = excluded.reason, message = excluded.message, "
            "size_bytes = excluded.size_bytes, mtime_ns = excluded.mtime_ns, "
            "captions = excluded.captions, metadata = excluded.metadata, "
            "attempts = attempts + 1, failed_at = excluded.failed_at",
            (
                sql_text(failure.uri),
                failure.reason,
                plain_text(failure.message),
                failure.size_bytes,
                failure.mtime_ns,
                to_json([plain_text(caption) for caption in failure.captions]),
                to_json(dict(failure.metadata)),
            ),
        )

    def _record_origin(self, source: str, uri: str) -> None:
        self._connection.execute(
            "INSERT OR IGNORE INTO sources (name) VALUES (?)", (sql_text(source),)
        )
        self._connection.execute(
            "INSERT OR IGNORE INTO origins SELECT id, ? FROM sources WHERE name = ?",
            (sql_text(uri), sql_text(source)),
        )

    # ---- plumbing ------------------------------------------------------------------------------

    def _check_version(self, version: int) -> None:
        if version == 0:
            raise CollectionError(
                f"{self.path}: is not the database of a collection; restore it from a backup"
            )
        if version != VERSION:
            raise CollectionError(
                f"{self.path}: is of database version {version}, this clipsys knows version "
                f"{VERSION}; use the clipsys version that wrote it"
            )

    def _one(self, query: str, parameters: Sequence[Any] = ()) -> tuple[Any, ...]:
        return self._all(query, parameters)[0]

    def _all(self, query: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return self._connection.execute(query, parameters).fetchall()
            except sqlite3.Error as error:
                raise self._explained(error) from error

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._connection.execute(begin)
                try:
                    yield self._connection
                    self._connection.execute("COMMIT")
                except BaseException:
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise self._explained(error) from error

    def _explained(self, error: sqlite3.Error) -> CollectionError:
        return CollectionError(f"{self.path}: the item database reports: {error}")


def _casefold(value: str | int | float | bytes | None) -> str | int | float | bytes | None:
    return value.casefold() if isinstance(value, str) else value
