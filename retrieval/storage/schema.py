"""The database of a collection as SQL: its tables, and how values become rows and back."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from clipsys.errors import CollectionError
from clipsys.retrieval.storage.items import Failure, Item
from clipsys.retrieval.storage.open_databases import read_header

#: Raised whenever a table changes. Version 2 is upgraded (`upgrading`), others are refused.
VERSION = 3
UPGRADED_VERSION = 2

#: All live ids without reading the items.
LIVE_INDEX = "CREATE INDEX items_live ON items (id) WHERE state = 'live'"

#: Tables that came later without a new version: earlier ones go on without them, and the first
#: writer of this one adds them. ``claims``: see `sources`; ``annotations``: see `annotations`.
LATER_TABLES = (
    "CREATE TABLE IF NOT EXISTS claims (source INTEGER NOT NULL, uri TEXT NOT NULL, "
    "captions INTEGER NOT NULL, keys TEXT NOT NULL, PRIMARY KEY (source, uri)) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS source_settings "
    "(source INTEGER PRIMARY KEY, settings TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS annotations "
    "(key TEXT PRIMARY KEY, of_image INTEGER NOT NULL) WITHOUT ROWID",
)

SCHEMA = f"""
PRAGMA user_version = {VERSION};
CREATE TABLE state (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
INSERT INTO state VALUES ('change', 0), ('floor', 0), ('purgeable', 0), ('purgeable_at', 0);
CREATE TABLE segments (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    file TEXT NOT NULL UNIQUE,
    num_rows INTEGER NOT NULL CHECK (num_rows > 0),
    sha256 TEXT NOT NULL,
    -- When the file was written: one that has another time is hashed before it is used.
    mtime_ns INTEGER
);
CREATE TABLE items (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    uri TEXT NOT NULL,
    content_hash TEXT NOT NULL,
    size_bytes INTEGER,
    mtime_ns INTEGER,
    caption TEXT,
    captions TEXT NOT NULL CHECK (json_valid(captions)),
    metadata TEXT NOT NULL CHECK (json_valid(metadata)),
    state TEXT NOT NULL DEFAULT 'live' CHECK (state IN ('live', 'deleted')),
    -- A deleted item loses its vector when the segment is compacted.
    segment INTEGER REFERENCES segments (id) CHECK (state = 'deleted' OR segment IS NOT NULL),
    row INTEGER CHECK (row >= 0 OR (state = 'deleted' AND row IS NULL)),
    change INTEGER NOT NULL
);
CREATE UNIQUE INDEX items_live_uri ON items (uri) WHERE state = 'live';
CREATE INDEX items_content ON items (content_hash) WHERE state = 'live';
CREATE INDEX items_change ON items (change);
CREATE INDEX items_segment ON items (segment);
{LIVE_INDEX};
CREATE TABLE failures (
    uri TEXT PRIMARY KEY,
    reason TEXT NOT NULL,
    message TEXT NOT NULL,
    size_bytes INTEGER,
    mtime_ns INTEGER,
    attempts INTEGER NOT NULL DEFAULT 1,
    captions TEXT NOT NULL CHECK (json_valid(captions)),
    metadata TEXT NOT NULL CHECK (json_valid(metadata)),
    failed_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%SZ', 'now'))
);
-- Which source gave which uri: pruning removes what no source gives any more.
CREATE TABLE sources (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE origins (
    source INTEGER NOT NULL REFERENCES sources (id),
    uri TEXT NOT NULL,
    PRIMARY KEY (source, uri)
) WITHOUT ROWID;
CREATE INDEX origins_uri ON origins (uri);
-- Files and folders that nothing needs any more; deleted once no search can still be reading them.
CREATE TABLE retired (path TEXT PRIMARY KEY, retired_at REAL NOT NULL);
"""

SELECT_ITEM = "SELECT id, uri, content_hash, size_bytes, mtime_ns, captions, metadata FROM items"
SELECT_FAILURE = (
    "SELECT uri, reason, message, size_bytes, mtime_ns, attempts, captions, metadata FROM failures"
)


def item_of(row: tuple[Any, ...]) -> Item:
    """An item from a row of `SELECT_ITEM`."""
    item_id, uri, content_hash, size_bytes, mtime_ns, captions, metadata = row
    return Item(
        item_id,
        python_text(uri),
        content_hash,
        size_bytes,
        mtime_ns,
        tuple(json.loads(captions)),
        json.loads(metadata),
    )


def failure_of(row: tuple[Any, ...]) -> Failure:
    """A ledger entry from a row of `SELECT_FAILURE`."""
    uri, reason, message, size_bytes, mtime_ns, attempts, captions, metadata = row
    return Failure(
        python_text(uri),
        reason,
        message,
        size_bytes,
        mtime_ns,
        attempts,
        tuple(json.loads(captions)),
        json.loads(metadata),
    )


def sql_text(text: str) -> str | bytes:
    """A uri as SQLite can hold it: file names that are not UTF-8 become a blob of their bytes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogateescape")
    return text


def python_text(value: str | bytes) -> str:
    """A uri as Python holds it."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def check_length(path: Path) -> None:
    """A database that was cut off opens without complaint, or with another; its header knows.

    Raises:
        CollectionError: it is shorter than its header says.
    """
    try:
        header, size_bytes = read_header(path)
        # While there is a log, pages may still be only there.
        log = path.with_name(f"{path.name}-wal")
        if len(header) < 100 or (log.exists() and log.stat().st_size):
            return
    except OSError:
        return  # opening it says what is wrong
    page_bytes, num_pages = struct.unpack_from(">H10xI", header, 16)
    # Its length counts where it was written with the last change (SQLite's file format, 1.3.7).
    is_current = header[24:28] == header[92:96] and header.startswith(b"SQLite format 3")
    expected_bytes = num_pages * (65_536 if page_bytes == 1 else page_bytes)
    if is_current and size_bytes < expected_bytes:
        raise CollectionError(
            f"{path}: is cut off: {size_bytes:,} bytes, its header says {expected_bytes:,}; "
            "restore it from a backup"
        )
