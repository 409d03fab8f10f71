"""Corpora as users have them: folders, tables and shards, read as one stream of records.

    folder      every image below it; NAME.txt beside NAME.jpg is its captions, one a line
    table       .csv .tsv .jsonl .parquet with a path (or bytes) column, captions and metadata
    shards      a .tar, a folder of .tar files, a glob or a {000..012} range

A record is cheap: the image's bytes are read only when asked for.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from clipsys.errors import DataError
from clipsys.images import EXTENSIONS
from clipsys.parquet_cells import read_cell
from clipsys.remote import is_remote
from clipsys.shards import Sample, expand_shards, iterate_raw, parse_sample, read_image

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")

#: Column names, in lower case, that are taken for the path of the image, the first one found.
PATH_COLUMNS = (
    "path", "filepath", "file_path", "file", "filename", "file_name", "image_path", "image", "img",
    "uri", "image_file",
)  # fmt: skip
#: Column names that are taken for captions; so are ``caption_1``, ``caption_2`` and so on.
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "description", "sentence")
#: Column names that are taken for the class label.
LABEL_COLUMNS = ("label", "class", "cls")
#: Column names that may hold the encoded image itself.
BYTES_COLUMNS = ("image_bytes", "bytes", "image", "jpg")


@dataclass(frozen=True)
class Record:
    """One image of a corpus and what is known of it.

    Attributes:
        uri: absolute path of the file, ``/abs/shard.tar#KEY`` or ``/abs/table.parquet#ROW``.
        read: returns the encoded image; raises `DataError` if it is gone.
        captions: all of them, the most important first.
        label: class label; in a folder, the name of the subfolder.
        metadata: other columns or fields, with JSON values.
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


@dataclass(frozen=True)
class Columns:
    """Which columns of a table mean what; empty means: recognise them by their names."""

    path: str = ""
    captions: tuple[str, ...] = ()
    label: str = ""


def iterate_source(
    source: str | Path, *, columns: Columns = Columns(), require: bool = True
) -> Iterator[Record]:
    """Reads a folder, a table or shards as records, in a stable order.

    Rows of a table that name the same file are one record with several captions. A file that a
    table names and that is missing is a record whose ``read`` fails, so that it is counted.

    Args:
        source: path of a folder, a table or a shard, or a shard glob or range.
        columns: what the columns of a table mean, where their names do not say it.
        require: raise when there is nothing at all.

    Raises:
        DataError: the source does not exist, holds no image, or its columns are not understood.
    """
    kind = source_kind(source)
    if kind == "folder":
        records = _iterate_folder(Path(source).expanduser().absolute())
    elif kind == "table":
        records = _iterate_table(Path(source).expanduser().absolute(), columns)
    else:
        records = _iterate_shards(source)
    first = next(records, None)
    if first is None:
        if require:
            endings = "images (.jpg, .png, .webp, .heic, …)"
            raise DataError(f"{source}: no {endings} found; check the path")
        return
    yield first
    yield from records


