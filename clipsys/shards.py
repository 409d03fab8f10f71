"""WebDataset shards: what a sample is, how shards are named, read, counted and written.

A shard is a tar file. Members that share a name up to the first dot are one sample::

    000041.jpg     the image, encoded (any format that clipsys.images decodes)
    000041.txt     a caption
    000041.json    {"captions": ["…", "…"], …}; what is not captions is metadata
    000041.cls     optional class label

Shards are only ever streamed: nothing is extracted, nothing is unpickled, no shell runs.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from clipsys.errors import DataError
from clipsys.images import EXTENSIONS

#: Name of the file that describes a set of shards: counts, sizes and hashes.
MANIFEST_NAME = "shards.json"
#: Default size of a shard. Large enough to stream well, small enough to shuffle by shard.
DEFAULT_SHARD_BYTES = 100_000_000

_IMAGE_SUFFIXES = frozenset(ending.lstrip(".") for ending in EXTENSIONS)
_REMOTE_SCHEMES = ("http", "https", "s3", "gs", "hf")
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
    more = metadata.pop("captions", [])
    captions += [str(more)] if isinstance(more, str) else [str(text) for text in more or []]
    if not captions and isinstance(metadata.get("caption"), str):  # img2dataset's name for it
        captions = [metadata["caption"]]
    unique = tuple(dict.fromkeys(text for text in captions if text))
    return Sample(key, raw[suffix], suffix.rsplit(".", 1)[-1], unique, label, metadata)


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

    A shard that breaks off gives the samples before the break.

    Args:
        shards: paths or urls, in the order in which they are read.
        on_error: called with the shard and what happened when one breaks off.

    Raises:
        DataError: a shard cannot be read and ``on_error`` is not given.
    """
    for shard in shards:
        failure: list[Exception] = []

        def stop(error: Exception, failure: list[Exception] = failure) -> bool:
            failure.append(error)
            return False  # webdataset: end this stream

        try:
            with _open_shard(shard) as stream:
                yield from _raw_samples(shard, stream, stop)
                if not failure and _lacks_end(shard, stream):
                    failure.append(tarfile.ReadError("unexpected end of data"))
        except OSError as error:
            failure.append(error)
        if failure:
            if on_error is None:
                raise DataError(_shard_failure(shard, failure[0])) from failure[0]
            on_error(shard, failure[0])


def _open_shard(shard: str) -> IO[bytes]:
    if "://" not in shard:
        return Path(shard).open("rb")
    import webdataset

    stream: IO[bytes] = webdataset.gopen.gopen(shard)
    return stream


def _lacks_end(shard: str, stream: IO[bytes]) -> bool:
    """Whether a local tar breaks off between two members, which tarfile takes for its end.

    Every tar writer closes an archive with two blocks of zeros.
    """
    if "://" in shard:
        return False
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - 1024))
    return size > 0 and stream.read() != bytes(1024)


def _raw_samples(
    shard: str, stream: IO[bytes], handler: Callable[[Exception], bool]
) -> Iterator[dict[str, Any]]:
    # webdataset's own opener would leave the file to the garbage collector.
    from webdataset.tariterators import group_by_keys, tar_file_expander

    members = tar_file_expander([{"url": shard, "stream": stream}], handler=handler)
    yield from group_by_keys(members, handler=handler)


def _shard_failure(shard: str, error: Exception) -> str:
    if isinstance(error, tarfile.ReadError):
        if "unexpected end" in str(error):
            return f"{shard}: the shard is truncated; make it again or remove it"
        return f"{shard}: not a tar file; remove it, or name the shards one by one"
    if isinstance(error, ValueError) and "duplicate file name" in str(error):
        return f"{shard}: two members of one sample have the same name ({error.args[0]})"
    reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error.args[:1]}"
    return f"{shard}: the shard cannot be read ({reason})"


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
    if "://" in shard:
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


@functools.lru_cache(maxsize=256)
def _image_members(shard: str, mtime_ns: int, size_bytes: int) -> dict[str, tuple[int, int]]:
    """Where the first image of each sample lies in a tar: key -> (offset, size); headers only.

    Time and size are there to make the cache forget a shard that has changed.
    """
    members: dict[str, tuple[int, int]] = {}
    with tarfile.open(shard, "r:") as tar:
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            if member.isfile() and suffix.rsplit(".", 1)[-1].lower() in _IMAGE_SUFFIXES:
                key = f"{folder}/{stem}" if folder else stem
                members.setdefault(key, (member.offset_data, member.size))
    return members


