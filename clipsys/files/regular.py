"""Reading files that are files.

A named pipe called ``cam.jpg`` blocks the reader until a writer comes, which may be never; a device
may have no end. Both are refused before a byte is read, and named in words that people know.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISCHR, "a device"),
)


class NotRegularError(OSError):
    """A path leads to a pipe, a socket, a device or a folder where a file was expected."""


def read_regular(path: str | Path) -> bytes:
    """The bytes of a regular file; links are followed.

    Raises:
        NotRegularError: it is something else; ``strerror`` says what.
        OSError: it cannot be read.
    """
    check_mode(os.stat(path).st_mode, path)  # noqa: PTH116  (a str costs no Path)
    # O_NONBLOCK: what becomes a pipe between the two calls must not block either.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        check_mode(os.fstat(descriptor).st_mode, path)
        return file.read()


def check_mode(mode: int, path: str | Path) -> None:
    """Raises `NotRegularError` where a mode, as `os.stat` gives it, is not a regular file's."""
    if not stat.S_ISREG(mode):
        kind = next((words for matches, words in _KINDS if matches(mode)), "no regular file")
        raise NotRegularError(errno.EINVAL, f"{kind}, not a file", str(path))
