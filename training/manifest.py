"""The manifest of a checkpoint: who saved it, and every file of it with its size and checksum.

CRC-32 finds what a crash, a full disk or a copy that broke off does to a file, at 4 GB/s of a core,
and it is taken of files that have just been written and lie in the page cache. It is no protection
against a checkpoint that is altered on purpose.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from clipsys.errors import TrainingError

MANIFEST_NAME = "checkpoint.json"
_FORMAT = "clipsys-checkpoint/1"
_BLOCK_BYTES = 1 << 22


class FileRecord(NamedTuple):
    """Size and checksum of a file."""

    size_bytes: int
    crc32: int


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        step: steps done.
        world_size: number of ranks that saved it.
        zero_stage: stage of the engine that saved it.
        precision: precision that it trained in, after ``auto`` was resolved.
        files: size and checksum by path relative to the checkpoint.
    """

    step: int
    world_size: int
    zero_stage: int
    precision: str
    files: dict[str, FileRecord]

    def write(self, checkpoint: Path) -> None:
        """Writes the manifest into a checkpoint."""
        document = {"format": _FORMAT, **asdict(self)}
        document["files"] = {name: record._asdict() for name, record in self.files.items()}
        text = json.dumps(document, indent=1) + "\n"
        (checkpoint / MANIFEST_NAME).write_text(text, encoding="utf-8")


def read_manifest(checkpoint: Path) -> Manifest | None:
    """Reads the manifest of a checkpoint. None where there is none: clipsys 0.x wrote none.

    Raises:
        TrainingError: it cannot be read.
    """
    path = checkpoint / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        files = {name: FileRecord(**record) for name, record in document.pop("files").items()}
        if document.pop("format") != _FORMAT:
            raise ValueError("the format is of another version")
        manifest = Manifest(**document, files=files)
        for name in ("step", "world_size", "zero_stage"):
            if type(getattr(manifest, name)) is not int:
                raise ValueError(f"{name} is {getattr(manifest, name)!r}, not a number")
        if manifest.world_size < 1 or not isinstance(manifest.precision, str):
            raise ValueError("it does not say who saved the checkpoint")
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise TrainingError(f"{path}: not a whole manifest ({error})") from error


def list_files(checkpoint: Path) -> list[str]:
    """Paths of a checkpoint's files, but for the manifest and hidden files, sorted."""
    found = (path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file())
    return sorted(
        path.as_posix()
        for path in found
        if path.as_posix() != MANIFEST_NAME and not any(part.startswith(".") for part in path.parts)
    )


def describe_files(checkpoint: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Size and checksum of some files of a checkpoint."""
    return {name: _describe(checkpoint / name) for name in names}


def _describe(path: Path) -> FileRecord:
    checksum = size = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            checksum = zlib.crc32(block, checksum)
            size += len(block)
    return FileRecord(size, checksum)


def missing_or_resized(checkpoint: Path, files: Mapping[str, FileRecord]) -> list[str]:
    """What differs from the manifest by name and size alone, in sentences."""
    there = set(list_files(checkpoint))
    faults = [f"{name} is missing" for name in sorted(files.keys() - there)]
    for name in sorted(files.keys() & there):
        size, expected = (checkpoint / name).stat().st_size, files[name].size_bytes
        if size != expected:
            faults.append(f"{name} has {size:,} bytes instead of {expected:,}")
    faults += [f"{name} does not belong to it" for name in sorted(there - files.keys())]
    return faults


def altered(checkpoint: Path, files: Mapping[str, FileRecord]) -> list[str]:
    """Which of some files, all of the right size, have another checksum; in sentences."""
    found = describe_files(checkpoint, files)
    return [f"{name} is altered" for name in sorted(files) if found[name] != files[name]]