def source_kind(source: str | Path) -> str:
    """Says whether a source is a ``folder``, a ``table`` or ``shards``.

    Raises:
        DataError: it does not exist, or it is none of the three.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        names = [name for name in os.listdir(path) if not name.startswith(".")]  # noqa: PTH208
        has_tar = any(name.endswith(".tar") for name in names)
        has_image = any(Path(name).suffix.lower() in EXTENSIONS for name in names)
        return "shards" if has_tar and not has_image else "folder"
    if path.suffix.lower() in TABLE_SUFFIXES:
        if not path.is_file():
            raise DataError(f"{path}: there is no such table")
        return "table"
    text = str(source)
    if path.suffix == ".tar" or any(c in text for c in "{*?") or "://" in text:
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
        column = _bytes_column(next(_read_rows(Path(container)), {}))
        if column is None or not member.isdigit():
            raise DataError(f"{uri}: the table has no such row any more")
        return read_cell(Path(container), column, int(member))
    return _read_file(Path(uri))


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path}: cannot be read ({reason})") from error


def _iterate_folder(root: Path) -> Iterator[Record]:
    for path in _walk(root):
        parent = path.parent.relative_to(root)
        yield _file_record(
            path,
            captions=_side_captions(path),
            label=parent.parts[0] if parent.parts else None,
        )


def _walk(root: Path) -> Iterator[Path]:
    """Image files below a folder in sorted order; follows links, but no folder twice."""
    visited: set[tuple[int, int]] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        status = os.stat(folder)  # noqa: PTH116
        if (status.st_dev, status.st_ino) in visited:
            subfolders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            if Path(name).suffix.lower() in EXTENSIONS and not name.startswith("."):
                yield Path(folder) / name


def _side_captions(path: Path) -> tuple[str, ...]:
    beside = path.with_suffix(".txt")
    try:
        lines = beside.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()
    return tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))


def _file_record(
    path: Path,
    *,
    captions: tuple[str, ...] = (),
    label: str | None = None,
    metadata: dict[str, Any] | None = None,
) -> Record:
    size: int | None = None
    mtime: int | None = None
    with contextlib.suppress(OSError):
        status = path.stat()
        size, mtime = status.st_size, status.st_mtime_ns
    return Record(
        uri=str(path),
        read=lambda: _read_file(path),
        captions=captions,
        label=label,
        metadata=metadata or {},
        size_bytes=size,
        mtime_ns=mtime,
    )


def _iterate_shards(source: str | Path) -> Iterator[Record]:
    for shard in expand_shards(source):
        name = shard if is_remote(shard) else str(Path(shard).absolute())
        for raw in iterate_raw([shard]):
            yield _sample_record(name, raw)


def _sample_record(shard: str, raw: dict[str, Any]) -> Record:
    uri = f"{shard}#{raw['__key__']}"
    try:
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


def _iterate_table(path: Path, columns: Columns) -> Iterator[Record]:
    rows = _read_rows(path)
    first = next(rows, None)
    if first is None:
        return
    path_column = _find_column(path, first, columns.path, PATH_COLUMNS)
    bytes_column = _bytes_column(first)
    if path_column is None and bytes_column is None:
        raise DataError(
            f"{path}: no column names the image file; the columns are {', '.join(first)}; "
            f"expected one of {', '.join(PATH_COLUMNS)}"
        )
    roles = _Roles(
        path=path_column,
        bytes=bytes_column,
        captions=_caption_columns(path, first, columns.captions),
        label=_find_column(path, first, columns.label, LABEL_COLUMNS),
    )
    if bytes_column is not None:
        yield from _bytes_records(path, [first], rows, roles)
        return
    grouped: dict[str, list[dict[str, Any]]] = {}
    assert path_column is not None
    for row in (first, *rows):
        grouped.setdefault(str(row.get(path_column) or ""), []).append(row)
    for name, group in grouped.items():
        file = path.parent / Path(name).expanduser()
        captions = tuple(dict.fromkeys(text for row in group for text in roles.row_captions(row)))
        yield _file_record(
            file,
            captions=captions,
            label=roles.row_label(group[0]),
            metadata=roles.row_metadata(group[0]),
        )


@dataclass(frozen=True)
class _Roles:
    path: str | None
    bytes: str | None
    captions: tuple[str, ...]
    label: str | None

    def row_captions(self, row: dict[str, Any]) -> list[str]:
        texts: list[str] = []
        for column in self.captions:
            value = row.get(column)
            texts += [str(v) for v in value] if isinstance(value, list) else [str(value or "")]
        return [text.strip() for text in texts if text.strip()]

    def row_label(self, row: dict[str, Any]) -> str | None:
        value = row.get(self.label) if self.label else None
        return None if value is None else str(value)

    def row_metadata(self, row: dict[str, Any]) -> dict[str, Any]:
        used = {self.path, self.bytes, self.label, *self.captions}
        return {
            name: value
            for name, value in row.items()
            if name not in used and value not in (None, "") and not isinstance(value, bytes)
        }


def _bytes_records(
    path: Path, head: list[dict[str, Any]], rows: Iterator[dict[str, Any]], roles: _Roles
) -> Iterator[Record]:
    assert roles.bytes is not None
    number = 0
    for source in (head, rows):
        for row in source:
            yield Record(
                uri=f"{path}#{number}",
                read=partial(read_cell, path, roles.bytes, number),
                captions=tuple(roles.row_captions(row)),
                label=roles.row_label(row),
                metadata=roles.row_metadata(row),
            )
            number += 1


def _bytes_column(row: dict[str, Any]) -> str | None:
    return next((name for name in BYTES_COLUMNS if isinstance(row.get(name), bytes)), None)


def _find_column(table: Path, row: dict[str, Any], asked: str, known: Sequence[str]) -> str | None:
    if asked:
        if asked not in row:
            raise DataError(f"{table}: no column {asked!r}; the columns are {', '.join(row)}")
        return asked
    by_lower = {name.lower(): name for name in row}
    return next(
        (
            by_lower[name]
            for name in known
            if name in by_lower and not isinstance(row[by_lower[name]], bytes)
        ),
        None,
    )


def _caption_columns(table: Path, row: dict[str, Any], asked: Sequence[str]) -> tuple[str, ...]:
    if asked:
        found = [_find_column(table, row, name, ()) for name in asked]
        return tuple(name for name in found if name)
    numbered = ("caption_", "caption")
    return tuple(
        name
        for name in row
        if name.lower() in CAPTION_COLUMNS
        or any(name.lower().removeprefix(prefix).isdigit() for prefix in numbered)
    )


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if suffix in (".jsonl", ".ndjson"):
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _json_row(path, number, line)
                return
            reader = csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ",")
            for number, row in enumerate(reader, 2):
                if None in row:
                    raise DataError(f"{path}:{number}: more cells than the header has columns")
                yield {name: _number(value) for name, value in row.items()}
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from error


def _json_row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{number}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
    return row


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error})") from error


def _number(text: str | None) -> Any:
    """CSV cells that are plainly numbers become numbers, so that ``year >= 2020`` can be asked."""
    if text is None or not text or text != text.strip() or text[0] not in "-0123456789":
        return text
    if text.lstrip("-").isdigit():
        # 007 and 0012 are article numbers, not integers.
        return int(text) if str(int(text)) == text else text
    try:
        number = float(text)
    except ValueError:
        return text
    return number if math.isfinite(number) and "e" not in text.lower() else text


def to_sample(record: Record, key: str) -> Sample:
    """Reads a record's image and makes it a shard sample.

    Raises:
        DataError: the image cannot be read.
    """
    suffix = Path(record.uri.rpartition("#")[0] or record.uri).suffix.lower().lstrip(".")
    if f".{suffix}" not in EXTENSIONS:
        suffix = "jpg"  # a shard or table member: the ending only has to say "image"
    return Sample(key, record.read(), suffix, record.captions, record.label, record.metadata)
