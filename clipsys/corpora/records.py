"""One image of a corpus, wherever it lies, and what is known of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipsys.corpora.real_paths import real_path
from clipsys.errors import DataError, ImageDecodeError, SampleError
from clipsys.files.regular import NotRegularError, check_mode, read_regular
from clipsys.images.decoding import EXTENSIONS
from clipsys.shards.samples import Sample, check_texts


@dataclass(frozen=True)
class Record:
    """One image of a corpus and what is known of it.

    Attributes:
        uri: real absolute path of the file, ``/abs/shard.tar#KEY`` or ``/abs/table.parquet#ROW``.
        read: returns the encoded image; raises `DataError` if it is gone.
        captions: all of them, the most important first.
        label: class label; in a folder, the name of the subfolder.
        metadata: other columns or fields, with JSON values.
        has_image: whether it has an image at all; a row of a table may be a text alone.
        size_bytes, mtime_ns: of the file, to recognise it unchanged without reading it; None where
            the image is not a file of its own.
    """

    uri: str
    read: Callable[[], bytes] = field(repr=False, compare=False)
    captions: tuple[str, ...] = ()
    label: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    size_bytes: int | None = None
    mtime_ns: int | None = None
    has_image: bool = True


def text_record(
    uri: str, captions: tuple[str, ...], label: str | None, metadata: dict[str, Any]
) -> Record:
    """The record of a text without an image."""
    return Record(uri, bytes, captions, label, metadata, has_image=False)


def file_record(
    path: Path,
    *,
    captions: tuple[str, ...] = (),
    label: str | None = None,
    metadata: dict[str, Any] | None = None,
) -> Record:
    """The record of an image file, under its real path; of one that is missing, ``read`` fails."""
    path = real_path(path)
    size: int | None = None
    mtime: int | None = None
    with contextlib.suppress(OSError):
        status = path.stat()
        size, mtime = status.st_size, status.st_mtime_ns
    return Record(
        uri=str(path),
        read=lambda: read_file(path),
        captions=captions,
        label=label,
        metadata=metadata or {},
        size_bytes=size,
        mtime_ns=mtime,
    )


def read_file(path: Path) -> bytes:
    """Reads a file.

    Raises:
        ImageDecodeError: it is a pipe, a device or a folder.
        DataError: it cannot be read.
    """
    try:
        return read_regular(path)
    except NotRegularError as error:
        raise ImageDecodeError(
            f"{path}: is {error.strerror}", uri=str(path), reason="not a file"
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path}: cannot be read ({reason})") from error


def check_regular(path: str) -> None:
    """Refuses a table or a shard that is a pipe or a device: opening it could block for ever.

    Raises:
        DataError: it is no regular file. One that is missing or remote passes: opening it says so.
    """
    try:
        check_mode(Path(path).stat().st_mode, path)
    except NotRegularError as error:
        raise DataError(f"{path}: is {error.strerror}") from error
    except OSError:
        return


def to_sample(record: Record, key: str) -> Sample:
    """Reads a record's image and makes it a shard sample.

    Raises:
        DataError: the image cannot be read, or a text cannot be written into a shard.
    """
    if not record.has_image and not record.captions:
        raise SampleError(f"{record.uri}: the row has no text", reason="no caption")
    suffix = Path(record.uri.rpartition("#")[0] or record.uri).suffix.lower().lstrip(".")
    if f".{suffix}" not in EXTENSIONS:
        suffix = "jpg"  # a shard or table member: the ending only has to say "image"
    if not record.has_image:
        suffix = ""
    sample = Sample(key, record.read(), suffix, record.captions, record.label, record.metadata)
    try:
        check_texts(sample)
    except SampleError as error:
        raise SampleError(f"{record.uri}: {error}", reason=error.reason) from error
    return sample
