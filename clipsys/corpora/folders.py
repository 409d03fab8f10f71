"""A folder of images: which files belong to it, and what stands beside each.

Left out, and counted: what is hidden, what a system or a network drive keeps for itself
(`DEFAULT_EXCLUDED`), clipsys's own collections, and what the caller excludes. Whatever has an
image's name and is no file (a named pipe, a link that leads nowhere) is a record that fails when it
is read, so that it is counted as well.
"""

from __future__ import annotations

import fnmatch
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from clipsys.corpora.records import Record, file_record
from clipsys.errors import DataError, SampleError
from clipsys.files.expansion import expand_path
from clipsys.files.regular import read_regular
from clipsys.images.decoding import EXTENSIONS
from clipsys.printing import counted
from clipsys.shards.sample_texts import parse_metadata, with_captions_of

#: Names, in any case, that systems, archives and network drives give to what they keep for
#: themselves: thumbnails, bins, snapshots. Names that begin with a dot are left out as well.
DEFAULT_EXCLUDED = (
    "@eaDir", "@Recycle", "@Recently-Snapshot", "@tmp", "#recycle", "#snapshot", "$RECYCLE.BIN",
    "RECYCLER", "System Volume Information", "lost+found", "__MACOSX", "Thumbs.db", "ehthumbs.db",
    "desktop.ini",
)  # fmt: skip
#: Files that accompany images, or that systems leave behind.
_BESIDE = {".txt", ".json", ".cls", ""}
#: Files by which a folder is known as one of clipsys's collections.
_COLLECTION = {"manifest.json", "writer.lock", "segments"}

_logger = logging.getLogger(__name__)


def iterate_folder(
    root: Path, exclude: Sequence[str] = (), *, frames: bool = False
) -> Iterator[Record]:
    """The images below a folder as records, in sorted order.

    Args:
        root: its absolute path.
        exclude: patterns besides `DEFAULT_EXCLUDED`; one with a slash is matched against the path
            below ``root``, any other against names of files and folders.
        frames: the images are numbered frames: their metadata get ``sequence``, the folder below
            ``root``, and ``frame``, the last number in their name.

    Raises:
        DataError: the folder cannot be listed, or a frame has no number.
    """
    num_unusable = 0
    for path in _walk(root, exclude):
        parent = path.parent.relative_to(root)
        metadata, captions = _side_texts(path)
        num_unusable += metadata is None
        if frames:
            place = {"sequence": parent.as_posix(), "frame": _frame_number(path)}
            metadata = {**(metadata or {}), **place}
        yield file_record(
            path,
            captions=captions,
            label=parent.parts[0] if parent.parts else None,
            metadata=metadata or {},
        )
    if num_unusable:
        files = counted(
            num_unusable, ".json file beside an image is", ".json files beside images are"
        )
        _logger.warning("%s: %s not JSON objects with texts as captions, and left out", root, files)


def _frame_number(path: Path) -> int:
    numbers = re.findall(r"[0-9]+", path.stem)
    if not numbers:
        raise DataError(
            f"{path}: its name has no number, by which --frames orders the images of a folder; "
            "rename it, or move it elsewhere"
        )
    return int(numbers[-1])


def image_record(path: Path) -> Record:
    """The record of one image file, with the texts that stand beside it."""
    metadata, captions = _side_texts(path)
    return file_record(path, captions=captions, metadata=metadata or {})


def count_images(folder: str | Path, exclude: Sequence[str] = ()) -> int:
    """How many records a folder gives: images by their names, nothing of them being read."""
    return sum(1 for _ in _walk(Path(expand_path(str(folder))).absolute(), exclude))


@dataclass
class _Left:
    """What a walk left out."""

    others: Counter[str] = field(default_factory=Counter)
    excluded: Counter[str] = field(default_factory=Counter)
    collections: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def _walk(root: Path, exclude: Sequence[str]) -> Iterator[Path]:
    """Image files below a folder in sorted order; follows links, but no folder twice."""
    left = _Left()
    matches = _Patterns(exclude)
    visited: set[tuple[int, int]] = set()
    waiting = [str(root)]
    while waiting:
        folder = waiting.pop()
        try:
            status = os.stat(folder)  # noqa: PTH116
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if folder == str(root):
                raise DataError(f"{root}: cannot be listed ({error.strerror})") from error
            left.unreadable.append(f"{folder} ({error.strerror})")
            continue
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        if folder != str(root) and {entry.name for entry in found} >= _COLLECTION:
            left.collections.append(folder)
            continue
        subfolders = []
        for entry in found:
            if entry.name.startswith("."):
                continue
            if matches(entry.name, entry.path[len(str(root)) :].lstrip("/")):
                left.excluded[entry.name] += 1
            elif _is_folder(entry):
                subfolders.append(entry.path)
            elif (suffix := os.path.splitext(entry.name)[1].lower()) in EXTENSIONS:  # noqa: PTH122
                yield Path(entry.path)
            elif suffix not in _BESIDE:
                left.others[suffix] += 1
        waiting += reversed(subfolders)
    _log_left_out(root, left)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a circular link
        return False


class _Patterns:
    """Matches names, or paths below the root, with shell patterns in any case."""

    def __init__(self, exclude: Sequence[str]) -> None:
        self._fixed = {name.casefold() for name in DEFAULT_EXCLUDED}
        patterns = [pattern.strip("/").casefold() for pattern in exclude]
        self._names = [pattern for pattern in patterns if "/" not in pattern]
        self._paths = [pattern for pattern in patterns if "/" in pattern]

    def __call__(self, name: str, path: str) -> bool:
        folded = name.casefold()
        if folded in self._fixed:
            return True
        return any(fnmatch.fnmatchcase(folded, pattern) for pattern in self._names) or any(
            fnmatch.fnmatchcase(path.casefold(), pattern) for pattern in self._paths
        )


def _log_left_out(root: Path, left: _Left) -> None:
    if left.others:
        _log_once(root, _others(left.others))
    if left.excluded:
        names = ", ".join(name for name, _ in left.excluded.most_common(5))
        number = counted(left.excluded.total(), "file or folder is", "files or folders are")
        _log_once(root, f"{number} excluded by name ({names})")
    if left.collections:
        number = counted(len(left.collections), "collection of clipsys is", "collections are")
        _log_once(root, f"{number} left out ({left.collections[0]})")
    if left.unreadable:
        number = counted(len(left.unreadable), "folder", "folders")
        _log_once(root, f"{number} cannot be listed, the first: {left.unreadable[0]}", warn=True)


def _others(others: Counter[str]) -> str:
    kinds = ", ".join(f"{number:,} {suffix}" for suffix, number in others.most_common(5))
    more = ", …" if len(others) > 5 else ""
    number = counted(others.total(), "other file is", "other files are")
    return f"{number} not images by name ({kinds}{more}); a table can name them"


@cache  # a folder is walked more than once: first it is counted
def _log_once(root: Path, message: str, warn: bool = False) -> None:
    _logger.log(logging.WARNING if warn else logging.INFO, "%s: %s", root, message)


def _side_captions(path: Path) -> tuple[str, ...]:
    try:
        text = read_regular(path.with_suffix(".txt")).decode("utf-8", "replace")
    except OSError:
        return ()
    return tuple(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))


def _side_texts(path: Path) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """The metadata and captions beside an image; no metadata where they cannot be used."""
    captions = _side_captions(path)
    try:
        metadata = parse_metadata(read_regular(path.with_suffix(".json")))
        return metadata, with_captions_of(metadata, captions)
    except OSError:
        return {}, captions
    except SampleError:
        return None, captions
