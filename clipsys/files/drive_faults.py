"""Full, read-only and failing drives: what the libraries raise, in one line with the remedy."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clipsys.errors import ClipsysError

_DRIVE_FAULTS = frozenset(
    {errno.ENOSPC, errno.EROFS, errno.EFBIG, errno.EIO, getattr(errno, "EDQUOT", errno.ENOSPC)}
)
#: What torch.save and safetensors say of a write that failed; neither gives the error number.
_WRITERS = ("unexpected pos", "PytorchStreamWriter failed", "file write failed", "I/O error")


@contextmanager
def drive_errors_explained(
    folder: Path, kind: type[ClipsysError], remedy: str, *, unfinished: Path | None = None
) -> Iterator[None]:
    """Turns the errors of a drive that takes no more into one line.

    Args:
        folder: the folder that is written to.
        kind: class of the error.
        remedy: end of the message: what to do, and what is not lost.
        unfinished: a file or folder that is removed then, to give its space back.

    Raises:
        ClipsysError: the drive is full, read-only or failing; names the folder and its free space.
    """
    try:
        yield
    except ClipsysError:
        raise
    except Exception as error:
        reason = drive_fault(error)
        if reason is None:
            if (place := _place_in(folder, error)) is None:
                raise
            why = getattr(error, "strerror", None) or type(error).__name__
            raise kind(
                f"{place}: cannot be used ({why}); make it writable, or name another folder"
            ) from error
        message = f"{folder}: {reason}{_free(folder)}; {remedy}"
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise kind(message) from error


def drive_fault(error: BaseException) -> str | None:
    """Why a drive took no more, or None if the error is another one."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _DRIVE_FAULTS:
            return seen.strerror
        text = str(seen)
        if not isinstance(seen, OSError | ClipsysError) and any(one in text for one in _WRITERS):
            if "No space left" in text:
                return "No space left on device"
            return "could not be written to, as if the drive were full"
        seen = seen.__context__
    return None


def _place_in(folder: Path, error: Exception) -> str | None:
    """The path that an error of the system is about, if it is the folder or lies in it."""
    if not isinstance(error, OSError) or not isinstance(error.filename, str):
        return None
    path, whole = Path(error.filename).absolute(), folder.absolute()
    return error.filename if whole in (path, *path.parents) or path in whole.parents else None


def _free(folder: Path) -> str:
    place = next((one for one in (folder, *folder.absolute().parents) if one.exists()), None)
    if place is None:
        return ""
    return f" ({shutil.disk_usage(place).free / 1e6:,.0f} MB are free)"
