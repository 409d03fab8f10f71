"""``shards.json``, which stands beside a set of shards: counts, sizes and hashes."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from clipsys.errors import DataError
from clipsys.shards.remote import open_url

MANIFEST_NAME = "shards.json"


@dataclass(frozen=True)
class ShardInfo:
    """What the manifest says of one shard: its name, samples, size and content."""

    name: str
    num_samples: int
    size_bytes: int
    sha256: str


def read_manifest(folder: str | Path) -> list[ShardInfo]:
    """Reads a folder's ``shards.json``. Empty where there is none.

    Raises:
        DataError: it is there and cannot be read.
    """
    path = Path(folder) / MANIFEST_NAME
    return _parse_manifest(path.read_bytes(), str(path)) if path.is_file() else []


def remote_manifest(folder_url: str) -> list[ShardInfo]:
    """Reads the ``shards.json`` behind a url. Empty where there is none.

    Raises:
        DataError: it is there and cannot be read.
    """
    url = f"{folder_url}/{MANIFEST_NAME}"
    try:
        with open_url(url) as stream:
            content = stream.read()
    except OSError:
        return []
    return _parse_manifest(content, url)


def _parse_manifest(content: bytes, place: str) -> list[ShardInfo]:
    try:
        document = json.loads(content.decode("utf-8"))
        return [ShardInfo(**entry) for entry in cast("list[dict[str, Any]]", document["shards"])]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{place}: not a shard manifest ({error}); delete it to go on") from error


def add_to_manifest(folder: Path, written: Sequence[ShardInfo]) -> None:
    """Adds shards to a folder's manifest, or replaces what it says of them."""
    shards = {info.name: info for info in read_manifest(folder)}
    shards |= {info.name: info for info in written}
    write_manifest(folder, shards.values())


def write_manifest(folder: Path, shards: Iterable[ShardInfo]) -> None:
    """Writes a folder's manifest, whole or not at all; the same shards give the same bytes.

    Raises:
        DataError: the folder cannot be written to.
    """
    listed = sorted(shards, key=lambda info: info.name)
    document = {
        "format": "clipsys-shards/1",
        "num_samples": sum(info.num_samples for info in listed),
        "shards": [vars(info) for info in listed],
    }
    path = folder / MANIFEST_NAME
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps(document, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror}); make room or the folder writable"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
