"""WebDataset shards: what a sample is, how shards are named and read.

A shard is a tar file. Members that share a name up to the first dot are one sample::

    000041.jpg     the image, encoded (any format that clipsys.images.decoding decodes)
    000041.txt     a caption
    000041.json    {"captions": ["…", "…"], …}; what is not captions is metadata
    000041.cls     optional class label

Shards are only ever streamed: nothing is extracted, nothing is unpickled, no shell runs.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from clipsys.errors import DataError
from clipsys.images.decoding import EXTENSIONS
from clipsys.shards.remote import ATTEMPTS, is_remote, open_url, pause, reason_of

_IMAGE_SUFFIXES = frozenset(ending.lstrip(".") for ending in EXTENSIONS)
_REMOTE_SCHEMES = ("http", "https", "s3", "gs", "hf")
#: What tarfile says of a tar that breaks off.
BREAK = "unexpected end of data"
_SCHEME = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]+):")


@dataclass(frozen=True)
class Sample:
    """One image with its captions.

    Attributes:
        key: unique within its set of shards.
        image: the encoded image, as it lies in the tar.
        suffix: the image's file name ending, without the dot.
        captions: every caption, the ``.txt`` one first, without repetitions.
        label: class label, if there is one.
        metadata: the rest of the ``.json`` member.
    """

    key: str
    image: bytes
    suffix: str
    captions: tuple[str, ...]
    label: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def parse_sample(raw: dict[str, Any]) -> Sample:
    """Turns webdataset's dictionary of members into a `Sample`.

    Raises:
        DataError: there is no image, or a text member is not what its ending says.
    """
    key = str(raw["__key__"])
    suffix = next((name for name in raw if name.rsplit(".", 1)[-1] in _IMAGE_SUFFIXES), None)
    if suffix is None:
        members = ", ".join(sorted(name for name in raw if not name.startswith("__")))
        raise DataError(f"{_place(raw)}: no image among the members of the sample ({members})")
    metadata: dict[str, Any] = {}
    try:
        if "json" in raw:
            metadata = json.loads(raw["json"])
        captions = [raw["txt"].decode("utf-8").strip()] if "txt" in raw else []
        label = raw["cls"].decode("utf-8").strip() if "cls" in raw else None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(
            f"{_place(raw)}: the text of the sample cannot be read ({error})"
        ) from error
    if not isinstance(metadata, dict):
        raise DataError(f"{_place(raw)}: the .json member is not an object")
    unique = with_captions_of(metadata, captions)
    return Sample(key, raw[suffix], suffix.rsplit(".", 1)[-1], unique, label, metadata)


def with_captions_of(metadata: dict[str, Any], captions: Sequence[str]) -> tuple[str, ...]:
    """Captions from a text, then those that metadata hold, which are taken out of them."""
    more = metadata.pop("captions", [])
    found = [
        str(text) for text in (*captions, *(more if isinstance(more, list) else [more])) if text
    ]
    if not found and isinstance(metadata.get("caption"), str):  # img2dataset's name for it
        found = [metadata["caption"]]
    return tuple(dict.fromkeys(found))


def _place(raw: dict[str, Any]) -> str:
    return f"{raw.get('__url__', 'shard')}#{raw.get('__key__', '?')}"


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
    scheme = _SCHEME.match(spec)
    if scheme:
        if scheme[1].lower() not in _REMOTE_SCHEMES:
            raise DataError(
                f"{spec}: {scheme[1]}: urls are refused; "
                f"name local files or {', '.join(_REMOTE_SCHEMES)} urls"
            )
        return _expand_braces(spec)
    path = Path(spec).expanduser()
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
        if not found:
            raise DataError(f"{path}: the folder has no .tar files")
        return [str(shard) for shard in found]
    names = _expand_braces(str(path))
    if any(character in spec for character in "*?["):
        found = sorted(shard for name in names for shard in _glob(Path(name)))
        if not found:
            raise DataError(f"{spec}: no file matches this pattern")
        return [str(shard) for shard in found]
    missing = [name for name in names if not Path(name).is_file()]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DataError(f"{missing[0]}: there is no such shard{more}")
    return names


def _glob(pattern: Path) -> Iterator[Path]:
    parts = pattern.parts
    first = next(i for i, part in enumerate(parts) if any(c in part for c in "*?["))
    return Path(*parts[:first]).glob(str(Path(*parts[first:])))


def _expand_braces(text: str) -> list[str]:
    import braceexpand

    try:
        return list(braceexpand.braceexpand(text))
    except ValueError as error:  # UnbalancedBracesError
        raise DataError(f"{text}: unbalanced braces in a shard range") from error


def iterate_raw(
    shards: Iterable[str], *, on_error: Callable[[str, Exception], None] | None = None
) -> Iterator[dict[str, Any]]:
    """Streams webdataset's raw samples: ``__key__``, ``__url__`` and the members' bytes.

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
    """The samples of one open tar; `iterate_raw` for a stream that is at hand.

    Args:
        shard: what the samples name as their origin.
        stream: read from its position to its end.
        handler: called when the stream breaks off; returns False.
    """
    # webdataset's own opener would leave the file to the garbage collector.
    from webdataset.tariterators import group_by_keys, tar_file_expander

    members = tar_file_expander([{"url": shard, "stream": stream}], handler=handler)
    yield from group_by_keys(members, handler=handler)


def shard_failure(shard: str, error: Exception) -> str:
    """What is wrong with a shard that could not be read to its end, in one line."""
    if isinstance(error, tarfile.ReadError):
        if BREAK in str(error):
            return f"{shard}: the shard is truncated; make it again or remove it"
        return f"{shard}: not a tar file; remove it, or name the shards one by one"
    if isinstance(error, ValueError) and "duplicate file name" in str(error):
        return f"{shard}: two members of one sample have the same name ({error.args[0]})"
    asked = f", asked {ATTEMPTS} times" if is_remote(shard) else ""
    return f"{shard}: the shard cannot be read ({reason_of(error)}{asked})"


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
    except (OSError, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{place}: the shard cannot be read ({reason})") from error


def _before_break(tar: tarfile.TarFile, size_bytes: int) -> Iterator[tarfile.TarInfo]:
    members = iter(tar)
    while True:
        try:
            member = next(members, None)
        except tarfile.ReadError:
            return
        if member is None or member.offset_data + member.size > size_bytes:
            return
        yield member


@functools.lru_cache(maxsize=256)
def _image_members(shard: str, mtime_ns: int, size_bytes: int) -> dict[str, tuple[int, int]]:
    """Where the first image of each sample lies in a tar: key -> (offset, size); headers only.

    Of a shard that breaks off these are the images before the break.
    Time and size are there to make the cache forget a shard that has changed.
    """
    members: dict[str, tuple[int, int]] = {}
    with tarfile.open(shard, "r:") as tar:
        for member in _before_break(tar, size_bytes):
            folder, _, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            if member.isfile() and suffix.rsplit(".", 1)[-1].lower() in _IMAGE_SUFFIXES:
                key = f"{folder}/{stem}" if folder else stem
                members.setdefault(key, (member.offset_data, member.size))
    return members
