"""Embeddings that were computed once, by encoder and content.

    folder/HASH.sqlite      one SQLite database in WAL mode for each encoder

An encoder is named by everything that a vector's bits depend on besides its content: fingerprint,
precision, device kind, versions. A vector is found by a SHA-256 of what was encoded and how it was
read. Vectors are float32, stored to the bit, each with a checksum.

Nothing depends on the cache but time. Several processes read and write at once; a claim says which
of them encodes what, so that two runs that start together share the work. A claim ends with its
process. What cannot be used is said once: a damaged file is put aside, and a drive that is full or
read-only means that nothing is stored.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import socket
import sqlite3
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from clipsys.files.user_cache import cache_folder

Vector = npt.NDArray[np.float32]

#: Raised when what is stored, or how a vector is computed, changes.
VERSION = 2
DEFAULT_LIMIT_BYTES = 20_000_000_000
#: Keys in one question; SQLite allows 32,766 parameters.
_AT_ONCE = 500
_BUSY_S = 30.0
#: A claim that is older than this is taken over even if its process cannot be asked.
_CLAIM_S = 600.0

_SCHEMA = """
CREATE TABLE IF NOT EXISTS vectors (
    id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, sum INTEGER NOT NULL, vector BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS claims (
    key BLOB PRIMARY KEY, host TEXT NOT NULL, pid INTEGER NOT NULL, until REAL NOT NULL);
"""

_logger = logging.getLogger(__name__)


def default_folder() -> Path:
    """``embeddings`` in ``CLIPSYS_CACHE``, or in ``clipsys`` in the user's cache folder."""
    return cache_folder("embeddings")


class EmbeddingCache:
    """The stored embeddings of all encoders.

    Args:
        folder: default `default_folder`.
        limit_bytes: bound of the folder's size. When an encoder's vectors are opened, those of the
            encoders that were not used for longest are removed; an encoder that alone exceeds the
            bound stores nothing more.
    """

    def __init__(
        self, folder: str | Path | None = None, *, limit_bytes: int = DEFAULT_LIMIT_BYTES
    ) -> None:
        self._folder: Path | None = None
        try:
            self._folder = Path(folder).expanduser() if folder is not None else default_folder()
        except RuntimeError as error:  # there is no home folder
            _logger.warning("embeddings are not stored (%s)", error)
        self._limit_bytes = limit_bytes

    def open(self, encoder: Mapping[str, str], dim: int) -> StoredVectors:
        """The vectors of one encoder.

        Args:
            encoder: everything that a vector's bits depend on besides its content.
            dim: width of the vectors.
        """
        if self._folder is None:
            return StoredVectors(None, dim, self._limit_bytes)
        text = json.dumps({"version": VERSION, **encoder, "dim": dim}, sort_keys=True)
        path = self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.sqlite"
        with contextlib.suppress(OSError):
            self._make_room(path)
        return StoredVectors(path, dim, self._limit_bytes)

    def recall(self, question: Mapping[str, str]) -> str | None:
        """What `remember` stored."""
        try:
            document = json.loads(self._note(question).read_text(encoding="utf-8"))
            answer = document["answer"] if document["question"] == dict(question) else None
            return answer if isinstance(answer, str) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def remember(self, question: Mapping[str, str], answer: str) -> None:
        """Stores a short answer, such as the precision that an encoder settled for."""
        document = {"question": dict(question), "answer": answer}
        with contextlib.suppress(OSError):
            path = self._note(question)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}.partial")
            partial.write_text(json.dumps(document) + "\n", encoding="utf-8")
            partial.replace(path)

    def _note(self, question: Mapping[str, str]) -> Path:
        if self._folder is None:
            raise FileNotFoundError("there is no cache folder")
        text = json.dumps({"version": VERSION, **question}, sort_keys=True)
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"

    def _make_room(self, kept: Path) -> None:
        """Removes the databases that were not used for longest, until the rest fits."""
        assert self._folder is not None
        files = sorted(self._folder.glob("*.sqlite"), key=lambda path: path.stat().st_mtime)
        sizes = {path: sum(one.stat().st_size for one in _parts(path)) for path in files}
        total = sum(sizes.values())
        for path in files:
            if total <= self._limit_bytes:
                return
            if path != kept:
                _remove(path)
                total -= sizes[path]
                _logger.info(
                    "embedding cache: %s removed (%.1f GB; the limit is %.1f GB)",
                    *(path, sizes[path] / 1e9, self._limit_bytes / 1e9),
                )


