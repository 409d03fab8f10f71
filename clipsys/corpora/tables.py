"""Tables of images: CSV, TSV, JSON lines and Parquet, with a path or a bytes column.

What a column means is recognised by its name, unless `Columns` says it. Parquet may hold the
encoded images themselves, as bytes or, as Hugging Face's datasets do, as ``{bytes, path}``.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from clipsys.corpora.parquet_cells import read_cell
from clipsys.corpora.records import Record, file_record
from clipsys.errors import DataError

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")

#: Column names, in lower case, that are taken for the path of the image, the first one found.
PATH_COLUMNS = (
    "path", "filepath", "file_path", "file", "filename", "file_name", "image_path", "image", "img",
    "uri", "image_file",
)  # fmt: skip
#: Column names that are taken for captions; so are ``caption_1``, ``caption_2`` and so on.
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "description", "sentence")
_NUMBERED_CAPTION = re.compile(r"caption_?\d+")
#: Column names that are taken for the class label.
LABEL_COLUMNS = ("label", "class", "cls")
#: Column names that are looked at first for the encoded image itself.
BYTES_COLUMNS = ("image_bytes", "bytes", "image", "jpg")


@dataclass(frozen=True)
class Columns:
    """Which columns of a table mean what; empty means: recognise them.

    ``path`` may also name a Parquet column of encoded images.
    """

    path: str = ""
    captions: tuple[str, ...] = ()
    label: str = ""


def iterate_table(path: Path, columns: Columns) -> Iterator[Record]:
    """Reads a table as records; rows that name the same file are one.

    Raises:
        DataError: it cannot be read, or its columns are not understood.
    """
    rows = _read_rows(path)
    first = next(rows, None)
    if first is None:
        return
    path_column = _find_column(path, first, columns.path, PATH_COLUMNS)
    bytes_column = (
        _bytes_column(first, named=path_column is not None)
        if not columns.path
        else path_column
        if _is_image(first.get(columns.path))
        else None
    )
    if path_column is None and bytes_column is None:
        raise DataError(
            f"{path}: no column names the image file; the columns are {', '.join(first)}; "
            f"expected one of {', '.join(PATH_COLUMNS)}"
        )
    roles = _Roles(
        path=None if path_column == bytes_column else path_column,
        bytes=bytes_column,
        captions=_caption_columns(path, first, columns.captions),
        label=_find_column(path, first, columns.label, LABEL_COLUMNS),
    )
    if bytes_column is not None:
        yield from _bytes_records(path, itertools.chain([first], rows), roles)
        return
    grouped: dict[str, list[dict[str, Any]]] = {}
    assert path_column is not None
    for row in (first, *rows):
        grouped.setdefault(str(row.get(path_column) or ""), []).append(row)
    for name, group in grouped.items():
        file = path.parent / Path(name).expanduser()
        captions = tuple(dict.fromkeys(text for row in group for text in roles.row_captions(row)))
        yield file_record(
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
            if name not in used and value not in (None, "") and not _is_image(value)
        }


def _bytes_records(path: Path, rows: Iterator[dict[str, Any]], roles: _Roles) -> Iterator[Record]:
    assert roles.bytes is not None
    for number, row in enumerate(rows):
        yield Record(
            uri=f"{path}#{number}",
            read=partial(read_cell, path, roles.bytes, number),
            captions=tuple(roles.row_captions(row)),
            label=roles.row_label(row),
            metadata=roles.row_metadata(row),
        )


def read_table_image(table: Path, row: str) -> bytes:
    """Reads the image in a row of a Parquet table again.

    Raises:
        DataError: the table or the row is gone.
    """
    column = _bytes_column(next(_read_rows(table), {}))
    if column is None or not row.isdigit():
        raise DataError(f"{table}#{row}: the table has no such row any more")
    return read_cell(table, column, int(row))


def _bytes_column(row: dict[str, Any], *, named: bool = False) -> str | None:
    """The column that holds encoded images: by its name, or else, if allowed, by its content."""
    holding = [name for name, value in row.items() if _is_image(value)]
    known = [name for name in BYTES_COLUMNS if name in holding]
    return next(iter(known or ([] if named else holding)), None)


def _is_image(value: object) -> bool:
    return isinstance(value, bytes) or (
        isinstance(value, dict) and isinstance(value.get("bytes"), bytes)
    )


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
            if name in by_lower and not _is_image(row[by_lower[name]])
        ),
        None,
    )


def _caption_columns(table: Path, row: dict[str, Any], asked: Sequence[str]) -> tuple[str, ...]:
    if asked:
        found = [_find_column(table, row, name, ()) for name in asked]
        return tuple(name for name in found if name)
    return tuple(
        name
        for name in row
        if name.lower() in CAPTION_COLUMNS or _NUMBERED_CAPTION.fullmatch(name.lower())
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
