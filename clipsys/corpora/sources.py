"""Corpora as users have them: folders, tables and shards, read as one stream of records.

    image       one file
    folder      every image below it; NAME.txt beside NAME.jpg is its captions, one a line, and
                NAME.json its metadata, as in a shard
    table       .csv .tsv .jsonl .parquet with a path (or bytes) column, captions and metadata
    shards      a .tar, a folder of .tar files, a glob or a {000..012} range

A record is cheap: the image's bytes are read only when they are needed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from clipsys.corpora.folders import image_record, iterate_folder
from clipsys.corpora.real_paths import forget_folders, real_path
from clipsys.corpora.records import Record, check_regular, read_file
from clipsys.corpora.tables import TABLE_SUFFIXES, Columns, iterate_table, read_table_image
from clipsys.errors import DataError
from clipsys.files.expansion import expand_path
from clipsys.images.decoding import EXTENSIONS
from clipsys.shards.random_access import repeated_keys
from clipsys.shards.reading import expand_shards, iterate_raw, read_image
from clipsys.shards.remote import is_remote
from clipsys.shards.samples import (
    REPEATED,
    check_key,
    parse_sample,
    place_of,
)

_logger = logging.getLogger(__name__)


def iterate_source(
    source: str | Path,
    *,
    columns: Columns = Columns(),
    exclude: Sequence[str] = (),
    require: bool = True,
    frames: bool = False,
    on_error: Callable[[str, Exception], None] | None = None,
) -> Iterator[Record]:
    """Reads an image, a folder, a table or shards as records, in a stable order.

    Whatever path leads to a file, its record has the real one as its uri. Rows of a table that name
    the same file are one record with several captions. A file that a table names and that is
    missing is a record whose ``read`` fails, so that it is counted.

    Args:
        source: path of an image, a folder, a table or a shard, or a shard glob or range.
        columns: what the columns of a table mean, where their names do not say it.
        exclude: patterns of what a folder leaves out; see `clipsys.corpora.folders`.
        require: raise when there is nothing at all.
        frames: the images of a folder are numbered frames; see `clipsys.corpora.folders`.
        on_error: called with a shard that breaks off and what happened; the next one follows.

    Raises:
        DataError: the source does not exist, holds no image, or its columns are not understood; a
            shard breaks off and ``on_error`` is not given; frames have no number.
    """
    forget_folders()
    kind = source_kind(source)
    path = Path(expand_path(str(source))).absolute()
    if frames and kind != "folder":
        raise DataError(
            f"{source}: --frames numbers the images of a folder of folders; give other sources "
            "metadata columns or keys for the sequence and the frame"
        )
    if kind == "image":
        records = iter([image_record(path)])
    elif kind == "folder":
        records = iterate_folder(path, exclude, frames=frames)
    elif kind == "table":
        records = _iterate_table(path, columns)
    else:
        records = _iterate_shards(source, on_error)
    first = next(records, None)
    if first is None:
        if require:
            raise DataError(_nothing_in(path, source, kind))
        return
    yield first
    yield from records


def _nothing_in(path: Path, source: str | Path, kind: str) -> str:
    if kind == "table":
        what = "no rows below its header" if path.stat().st_size else "nothing in it"
        return f"{source}: the table has {what}; expected a row an image"
    return f"{source}: no images (.jpg, .png, .webp, .heic, …) found; check the path"


def source_kind(source: str | Path) -> str:
    """Says whether a source is an ``image``, a ``folder``, a ``table`` or ``shards``.

    Raises:
        DataError: it does not exist, or it is none of them.
    """
    text = expand_path(str(source))
    if not text:  # an unset variable of a script must not mean the current folder
        raise DataError("a source is an empty text; name a folder, a table, shards or an image")
    path = Path(text)
    if path.is_dir():
        try:
            names = [name for name in os.listdir(path) if not name.startswith(".")]  # noqa: PTH208
        except OSError as error:
            raise DataError(f"{path}: the folder cannot be listed ({error.strerror})") from error
        has_tar = any(name.endswith(".tar") for name in names)
        has_image = any(Path(name).suffix.lower() in EXTENSIONS for name in names)
        return "shards" if has_tar and not has_image else "folder"
    suffix = path.suffix.lower()
    if suffix in TABLE_SUFFIXES:
        if not path.exists():
            raise DataError(f"{path}: there is no such table")
        return "table"
    if suffix in EXTENSIONS and path.exists():
        return "image"
    if suffix == ".tar" or any(c in text for c in "{*?[") or "://" in text:
        return "shards"
    if not path.exists():
        raise DataError(f"{path}: there is no such folder, table or shard")
    excel = (
        "; Excel's Unicode text is read when its name ends with .tsv" if suffix == ".txt" else ""
    )
    raise DataError(
        f"{path}: not a source of images; expected a folder, a table "
        f"({', '.join(TABLE_SUFFIXES)}), .tar shards or an image{excel}"
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
    if Path(container).suffix.lower() in TABLE_SUFFIXES and not Path(uri).exists():
        raise DataError(f"{uri}: the row names no image; mend the table and index it again")
    return read_file(Path(uri))


def _iterate_table(path: Path, columns: Columns) -> Iterator[Record]:
    """A table's records; the rows that hold images themselves are named by its real path."""
    check_regular(str(path))
    real = str(real_path(path))
    for record in iterate_table(path, columns):
        _, mark, row = record.uri.rpartition(f"{path}#")
        yield replace(record, uri=f"{real}#{row}") if mark and real != str(path) else record


def _iterate_shards(
    source: str | Path, on_error: Callable[[str, Exception], None] | None
) -> Iterator[Record]:
    for shard in expand_shards(source):
        try:
            check_regular(shard)
        except DataError as error:
            if on_error is None:
                raise
            on_error(shard, error)
            continue
        name = shard if is_remote(shard) else str(real_path(shard))
        repeated = frozenset() if is_remote(shard) else repeated_keys(shard)
        num_repeats = 0
        for raw in iterate_raw([shard], on_error=on_error):
            if raw.get(REPEATED):  # the record of the first place says it
                num_repeats += 1
                continue
            if raw["__key__"] in repeated:
                raw[REPEATED] = True
            yield sample_record(name, raw)
        if num_repeats:
            _logger.warning(
                "%s: %d times a key occurs again, away from its first members; only adjacent "
                "members are one sample, so sort the tar by name (tar --sort=name)",
                *(shard, num_repeats),
            )


def sample_record(shard: str, raw: dict[str, Any]) -> Record:
    """The record of a raw sample of a shard; of one that cannot be used, ``read`` fails."""
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
    else:  # read again when needed, so that a list of records stays small
        read = partial(read_image, shard, sample.key)
    return Record(uri, read, sample.captions, sample.label, sample.metadata)