def count_samples(shard: str) -> tuple[int, str | None]:
    """Counts the samples that a shard will give, and says what is wrong with it.

    Returns:
        The number of samples, and the fault that ends the shard early, or None.

    Raises:
        DataError: it is not a tar file at all, or holds no sample.
    """
    faults: list[str] = []
    count = sum(
        1
        for _ in iterate_raw(
            [shard], on_error=lambda name, error: faults.append(_shard_failure(name, error))
        )
    )
    if count == 0:
        raise DataError(faults[0] if faults else f"{shard}: the shard has no samples")
    return count, faults[0] if faults else None


@dataclass(frozen=True)
class ShardInfo:
    """What the manifest says of one shard: its name, samples, size and content."""

    name: str
    num_samples: int
    size_bytes: int
    sha256: str


def write_shards(
    samples: Iterable[Sample],
    out: str | Path,
    *,
    prefix: str = "shard",
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> list[ShardInfo]:
    """Writes samples into ``OUT/PREFIX-00000.tar`` and onwards, and adds them to the manifest.

    The bytes depend on the samples and nothing else (no times, no owners). Each shard appears
    under its name only when it is complete.

    Returns:
        One `ShardInfo` per shard written.

    Raises:
        DataError: shards of this prefix are already there, or a key occurs twice.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob(f"{prefix}-*.tar")):
        raise DataError(
            f"{folder}: already has {prefix}-*.tar shards; choose an empty folder or remove them"
        )
    written: list[ShardInfo] = []
    seen: set[str] = set()
    stream = iter(samples)
    pending = next(stream, None)
    try:
        while pending is not None:
            path = folder / f"{prefix}-{len(written):05d}.tar"
            partial = path.with_suffix(".tar.partial")
            count = 0
            with partial.open("wb") as file:
                with _TarWriter(file) as writer:
                    while pending is not None and (count == 0 or file.tell() < shard_bytes):
                        if pending.key in seen:
                            raise DataError(f"{folder}: the key {pending.key!r} occurs twice")
                        seen.add(pending.key)
                        writer.write(pending)
                        count += 1
                        pending = next(stream, None)
                file.flush()
                os.fsync(file.fileno())
            digest = hash_file(partial)
            partial.rename(path)
            written.append(ShardInfo(path.name, count, path.stat().st_size, digest))
    except BaseException:
        # An interrupted pack must not look like a finished one.
        for leftover in (
            *folder.glob(f"{prefix}-*.tar.partial"),
            *(folder / w.name for w in written),
        ):
            leftover.unlink(missing_ok=True)
        raise
    if written:
        _add_to_manifest(folder, written)
    return written


class _TarWriter:
    """Writes samples as tar members with constant owner and time."""

    def __init__(self, file: io.BufferedWriter) -> None:
        import webdataset

        self._writer = webdataset.TarWriter(file, encoder=False, mtime=0.0, user="", group="")

    def __enter__(self) -> _TarWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._writer.close()

    def write(self, sample: Sample) -> None:
        members: dict[str, Any] = {"__key__": sample.key, sample.suffix: sample.image}
        if sample.captions:
            members["txt"] = sample.captions[0].encode()
        if sample.label is not None:
            members["cls"] = sample.label.encode()
        details = dict(sample.metadata)
        if len(sample.captions) > 1:
            details["captions"] = list(sample.captions)
        if details:
            members["json"] = json.dumps(details, ensure_ascii=False, sort_keys=True).encode()
        self._writer.write(members)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _add_to_manifest(folder: Path, written: Sequence[ShardInfo]) -> None:
    shards = {info.name: info for info in read_manifest(folder)}
    shards |= {info.name: info for info in written}
    document = {
        "format": "clipsys-shards/1",
        "num_samples": sum(info.num_samples for info in shards.values()),
        "shards": [vars(shards[name]) for name in sorted(shards)],
    }
    path = folder / MANIFEST_NAME
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def read_manifest(folder: str | Path) -> list[ShardInfo]:
    """Reads a folder's ``shards.json``. Empty where there is none.

    Raises:
        DataError: it is there and cannot be read.
    """
    path = Path(folder) / MANIFEST_NAME
    if not path.is_file():
        return []
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return [ShardInfo(**entry) for entry in cast("list[dict[str, Any]]", document["shards"])]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a shard manifest ({error}); delete it to go on") from error
