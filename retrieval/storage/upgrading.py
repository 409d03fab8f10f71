"""Bringing the database of an earlier version up to date, in place.

Version 2 has no index of metadata and does not know when its vector files were written. One
transaction adds both: killed at any moment it leaves a database of version 2 or one of version 3.
Processes that have the database open already go on with it, those of earlier versions too: all
that they know is still there, and triggers keep the rest.
"""

from __future__ import annotations

import logging
import sqlite3
from contextlib import closing
from pathlib import Path

from clipsys.errors import CollectionError
from clipsys.retrieval.storage import metadata_index
from clipsys.retrieval.storage.connecting import is_writable
from clipsys.retrieval.storage.open_databases import connected
from clipsys.retrieval.storage.schema import (
    LATER_TABLES,
    LIVE_INDEX,
    UPGRADED_VERSION,
    VERSION,
    check_length,
)

#: Seconds that another process may take that upgrades the same database.
_TIMEOUT_S = 600.0

_logger = logging.getLogger(__name__)


def upgrade_database(path: Path) -> bool:
    """Upgrades a database of version 2; leaves any other alone. Returns whether it did.

    It takes about a minute for a million items, on the first opening only.

    Raises:
        CollectionError: it cannot be written, or the disk is full; it is as it was.
    """
    check_length(path)
    if path.exists() and not is_writable(path):
        return False  # `Database` reads it through a copy
    with connected(path):
        return _upgrade_in_place(path)


def _upgrade_in_place(path: Path) -> bool:
    try:
        connection = sqlite3.connect(
            f"{path.resolve().as_uri()}?mode=rw",
            uri=True,
            timeout=_TIMEOUT_S,
            isolation_level=None,
        )
        with closing(connection):
            if _version(connection) != UPGRADED_VERSION:
                return False
    except sqlite3.Error:
        return False  # opening it says what is wrong
    try:
        with closing(sqlite3.connect(path, timeout=_TIMEOUT_S, isolation_level=None)) as connection:
            return upgrade(connection, path)
    except sqlite3.Error as error:
        raise CollectionError(
            f"{path}: is of database version {UPGRADED_VERSION} and cannot be brought to version "
            f"{VERSION} ({error}); open it once where it can be written to, with space left"
        ) from error


def upgrade(connection: sqlite3.Connection, path: Path) -> bool:
    """Upgrades a connected database in one transaction; `path` is for the message."""
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("BEGIN IMMEDIATE")
    try:
        if _version(connection) != UPGRADED_VERSION:  # another process was faster
            connection.execute("ROLLBACK")
            return False
        _logger.warning(
            "%s: bringing the database to version %d, once; this may take a minute", path, VERSION
        )
        connection.execute("ALTER TABLE segments ADD COLUMN mtime_ns INTEGER")
        connection.execute(LIVE_INDEX)
        metadata_index.rebuild_index(connection)
        for statement in LATER_TABLES:
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return True


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])
