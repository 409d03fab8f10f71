"""Writing samples into shards: the same samples give the same bytes, and no shard is half there."""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from clipsys.errors import DataError
from clipsys.shards.manifest import ShardInfo, add_to_manifest
from clipsys.shards.samples import Sample

#: Default size of a shard. Large enough to stream well, small enough to shuffle by shard.
DEFAULT_SHARD_BYTES = 100_000_000


def write_shards(
    samples: Iterable[Sample],
    out: str | Path,
    *,
    prefix: str = "shard",
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    done: Sequence[ShardInfo] = (),
    on_shard: Callable[[ShardInfo], None] | None = None,
) -> list[ShardInfo]:
    """Writes samples into ``OUT/PREFIX-00000.tar`` and onwards, and adds them to the manifest.

    The bytes depend on the samples and nothing else (no times, no owners). Each shard appears
    under its name only when it is complete.

    Args:
        samples: in the order in which they are written; their keys differ.
        out: the folder.
        prefix: prefix of the shards' names.
        shard_bytes: a new shard is begun when one has grown to this size.
        done: shards that an interrupted call has written, which this one goes on from.
        on_shard: called after each shard. With it, what is complete stays when writing is
            interrupted; without it, nothing does.

    Returns:
        One `ShardInfo` per shard, those that were done included.

    Raises:
        DataError: other shards of this prefix are already there, or a key occurs twice.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    names = {info.name for info in done}
    if any(path.name not in names for path in folder.glob(f"{glob.escape(prefix)}-*.tar")):
        raise DataError(
            f"{folder}: already has {prefix}-*.tar shards; choose an empty folder or remove them"
        )
    written = list(done)
    seen: set[str] = set()
    stream = iter(samples)
    try:
        pending = next(stream, None)
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
            info = ShardInfo(path.name, count, partial.stat().st_size, hash_file(partial))
            partial.rename(path)
            written.append(info)
            if on_shard:
                on_shard(info)
    except BaseException:
        # An interrupted call must not look like a finished one.
        for leftover in folder.glob(f"{glob.escape(prefix)}-*.tar.partial"):
            leftover.unlink(missing_ok=True)
        for info in () if on_shard else written[len(done) :]:
            (folder / info.name).unlink(missing_ok=True)
        raise
    if written:
        add_to_manifest(folder, written)
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
        members: dict[str, Any] = {"__key__": sample.key}
        if sample.suffix:
            members[sample.suffix] = sample.image
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
