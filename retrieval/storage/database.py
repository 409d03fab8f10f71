"""One connection to a collection's SQLite file: opening, taking turns, transactions, errors.

The database runs in WAL mode: any number of readers, in this process or others, go on while one
writer commits. Where the folder cannot be written to, it is read all the same (`connecting`).
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from clipsys.errors import CollectionError
from clipsys.retrieval.storage import metadata_index, words
from clipsys.retrieval.storage.connecting import (
    Connection,
    connect,
    connect_to_copy,
    is_writable,
)
from clipsys.retrieval.storage.schema import (
    LATER_TABLES,
    SCHEMA,
    UPGRADED_VERSION,
    VERSION,
    check_length,
)
from clipsys.retrieval.storage.upgrading import upgrade

Row: TypeAlias = tuple[Any, ...]


class Database:
    """A connection. Thread-safe: statements and transactions take turns.

    Every method raises `CollectionError` where SQLite reports an error.
    """

    def __init__(self, path: Path) -> None:
        """Opens an existing database.

        Raises:
            CollectionError: it is missing or not a database of this version.
        """
        self.path = path
        self._lock = threading.RLock()
        check_length(path)
        self._opened = self._connect()

    def _connect(self) -> Connection:
        try:
            opened = connect(self.path)
            try:
                (version,) = opened.sqlite.execute("PRAGMA user_version").fetchone()
                if version == UPGRADED_VERSION and not is_writable(self.path):
                    opened.close()
                    opened = connect_to_copy(self.path, f"is of database version {version}")
                    upgrade(opened.sqlite, opened.source)
                    (version,) = opened.sqlite.execute("PRAGMA user_version").fetchone()
                self._check_version(version)
                _set_up(opened.sqlite)
            except BaseException:
                opened.close()
                raise
        except sqlite3.Error as error:
            raise CollectionError(
                f"{self.path}: the item database cannot be opened ({error}); {_remedy(self.path)}"
            ) from error
        return opened

    def _check_version(self, version: int) -> None:
        if version == 0:
            raise CollectionError(
                f"{self.path}: is not the database of a collection; restore it from a backup"
            )
        if version == UPGRADED_VERSION:
            raise CollectionError(
                f"{self.path}: is of database version {version}, of before filters had an index; "
                f"`clipsys repair` brings it to version {VERSION}, as does every other command "
                "that opens the collection"
            )
        if version != VERSION:
            raise CollectionError(
                f"{self.path}: is of database version {version}, this clipsys knows version "
                f"{VERSION}; use the version that wrote it, or index the images into a new "
                "collection"
            )

    def close(self) -> None:
        """Closes the connection; using it afterwards is an error."""
        with self._lock:
            self._opened.close()

    def use_copy(self, reason: str) -> None:
        """Goes on with a private copy, which may be changed although the collection may not."""
        with self._lock:
            try:
                copy = connect_to_copy(self.path, reason)
                _set_up(copy.sqlite)
            except sqlite3.Error as error:
                raise CollectionError(f"{self.path}: cannot be copied ({error})") from error
            self._opened.close()
            self._opened = copy

    @property
    def is_writable(self) -> bool:
        """Whether what is written gets into the collection."""
        return is_writable(self.path)

    def rows(self, query: str, parameters: Sequence[Any] = ()) -> list[Row]:
        """All rows of a query."""
        while True:
            with self.turn() as connection:
                found = connection.execute(query, parameters).fetchall()
                # Of an immutable database pages may have changed while they were read.
                if connection.in_transaction or not self._opened.is_stale():
                    return found

    def row(self, query: str, parameters: Sequence[Any] = ()) -> Row:
        """The first row of a query that always has one."""
        return self.rows(query, parameters)[0]

    @contextmanager
    def turn(self) -> Iterator[sqlite3.Connection]:
        """The connection, while no other thread uses it."""
        with self._lock:
            if self._opened.is_stale() and not self._opened.sqlite.in_transaction:
                self._opened.close()
                self._opened = self._connect()
            try:
                yield self._opened.sqlite
            except sqlite3.Error as error:
                raise CollectionError(f"{self.path}: the item database reports: {error}") from error

    @contextmanager
    def transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        """One transaction, rolled back where anything is raised inside.

        Args:
            begin: ``BEGIN`` for one moment's view of several tables, ``BEGIN IMMEDIATE`` to write.
        """
        with self.turn() as connection:
            connection.execute(begin)
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def check_integrity(self) -> list[str]:
        """SQLite's own check of the file; an empty list when it is sound."""
        try:
            rows = self.rows("PRAGMA integrity_check(10)")
        except CollectionError as error:
            return [str(error)]
        return [] if rows == [("ok",)] else [f"{self.path}: {row[0]}" for row in rows]


def create_database(path: Path) -> None:
    """Makes an empty database with the tables of `schema`.

    Raises:
        CollectionError: it cannot be written.
    """
    try:
        connection = sqlite3.connect(path, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(SCHEMA)
            metadata_index.create_index(connection)
            words.ensure_table(connection)
            for statement in LATER_TABLES:
                connection.execute(statement)
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise CollectionError(
            f"{path}: the item database cannot be made ({error}); free some space"
        ) from error


def _set_up(connection: sqlite3.Connection) -> None:
    connection.create_function("casefold", 1, _casefold, deterministic=True)
    connection.execute("PRAGMA foreign_keys = ON")
    # WAL with FULL fsyncs the log at each commit: a commit survives a power cut.
    connection.execute("PRAGMA synchronous = FULL")


def _remedy(path: Path) -> str:
    readable = os.access(path, os.R_OK) or not path.exists()
    return "restore it from a backup" if readable else "this user may not read it"


def _casefold(text: bytes) -> str:
    # As bytes: SQLite would fail where a file name is not UTF-8.
    return text.decode("utf-8", "replace").casefold()
