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


#: Where the shell's pipes lie, and standard input.
_SHELL_PIPES = ("/dev/fd/", "/proc/self/fd/", "/dev/stdin")


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


def read_named(path: str | Path) -> bytes:
    """The bytes of a text file that a user names: a regular file, or a pipe of the shell.

    ``<(command)`` gives such a pipe, whose writer is there already. Any other one may never get a
    writer, and a device may have no end.

    Raises:
        OSError: it cannot be read, or is something else.
    """
    if str(path).startswith(_SHELL_PIPES) and not stat.S_ISCHR(os.stat(path).st_mode):  # noqa: PTH116
        return Path(path).read_bytes()
    return read_regular(path)


def check_mode(mode: int, path: str | Path) -> None:
    """Raises `NotRegularError` where a mode, as `os.stat` gives it, is not a regular file's."""
    if not stat.S_ISREG(mode):
        kind = next((words for matches, words in _KINDS if matches(mode)), "no regular file")
        raise NotRegularError(errno.EINVAL, f"{kind}, not a file", str(path))
