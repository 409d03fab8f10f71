"""Files that are whole or absent after a crash, and the lock that keeps writers apart.

A new file is safe once its bytes *and* its folder's entry for it have been fsynced. A file that
replaces another is written beside it and renamed over it, which POSIX makes atomic.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from clipsys.errors import CollectionError

_CHUNK_BYTES = 1 << 20


def write_new(path: Path, data: bytes | memoryview) -> None:
    """Writes a file that must not exist yet; returns once it would survive a power cut."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


def replace(path: Path, data: bytes) -> None:
    """Writes or replaces a file atomically: a reader sees the old bytes or the new ones."""
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    write_new(beside, data)
    beside.replace(path)
    sync_folder(path.parent)


def publish(beside: Path, path: Path) -> None:
    """Fsyncs a file that another library wrote, then renames it to its final name."""
    with beside.open("rb+") as file:
        os.fsync(file.fileno())
    beside.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames and new entries in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def writer_lock(path: Path, *, holder: str) -> Iterator[None]:
    """Holds an exclusive lock on a file for as long as the context lasts.

    It is the kernel's ``flock``, as in every earlier version: released when the process ends,
    however it ends, so there is no stale lock to clear by hand. The file keeps the holder's process
    id, for the message that another writer gets.

    Args:
        path: the lock file; created if absent, never deleted (deleting it would race).
        holder: what is being locked, for the message.

    Raises:
        CollectionError: another process holds it, or it cannot be made. Raised at once; this never
            waits.
    """

    def note_process(descriptor: int) -> None:
        with contextlib.suppress(OSError):  # a full disk; the lock holds without the number
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode("ascii"), 0)

    # Without flock a lock file would stay behind a killed writer, so there is no such fallback.
    lock = FileLock(path, blocking=False, fallback_to_soft=False, on_acquired=note_process)
    try:
        lock.acquire()
    except Timeout:
        raise CollectionError(
            f"{holder}: another writer (process {_owner_of(path)}) is at work on it; "
            "wait until it ends, then try again"
        ) from None
    except OSError as error:
        raise CollectionError(
            f"{holder}: the folder is not writable ({error.strerror}); it can be searched, but "
            "commands that change it need write permission there"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _owner_of(path: Path) -> str:
    try:
        return path.read_bytes()[:64].decode("ascii", "replace").strip() or "unknown"
    except OSError:
        return "unknown"
