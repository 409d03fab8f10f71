"""Rows into a collection's tables: the statements of which commits are made.

Each takes the connection of the transaction that it is part of.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence

from clipsys.retrieval.storage.items import (
    Failure,
    ItemUpdate,
    Location,
    NewItem,
    plain_text,
    to_json,
)
from clipsys.retrieval.storage.schema import sql_text
from clipsys.retrieval.storage.segments import SegmentFile


def next_change(connection: sqlite3.Connection) -> int:
    """Raises the change number of a transaction, which its rows are stamped with."""
    query = "UPDATE state SET value = value + 1 WHERE name = 'change' RETURNING value"
    return int(connection.execute(query).fetchone()[0])


def mark_deleted(connection: sqlite3.Connection, ids: Sequence[int], change: int) -> int:
    """Marks live items as deleted. Returns how many there were."""
    query = "UPDATE items SET state = 'deleted', change = ? WHERE id = ? AND state = 'live'"
    known = [(change, int(i)) for i in ids if 0 < int(i) < 2**63]  # others SQLite cannot bind
    return connection.executemany(query, known).rowcount if known else 0


def insert_segment(connection: sqlite3.Connection, segment: SegmentFile) -> int:
    """Enters a durable segment. Returns its database id."""
    cursor = connection.execute(
        "INSERT INTO segments (file, num_rows, sha256, mtime_ns) VALUES (?, ?, ?, ?)",
        (segment.name, segment.num_rows, segment.sha256, segment.mtime_ns),
    )
    return int(cursor.lastrowid or 0)


def insert_item(
    connection: sqlite3.Connection, item: NewItem, location: Location, change: int
) -> int:
    """Inserts a new item, which so is no failure any more. Returns its id."""
    captions = [plain_text(caption) for caption in item.captions]
    cursor = connection.execute(
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
    connection.execute("DELETE FROM failures WHERE uri = ?", (sql_text(item.uri),))
    return int(cursor.lastrowid or 0)


def update_item(connection: sqlite3.Connection, update: ItemUpdate, change: int) -> None:
    """Sets what may change of an item without its image: size, time, captions, metadata."""
    captions = [plain_text(caption) for caption in update.captions]
    connection.execute(
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
    if update.moved_from is not None and update.moved_to is not None:
        _move_item(connection, update.id, update.moved_from, update.moved_to)
    connection.execute(
        "DELETE FROM failures WHERE uri = (SELECT uri FROM items WHERE id = ?)", (update.id,)
    )


def _move_item(connection: sqlite3.Connection, item_id: int, old: str, new: str) -> None:
    """Gives an item the new place of its file; what was noted of the old one goes."""
    connection.execute("UPDATE items SET uri = ? WHERE id = ?", (sql_text(new), item_id))
    for table in ("origins", "claims", "failures"):
        connection.execute(f"DELETE FROM {table} WHERE uri = ?", (sql_text(old),))


def record_failure(connection: sqlite3.Connection, failure: Failure) -> None:
    """Enters a file into the failure ledger, or counts another attempt."""
    connection.execute(
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


def record_origin(connection: sqlite3.Connection, source: str, uri: str) -> None:
    """Notes that a source gives a uri."""
    connection.execute("INSERT OR IGNORE INTO sources (name) VALUES (?)", (sql_text(source),))
    connection.execute(
        "INSERT OR IGNORE INTO origins SELECT id, ? FROM sources WHERE name = ?",
        (sql_text(uri), sql_text(source)),
    )


def record_claim(
    connection: sqlite3.Connection, source: str, uri: str, captions: bool, keys: Iterable[str]
) -> None:
    """Notes which of a uri's texts a source gave."""
    connection.execute("INSERT OR IGNORE INTO sources (name) VALUES (?)", (sql_text(source),))
    connection.execute(
        "INSERT OR REPLACE INTO claims SELECT id, ?, ?, ? FROM sources WHERE name = ?",
        (sql_text(uri), captions, to_json(sorted(keys)), sql_text(source)),
    )