class StoredVectors:
    """The vectors of one encoder. Made by `EmbeddingCache.open`; for one thread.

    Whatever the drive does, calls do not fail: without storage, nothing is found and every claim
    is granted.
    """

    def __init__(self, path: Path | None, dim: int, limit_bytes: int) -> None:
        self._path, self._dim, self._limit_bytes = path, dim, limit_bytes
        self._connection: sqlite3.Connection | None = None
        self._host = socket.gethostname()
        if path is not None:
            with self._tolerated():
                self._connect(path)
                with contextlib.suppress(OSError):
                    os.utime(path)

    def __enter__(self) -> StoredVectors:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Vector]:
        """The stored vectors of these keys, as far as there are any."""
        found: dict[bytes, Vector] = {}
        with self._tolerated():
            if self._connection is not None:
                found = self._read(self._connection, keys)
        return found

    def put(self, vectors: Mapping[bytes, Vector]) -> None:
        """Stores vectors, and ends this process's claims to them."""
        with self._tolerated():
            if self._connection is None or not vectors:
                return
            rows = [(key, data, zlib.crc32(data)) for key, data in _bytes_of(vectors)]
            with _transaction(self._connection):
                self._connection.executemany(
                    "INSERT INTO vectors (key, vector, sum) VALUES (?, ?, ?) ON CONFLICT (key) DO "
                    "UPDATE SET vector = excluded.vector, sum = excluded.sum",
                    rows,
                )
                self._end_claims(self._connection, list(vectors))
            self._check_size(self._connection)

    def claim(self, keys: Sequence[bytes]) -> set[bytes]:
        """Takes on what nobody has stored or taken on: the keys that this process has to encode.

        The others come to be stored by another process, or its claim ends without.
        """
        now = time.time()
        free = set(keys)
        with self._tolerated():
            if self._connection is not None:
                with _transaction(self._connection):
                    granted = free - self._taken(self._connection, keys, now)
                    self._connection.executemany(
                        "INSERT OR REPLACE INTO claims VALUES (?, ?, ?, ?)",
                        [(key, self._host, os.getpid(), now + _CLAIM_S) for key in granted],
                    )
                free = granted
        return free

    def release(self) -> None:
        """Ends all claims of this process."""
        with self._tolerated():
            if self._connection is not None:
                with _transaction(self._connection):
                    self._connection.execute(
                        "DELETE FROM claims WHERE host = ? AND pid = ?", (self._host, os.getpid())
                    )

    def close(self) -> None:
        """Ends the claims and closes the file."""
        if self._connection is not None:
            self.release()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _read(self, connection: sqlite3.Connection, keys: Sequence[bytes]) -> dict[bytes, Vector]:
        found: dict[bytes, Vector] = {}
        for part in _cut(keys):
            marks = ",".join("?" * len(part))
            question = f"SELECT key, sum, vector FROM vectors WHERE key IN ({marks})"
            for key, checksum, data in connection.execute(question, part):
                if len(data) == 4 * self._dim and zlib.crc32(data) == checksum:
                    found[bytes(key)] = np.frombuffer(data, np.float32)
        return found

    def _taken(
        self, connection: sqlite3.Connection, keys: Sequence[bytes], now: float
    ) -> set[bytes]:
        taken = set(self._read(connection, keys))
        alive: dict[int, bool] = {}
        for part in _cut(keys):
            marks = ",".join("?" * len(part))
            question = f"SELECT key, host, pid, until FROM claims WHERE key IN ({marks})"
            for key, host, pid, until in connection.execute(question, part):
                if host == self._host and pid not in alive:
                    alive[pid] = pid != os.getpid() and _is_alive(pid)
                if until > now and (host != self._host or alive[pid]):
                    taken.add(bytes(key))
        return taken

    def _end_claims(self, connection: sqlite3.Connection, keys: Sequence[bytes]) -> None:
        connection.executemany("DELETE FROM claims WHERE key = ?", [(key,) for key in keys])

    def _check_size(self, connection: sqlite3.Connection) -> None:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        size_bytes = pages * connection.execute("PRAGMA page_size").fetchone()[0]
        if size_bytes > self._limit_bytes:
            self._give_up(f"it has reached its limit of {self._limit_bytes / 1e9:.1f} GB")

    def _connect(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
        self._connection = connection
        # Vectors of 2 to 4 KB: of the usual pages, half would stay empty.
        connection.execute("PRAGMA page_size = 16384")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.executescript(_SCHEMA)

    @contextlib.contextmanager
    def _tolerated(self) -> Iterator[None]:
        """Goes on without storage, or with a new file, where the one there cannot be used."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if "no such" in str(error) or "has no column" in str(error):
                self._put_aside(error)
            else:
                self._give_up(str(error))
        except sqlite3.DatabaseError as error:
            self._put_aside(error)
        except OSError as error:
            self._give_up(error.strerror or str(error))

    def _put_aside(self, error: Exception) -> None:
        assert self._path is not None
        self._drop()
        aside = self._path.with_suffix(f".damaged-{os.getpid()}")
        try:
            self._path.replace(aside)
            _remove(self._path)
            self._connect(self._path)
        except (OSError, sqlite3.Error) as other:
            self._give_up(str(other))
            return
        _logger.warning(
            "%s: the stored embeddings are damaged (%s); they are put aside as %s and encoded anew",
            *(self._path, error, aside.name),
        )

    def _give_up(self, reason: str) -> None:
        self._drop()
        _logger.warning("%s: embeddings are not stored any more (%s)", self._path, reason)

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _bytes_of(vectors: Mapping[bytes, Vector]) -> Iterator[tuple[bytes, bytes]]:
    for key, vector in vectors.items():
        yield key, np.ascontiguousarray(vector, np.float32).tobytes()


def _cut(keys: Sequence[bytes]) -> Iterator[list[bytes]]:
    rest = iter(keys)
    while part := list(islice(rest, _AT_ONCE)):
        yield part


def _is_alive(pid: int) -> bool:
    if os.name == "nt":  # signal 0 is Ctrl-C there; its claims end with their time
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _parts(path: Path) -> list[Path]:
    """A database and what SQLite stores beside it."""
    found = [path, *(path.with_name(path.name + end) for end in ("-wal", "-shm"))]
    return [one for one in found if one.exists()]


def _remove(path: Path) -> None:
    for part in _parts(path):
        with contextlib.suppress(OSError):
            part.unlink()
