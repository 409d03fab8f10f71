"""WebDataset shards: how they are named, and how they are read from their beginning.

A shard is a tar file; `clipsys.shards.samples` says what a sample in it is. Nothing is extracted,
nothing is unpickled, no shell runs.
"""

from __future__ import annotations

import functools
import itertools
import lzma
import os
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

from clipsys.errors import DataError
from clipsys.files.expansion import expand_path
from clipsys.shards.remote import ATTEMPTS, is_remote, open_url, pause, reason_of
from clipsys.shards.samples import (
    Sample,
    group_members,
    is_image,
    parse_sample,
    printable,
    split_name,
)

_REMOTE_SCHEMES = ("http", "https", "s3", "gs", "hf")
#: What tarfile says of a tar that breaks off.
BREAK = "unexpected end of data"
#: What tarfile raises on headers that are damaged or made to do harm.
TAR_FAULTS = (
    tarfile.TarError,
    OSError,
    EOFError,
    ValueError,
    ArithmeticError,
    LookupError,
    TypeError,
    AttributeError,
    MemoryError,
    RecursionError,
    struct.error,
    zlib.error,
    lzma.LZMAError,
)
_SCHEME = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]+):")
_PATTERN = "*?["
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?\}")
#: The longest range; a longer one is a slip, and would fill the memory.
_MOST_SHARDS = 10_000_000


def expand_shards(spec: str | Path | Sequence[str | Path]) -> list[str]:
    """Lists the shards that a folder, a path, a glob, a ``{000..012}`` range or a list names.

    Raises:
        DataError: nothing is there, or a url asks for something that is refused (``pipe:``).
    """
    specs = [spec] if isinstance(spec, str | Path) else list(spec)
    shards = [shard for one in specs for shard in _expand(str(one))]
    if not shards:
        raise DataError("no shards were named; name a folder of .tar files or a list of them")
    return shards


def _expand(spec: str) -> list[str]:
    spec = expand_path(spec)
    scheme = _SCHEME.match(spec)
    if scheme:
        if scheme[1].lower() not in _REMOTE_SCHEMES:
            raise DataError(
                f"{spec}: {scheme[1]}: urls are refused; "
                f"name local files or {', '.join(_REMOTE_SCHEMES)} urls"
            )
        return _expand_braces(spec)
    path = Path(spec)
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
        if not found:
            raise DataError(f"{path}: the folder has no .tar files")
        return _regular(found)
    if path.is_file():  # whatever characters its name has
        return [str(path)]
    names = _expand_braces(str(path))
    if any(character in str(path) for character in _PATTERN):
        found = sorted(shard for name in names for shard in _glob(Path(name)))
        if not found:
            raise DataError(f"{spec}: no file matches this pattern")
        return _regular(found)
    missing = [name for name in names if not Path(name).is_file()]
    if missing and Path(missing[0]).exists():
        return _regular([Path(name) for name in missing])
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DataError(f"{missing[0]}: there is no such shard{more}")
    return names


def _regular(paths: Sequence[Path]) -> list[str]:
    """The paths, none of which may be a folder, a pipe or a device: reading a pipe never ends.

    Raises:
        DataError: one of them is.
    """
    for path in paths:
        if not path.is_file():
            kind = (
                "a folder" if path.is_dir()
                else "a pipe or a device" if path.exists()
                else "a link to a file that is not there"
            )  # fmt: skip
            raise DataError(f"{path}: is {kind}, not a shard; remove it, or name the shards singly")
    return [str(path) for path in paths]


def _glob(pattern: Path) -> Iterator[Path]:
    """What matches; a folder or file with just this name goes before what its name would match."""
    found = [Path(*pattern.parts[:1])] if pattern.is_absolute() else [Path()]
    for part in pattern.parts[1:] if pattern.is_absolute() else pattern.parts:
        found = [
            inner
            for folder in found
            for inner in ([folder / part] if (folder / part).exists() else folder.glob(part))
        ]
    yield from found


def _expand_braces(text: str) -> list[str]:
    import braceexpand

    for start, end in _RANGE.findall(text):
        if abs(int(end) - int(start)) >= _MOST_SHARDS:
            raise DataError(f"{text}: the range names more than {_MOST_SHARDS:,} shards")
    try:
        return list(braceexpand.braceexpand(text))
    except ValueError as error:  # UnbalancedBracesError
        raise DataError(f"{text}: unbalanced braces in a shard range") from error


def iterate_raw(
    shards: Iterable[str], *, on_error: Callable[[str, Exception], None] | None = None
) -> Iterator[dict[str, Any]]:
    """Streams raw samples: ``__key__``, ``__url__`` and the members' bytes by their endings.

    A shard that breaks off gives the samples before the break. Of a remote one the rest is asked
    for again, a few times.

    Args:
        shards: paths or urls, in the order in which they are read.
        on_error: called with the shard and what happened when one breaks off.

    Raises:
        DataError: a shard cannot be read and ``on_error`` is not given.
    """
    for shard in shards:
        given = 0
        for attempt in range(1, (ATTEMPTS if is_remote(shard) else 1) + 1):
            failure: list[Exception] = []
            for raw in itertools.islice(_one_shard(shard, failure), given, None):
                given += 1
                yield raw
            if not failure:
                break
            if is_remote(shard) and attempt < ATTEMPTS:
                pause(shard, failure[-1], attempt)
            elif on_error is None:
                raise DataError(shard_failure(shard, failure[-1])) from failure[-1]
            else:
                on_error(shard, failure[-1])


