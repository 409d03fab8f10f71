"""Shards behind a url: opened by webdataset or fsspec, retried, stored while they are used.

    open_url      a stream. http, https and hf go through webdataset's opener (curl), which works
                  wherever curl is; s3 and gs through fsspec, if s3fs or gcsfs is installed
    ShardCache    a folder of whole shards that all processes of a machine share; each is fetched
                  once, the longest unused go when the folder grows past its limit

A source that fails, also in the middle, is asked again a few times and then reported.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar, cast

from filelock import FileLock

from clipsys.errors import DataError
from clipsys.files.user_cache import cache_folder

_logger = logging.getLogger(__name__)

#: How often a source is asked in all, and the pause after the first failure; it doubles each time.
ATTEMPTS = 4
FIRST_PAUSE_S = 0.5

_BLOCK_BYTES = 1 << 20
#: An index that is this old is made again, so that those of removed shards do not add up.
_INDEX_LIFE_S = 180 * 86_400.0

_CURL_STATUS = {
    "6": "unknown host",
    "7": "no connection",
    "18": "the transfer broke off",
    "22": "the server refuses it",
    "28": "timeout",
    "52": "the server sends nothing",
    "56": "the transfer broke off",
}

_Result = TypeVar("_Result")


def is_remote(shard: str) -> bool:
    """Whether a shard is named by a url."""
    return "://" in shard


@contextmanager
def open_url(url: str) -> Iterator[IO[bytes]]:
    """Opens a url for reading.

    Raises:
        OSError: it cannot be opened, or its transfer has failed by the time it is closed.
        DataError: what reads such urls is not installed.
    """
    scheme = url.partition(":")[0].lower()
    if scheme in ("http", "https", "hf") and shutil.which("curl"):
        from webdataset.gopen import gopen_schemes

        # Not gopen() itself, which lets the environment rewrite a url into a shell command.
        stream = gopen_schemes[scheme](url, "rb")
    else:
        import fsspec

        try:
            stream = fsspec.open(url, "rb").open()
        except (ImportError, ValueError) as error:
            raise DataError(f"{url}: cannot be opened ({error})") from error
    failed = False
    try:
        yield cast("IO[bytes]", stream)
    except BaseException:
        failed = True
        raise
    finally:
        # A reader that stops early breaks curl's pipe: that is not another failure.
        with contextlib.suppress(OSError) if failed else contextlib.nullcontext():
            stream.close()


def retried(url: str, action: Callable[[], _Result]) -> _Result:
    """What ``action()`` returns, asked again when it fails with an `OSError`.

    Raises:
        DataError: it has failed `ATTEMPTS` times.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except OSError as error:
            if attempt == ATTEMPTS:
                raise DataError(
                    f"{url}: cannot be read, asked {ATTEMPTS} times ({reason_of(error)})"
                ) from error
            pause(url, error, attempt)
    raise AssertionError("unreachable")


def pause(url: str, error: Exception, attempt: int) -> None:
    """Says what happened and waits, longer after each attempt (counted from 1)."""
    pause_s = FIRST_PAUSE_S * 2 ** (attempt - 1)
    _logger.warning("%s: %s; asking again in %g s", url, reason_of(error), pause_s)
    time.sleep(pause_s)


def reason_of(error: Exception) -> str:
    """What an opener's error says, in a few words."""
    text = " ".join(str(error).split())
    _, marker, status = text.partition("]: exit ")  # webdataset prints the whole curl command
    if "curl" in text and (marker or "exit " in text):
        code = (status or text.rpartition("exit ")[2]).split()[0]
        return _CURL_STATUS.get(code, f"curl ended with status {code}")
    return getattr(error, "strerror", None) or text or type(error).__name__


