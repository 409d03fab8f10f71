"""Connections to the database of a collection, also where its folder cannot be written to.

    folder writable                     read-write, WAL
    not writable, another user writes   read-only, with the writer's log and its shared memory
    not writable, no log                immutable: SQLite needs no file of its own beside it
    not writable, log of a killed       a private copy in a temporary folder, into which the log
    writer, or an earlier version       is read, or whose version is raised

What is immutable for SQLite may change all the same, by a writer elsewhere: `Connection.is_stale`
looks at the files, and the caller reconnects.
"""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from clipsys.retrieval.storage import open_databases

#: Seconds a statement waits for another connection's lock (commits take milliseconds).
BUSY_TIMEOUT_S = 30.0

_logger = logging.getLogger(__name__)


@dataclass
class Connection:
    """An open connection, and what has to be known of it.

    Attributes:
        sqlite: the connection.
        source: the database in the collection.
        stamp: its files as they were, where a change makes the connection stale.
            copy: the folder of a private copy, deleted when this is closed.
        identity: of the file, among those that this process has open.
    """

    sqlite: sqlite3.Connection
    source: Path
    stamp: tuple[object, ...] | None = None
    copy: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)
    identity: open_databases.Identity | None = None

    def is_stale(self) -> bool:
        """Whether the files behind an immutable database or a copy have changed."""
        return self.stamp is not None and self.stamp != _stamp(self.source)

    def close(self) -> None:
        """Closes it and deletes the copy."""
        self.sqlite.close()
        open_databases.leave(self.identity)
        self.identity = None
        if self.copy is not None:
            self.copy.cleanup()


def is_writable(path: Path) -> bool:
    """Whether a database, and the files that SQLite puts beside it, can be written."""
    return os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)


def connect(path: Path) -> Connection:
    """Connects to an existing database in the way that its folder allows.

    Raises:
        sqlite3.Error: it is missing, no database, or cannot be read.
    """
    if is_writable(path) or not path.exists():
        return _open(path, "mode=rw")
    stamp = _stamp(path)
    log = _log_of(path)
    if not (log.exists() and log.stat().st_size):
        return _open(path, "mode=ro&immutable=1", stamp=stamp)
    try:
        return _open(path, "mode=ro")
    except sqlite3.OperationalError:
        return connect_to_copy(path, "its last writer was killed, and its log has to be read")


def connect_to_copy(path: Path, reason: str) -> Connection:
    """Connects to a private copy of a database, which may be changed.

    Raises:
        sqlite3.Error: it cannot be copied, or what was copied is no database.
    """
    stamp = _stamp(path)
    folder = tempfile.TemporaryDirectory(prefix="clipsys-database-")
    _logger.warning(
        "%s: cannot be written to, and %s: a copy in %s is used until this process ends",
        *(path, reason, folder.name),
    )
    target = Path(folder.name) / path.name
    try:
        shutil.copyfile(path, target)
        if _log_of(path).exists():
            shutil.copyfile(_log_of(path), _log_of(target))
        opened = _open(target, "mode=rw", stamp=stamp)
        opened.source, opened.copy = path, folder
        return opened
    except OSError as error:
        folder.cleanup()
        raise sqlite3.OperationalError(f"it cannot be copied to {target}: {error}") from error
    except BaseException:
        folder.cleanup()
        raise


def _open(path: Path, how: str, *, stamp: tuple[object, ...] | None = None) -> Connection:
    identity = open_databases.enter(path)
    try:
        connection = sqlite3.connect(
            f"{path.resolve().as_uri()}?{how}",
            uri=True,
            timeout=BUSY_TIMEOUT_S,
            isolation_level=None,  # transactions are begun and ended explicitly
            check_same_thread=False,
        )
    except BaseException:
        open_databases.leave(identity)
        raise
    opened = Connection(connection, path, stamp, identity=identity)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()  # opens it really
    except BaseException:
        opened.close()
        raise
    return opened


def _log_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def _stamp(path: Path) -> tuple[object, ...]:
    """Files that a writer changes, by size, time and identity."""
    found: list[object] = []
    for file in (path, _log_of(path)):
        try:
            status = file.stat()
            found.append((status.st_size, status.st_mtime_ns, status.st_ino))
        except OSError:
            found.append(None)
    return tuple(found)