def _one_shard(shard: str, failure: list[Exception]) -> Iterator[dict[str, Any]]:
    """The samples of a shard up to its end or its first failure, which is left in the list."""

    def stop(error: Exception) -> bool:
        failure.append(error)
        return False  # webdataset: end this stream

    # One sample is held back: where a shard breaks off, its last sample may lack members.
    held: dict[str, Any] | None = None
    try:
        with _open_shard(shard) as stream:
            for raw in raw_samples(shard, stream, stop):
                if held is not None:
                    yield held
                held = raw
            if not failure and _lacks_end(shard, stream):
                failure.append(tarfile.ReadError(BREAK))
            if held and failure and isinstance(failure[-1], tarfile.ReadError):
                failure[-1] = tarfile.ReadError(BREAK)  # whatever the rest looks like
    except OSError as error:
        failure.append(error)
    if held is not None and not failure:
        yield held


def _open_shard(shard: str) -> AbstractContextManager[IO[bytes]]:
    return open_url(shard) if is_remote(shard) else Path(shard).open("rb")


def _lacks_end(shard: str, stream: IO[bytes]) -> bool:
    """Whether a local tar breaks off between two members, which tarfile takes for its end.

    Every tar writer closes an archive with two blocks of zeros.
    """
    if is_remote(shard):
        return False
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - 1024))
    return size > 0 and stream.read() != bytes(1024)


def raw_samples(
    shard: str, stream: IO[bytes], handler: Callable[[Exception], bool]
) -> Iterator[dict[str, Any]]:
    """The samples of one open tar; `iterate_raw` for a stream that is open already.

    Args:
        shard: what the samples name as their origin.
        stream: read from its position to its end.
        handler: called when the stream breaks off; returns False.
    """

    def members() -> Iterator[tuple[str, bytes]]:
        try:
            with tarfile.open(fileobj=stream, mode="r|*") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
                    file = tar.extractfile(member) if member.isreg() else None
                    if file is not None:
                        yield member.name, file.read()
        except TAR_FAULTS as error:
            handler(error)

    yield from group_members(members(), shard)


def shard_failure(shard: str, error: Exception) -> str:
    """What is wrong with a shard that could not be read to its end, in one line."""
    if isinstance(error, tarfile.ReadError):
        if BREAK in str(error):
            return f"{shard}: the shard is truncated; make it again or remove it"
        if (packed := _compression(shard)) is not None:
            return (
                f"{shard}: not a tar file but one that {packed} has compressed; samples are read "
                "where they lie, so unpack it first"
            )
        return f"{shard}: not a tar file; remove it, or name the shards one by one"
    asked = f", asked {ATTEMPTS} times" if is_remote(shard) else ""
    return f"{shard}: the shard cannot be read ({reason_of(error)}{asked})"


_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def _compression(shard: str) -> str | None:
    """The program that has compressed a local shard, if one has."""
    if is_remote(shard):
        return None
    try:
        with Path(shard).open("rb") as file:
            start = file.read(8)
    except OSError:
        return None
    return next((name for magic, name in _MAGIC.items() if start.startswith(magic)), None)


def iterate_samples(
    shards: Iterable[str], *, on_error: Callable[[str, Exception], None] | None = None
) -> Iterator[Sample]:
    """Streams parsed samples. Raises like `iterate_raw` and `parse_sample`."""
    for raw in iterate_raw(shards, on_error=on_error):
        yield parse_sample(raw)


def read_image(shard: str, key: str) -> bytes:
    """Reads the encoded image of one sample, without streaming the shard before it.

    Raises:
        DataError: the shard cannot be read, or has no such sample.
    """
    place = f"{shard}#{key}"
    if is_remote(shard):
        for raw in iterate_raw([shard]):
            if raw["__key__"] == key:
                return parse_sample(raw).image
        raise DataError(f"{place}: the shard has no such sample any more")
    try:
        status = Path(shard).stat()
        members = _image_members(shard, status.st_mtime_ns, status.st_size)
        if key not in members:
            raise DataError(f"{place}: the shard has no such sample any more")
        offset, size = members[key]
        with Path(shard).open("rb") as file:
            file.seek(offset)
            return file.read(size)
    except TAR_FAULTS as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{place}: the shard cannot be read ({reason})") from error


def _before_break(tar: tarfile.TarFile, size_bytes: int) -> Iterator[tarfile.TarInfo]:
    members = iter(tar)
    while True:
        try:
            member = next(members, None)
        except TAR_FAULTS:
            return
        if member is None or member.offset_data + member.size > size_bytes:
            return
        yield member


@functools.lru_cache(maxsize=256)
def _image_members(shard: str, mtime_ns: int, size_bytes: int) -> dict[str, tuple[int, int]]:
    """Where the image of each sample lies in a tar: key -> (offset, size); headers only.

    Of a shard that breaks off these are the images before the break.
    Time and size are there to make the cache forget a shard that has changed.
    """
    members: dict[str, tuple[int, int]] = {}
    dotted: set[str] = set()
    with tarfile.open(shard, "r:") as tar:
        for member in _before_break(tar, size_bytes):
            parts = split_name(member.name)
            if not member.isfile() or parts is None or not is_image(parts[1]):
                continue
            key, plain = printable(parts[0]), "." not in parts[1]
            # The one without further dots, and of several such the first: as `parse_sample`.
            if key not in members or (plain and key in dotted):
                members[key] = (member.offset_data, member.size)
                (dotted.discard if plain else dotted.add)(key)
    return members
