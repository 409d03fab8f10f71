"""Reading a database's bytes without taking the locks of this process's connections away.

POSIX takes all locks that a process has on a file away when it closes any descriptor of that file
(https://www.sqlite.org/howtocorrupt.html, section 2.2). The lock of a connection says that the log
beside the database is in use. Without it a writer in another process deletes the log when it ends:
the connections here read the deleted one from then on, and see no later commit.

So as long as this process has a connection to a database, the one descriptor that its bytes are
read by stays open.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

#: Device and inode of a file.
Identity: TypeAlias = tuple[int, int]


@dataclass
class _Open:
    num_connections: int = 0
    descriptor: int | None = None


_lock = threading.Lock()
_open: dict[Identity, _Open] = {}


def enter(path: Path) -> Identity | None:
    """Counts a connection that is about to be made. Returns what `leave` takes."""
    try:
        status = path.stat()
    except OSError:
        return None  # connecting says what is wrong
    with _lock:
        _open.setdefault((status.st_dev, status.st_ino), _Open()).num_connections += 1
    return status.st_dev, status.st_ino


def leave(identity: Identity | None) -> None:
    """Counts a connection that was closed."""
    with _lock:
        if identity is None:
            return
        known = _open[identity]
        known.num_connections -= 1
        if not known.num_connections:
            del _open[identity]
            if known.descriptor is not None:
                os.close(known.descriptor)


@contextmanager
def connected(path: Path) -> Iterator[None]:
    """A connection is open inside."""
    identity = enter(path)
    try:
        yield
    finally:
        leave(identity)


def read_header(path: Path) -> tuple[bytes, int]:
    """The first 100 bytes of a database, and its size in bytes.

    Raises:
        OSError: it cannot be read.
    """
    with _lock:
        status = path.stat()
        known = _open.get((status.st_dev, status.st_ino), _Open())
        descriptor = known.descriptor
        if descriptor is None:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            os.lseek(descriptor, 0, os.SEEK_SET)
            return os.read(descriptor, 100), os.fstat(descriptor).st_size
        finally:
            if known.num_connections:
                known.descriptor = descriptor
            else:
                os.close(descriptor)
