"""Corpora as users have them: folders, tables and shards, read as one stream of records.

    folder      every image below it; NAME.txt beside NAME.jpg is its captions, one a line, and
                NAME.json its metadata, as in a shard
    table       .csv .tsv .jsonl .parquet with a path (or bytes) column, captions and metadata
    shards      a .tar, a folder of .tar files, a glob or a {000..012} range

A record is cheap: the image's bytes are read only when asked for.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from clipsys.corpora.records import Record, file_record, read_file
from clipsys.corpora.tables import TABLE_SUFFIXES, Columns, iterate_table, read_table_image
from clipsys.errors import DataError, SampleError
from clipsys.images.decoding import EXTENSIONS
from clipsys.paths import expand_path
from clipsys.shards.random_access import repeated_keys
from clipsys.shards.reading import expand_shards, iterate_raw, read_image
from clipsys.shards.remote import is_remote
from clipsys.shards.samples import (
    REPEATED,
    check_key,
    parse_metadata,
    parse_sample,
    place_of,
    with_captions_of,
)

_logger = logging.getLogger(__name__)
#: Files that belong to images, or to nobody.
_BESIDE = {".txt", ".json", ".cls", ""}


def iterate_source(
    source: str | Path,
    *,
    columns: Columns = Columns(),
    require: bool = True,
    on_error: Callable[[str, Exception], None] | None = None,
) -> Iterator[Record]:
    """Reads a folder, a table or shards as records, in a stable order.

    Rows of a table that name the same file are one record with several captions. A file that a
    table names and that is missing is a record whose ``read`` fails, so that it is counted.

    Args:
        source: path of a folder, a table or a shard, or a shard glob or range.
        columns: what the columns of a table mean, where their names do not say it.
        require: raise when there is nothing at all.
        on_error: called with a shard that breaks off and what happened; the next one follows.

    Raises:
        DataError: the source does not exist, holds no image, or its columns are not understood; a
            shard breaks off and ``on_error`` is not given.
    """
    kind = source_kind(source)
    if kind == "folder":
        records = _iterate_folder(Path(expand_path(str(source))).absolute())
    elif kind == "table":
        records = iterate_table(Path(expand_path(str(source))).absolute(), columns)
    else:
        records = _iterate_shards(source, on_error)
    first = next(records, None)
    if first is None:
        if require:
            endings = "images (.jpg, .png, .webp, .heic, …)"
            raise DataError(f"{source}: no {endings} found; check the path")
        return
    yield first
    yield from records


def count_images(folder: str | Path) -> int:
    """How many records a folder gives: images by their names, nothing of them being read."""
    return sum(1 for _ in _walk(Path(expand_path(str(folder))).absolute()))


def source_kind(source: str | Path) -> str:
    """Says whether a source is a ``folder``, a ``table`` or ``shards``.

    Raises:
        DataError: it does not exist, or it is none of the three.
    """
    text = expand_path(str(source))
    path = Path(text)
    if path.is_dir():
        names = [name for name in os.listdir(path) if not name.startswith(".")]  # noqa: PTH208
        has_tar = any(name.endswith(".tar") for name in names)
        has_image = any(Path(name).suffix.lower() in EXTENSIONS for name in names)
        return "shards" if has_tar and not has_image else "folder"
    if path.suffix.lower() in TABLE_SUFFIXES:
        if not path.is_file():
            raise DataError(f"{path}: there is no such table")
        return "table"
    if path.suffix == ".tar" or any(c in text for c in "{*?[") or "://" in text:
        return "shards"
    if not path.exists():
        raise DataError(f"{path}: there is no such folder, table or shard")
    raise DataError(
        f"{path}: not a source of images; expected a folder, a table "
        f"({', '.join(TABLE_SUFFIXES)}) or .tar shards"
    )


def read_uri(uri: str) -> bytes:
    """Reads one image again by the ``uri`` of its record.

    Raises:
        DataError: the file, the shard or the member is gone.
    """
    container, _, member = uri.rpartition("#")
    if container.endswith(".tar") and not Path(uri).exists():
        return read_image(container, member)
    if container.endswith(".parquet") and not Path(uri).exists():
        return read_table_image(Path(container), member)
    return read_file(Path(uri))


def _iterate_folder(root: Path) -> Iterator[Record]:
    num_unusable = 0
    for path in _walk(root):
        parent = path.parent.relative_to(root)
        metadata, captions = _side_texts(path)
        num_unusable += metadata is None
        yield file_record(
            path,
            captions=captions,
            label=parent.parts[0] if parent.parts else None,
            metadata=metadata or {},
        )
    if num_unusable:
        _logger.warning(
            "%s: %d .json files beside images are not JSON objects with texts as captions; they "
            "were left out",
            *(root, num_unusable),
        )


def _walk(root: Path) -> Iterator[Path]:
    """Image files below a folder in sorted order; follows links, but no folder twice."""
    visited: set[tuple[int, int]] = set()
    others: Counter[str] = Counter()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        status = os.stat(folder)  # noqa: PTH116
        if (status.st_dev, status.st_ino) in visited:
            subfolders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            suffix = Path(name).suffix.lower()
            if suffix in EXTENSIONS and not name.startswith("."):
                yield Path(folder) / name
            elif suffix not in _BESIDE and not name.startswith("."):
                others[suffix] += 1
    if others:
        _say_what_is_left(root, len(others), tuple(others.most_common(5)), others.total())


@cache  # a folder is read more than once: first it is counted
def _say_what_is_left(
    root: Path, num_kinds: int, most: tuple[tuple[str, int], ...], total: int
) -> None:
    kinds = ", ".join(f"{number} {suffix}" for suffix, number in most)
    _logger.info(
        "%s: %d other files are no images by their names (%s%s); a table can name them",
        root, total, kinds, ", …" if num_kinds > len(most) else "",
    )  # fmt: skip


def _side_captions(path: Path) -> tuple[str, ...]:
    beside = path.with_suffix(".txt")
    try:
        lines = beside.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()
    return tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))


def _side_texts(path: Path) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """The metadata and captions beside an image; no metadata where they cannot be used."""
    captions = _side_captions(path)
    try:
        metadata = parse_metadata(path.with_suffix(".json").read_bytes())
        return metadata, with_captions_of(metadata, captions)
    except OSError:
        return {}, captions
    except SampleError:
        return None, captions


def _iterate_shards(
    source: str | Path, on_error: Callable[[str, Exception], None] | None
) -> Iterator[Record]:
    for shard in expand_shards(source):
        name = shard if is_remote(shard) else str(Path(shard).absolute())
        repeated = frozenset() if is_remote(shard) else repeated_keys(shard)
        num_repeats = 0
        for raw in iterate_raw([shard], on_error=on_error):
            if raw.get(REPEATED):  # the record of the first place says it
                num_repeats += 1
                continue
            if raw["__key__"] in repeated:
                raw[REPEATED] = True
            yield _sample_record(name, raw)
        if num_repeats:
            _logger.warning(
                "%s: %d times a key occurs again, away from its first members; only adjacent "
                "members are one sample, so sort the tar by name (tar --sort=name)",
                *(shard, num_repeats),
            )


def _sample_record(shard: str, raw: dict[str, Any]) -> Record:
    raw["__url__"] = shard
    uri = place_of(raw)
    try:
        check_key(raw)
        sample = parse_sample(raw)
    except DataError as error:
        # A bad sample is a record that fails when it is read: counted, never lost.
        failure = error

        def fail() -> bytes:
            raise failure

        return Record(uri=uri, read=fail)
    if is_remote(shard):
        read = partial(bytes, sample.image)
    else:  # read again when asked for, so that a list of records stays small
        read = partial(read_image, shard, sample.key)
    return Record(uri, read, sample.captions, sample.label, sample.metadata)