def fetch(url: str, path: Path, *, on_block: Callable[[int], None] | None = None) -> None:
    """Copies a url to a file, which appears only when it is complete.

    Args:
        url: url of a file.
        path: path of the copy.
        on_block: called with the bytes that have come so far; after a failure they begin again.

    Raises:
        DataError: it cannot be read.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")

    def copy() -> None:
        with partial.open("wb") as file, open_url(url) as stream:
            while block := stream.read(_BLOCK_BYTES):
                file.write(block)
                if on_block:
                    on_block(file.tell())

    try:
        retried(url, copy)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def default_folder() -> Path:
    """Where copies of remote shards and indexes are stored unless a setting names a folder.

    ``CLIPSYS_CACHE``, or ``clipsys`` in the user's cache folder.
    """
    return cache_folder("shards")


def default_cache(*, limit_bytes: int = 50_000_000_000) -> ShardCache:
    """The cache in the user's cache folder."""
    return ShardCache(default_folder(), limit_bytes=limit_bytes)


def _name(shard: str) -> str:
    return hashlib.sha256(shard.encode("utf-8", "surrogateescape")).hexdigest()[:32]


class ShardCache:
    """Local copies of remote shards, and indexes. Safe between processes; travels to workers."""

    def __init__(self, folder: Path, *, limit_bytes: int) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes

    def open(self, shard: str, *, on_block: Callable[[int], None] | None = None) -> io.FileIO:
        """Opens a shard: a local one where it lies, a remote one from its copy.

        A copy that is removed while it is open can be read to its end. ``on_block`` is called with
        the bytes that have come of one that is being fetched.

        Raises:
            OSError, DataError: it cannot be read.
        """
        if not is_remote(shard):
            return io.FileIO(shard)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{_name(shard)}.tar"
        with FileLock(path.with_suffix(".lock")):  # one process fetches, the others wait for it
            if not path.exists():
                path.with_suffix(".index").unlink(missing_ok=True)  # that of the previous copy
                fetch(shard, path, on_block=on_block)
                self._make_room(path)
            os.utime(path)
            return io.FileIO(path)

    def stamp(self, shard: str, descriptor: int) -> tuple[int, int]:
        """The size and time by which an index recognises the shard that is open."""
        status = os.fstat(descriptor)
        # The time of a copy is that of its last use; its index goes with it.
        return status.st_size, 0 if is_remote(shard) else status.st_mtime_ns

    def index_path(self, shard: str) -> Path:
        """Where the index of a shard is stored: beside the copy of a remote one."""
        if is_remote(shard):
            return self._folder / f"{_name(shard)}.index"
        return self._folder / "indexes" / f"{_name(str(Path(shard).absolute()))}.index"

    @contextmanager
    def index_lock(self, shard: str) -> Iterator[None]:
        """One process indexes a shard, the others wait for it and then load what it has stored.

        Where the folder cannot be written to, each does it by itself.
        """
        path = self.index_path(shard)
        lock = FileLock(path.with_name(f"{path.name}.lock"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except (OSError, NotImplementedError) as error:  # read-only, or without locks
            _logger.debug("the index of %s is not stored: %s", shard, error)
        try:
            yield
        finally:
            if lock.is_locked:
                with contextlib.suppress(OSError):
                    Path(lock.lock_file).unlink()  # at worst, two processes make the same index
            lock.release()

    def forget_old_indexes(self) -> None:
        """Removes indexes of local shards that have not been written for half a year."""
        with contextlib.suppress(OSError):
            for path in (self._folder / "indexes").iterdir():
                if time.time() - path.stat().st_mtime > _INDEX_LIFE_S:
                    path.unlink(missing_ok=True)

    def _make_room(self, newest: Path) -> None:
        copies = []
        for path in self._folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                copies.append((status.st_mtime_ns, status.st_size, path))
        excess = sum(size for _, size, _ in copies) - self._limit_bytes
        for _, size, path in sorted(copies):
            if excess <= 0:
                return
            if path != newest:
                path.unlink(missing_ok=True)
                path.with_suffix(".index").unlink(missing_ok=True)
                excess -= size
