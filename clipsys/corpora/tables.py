"""Tables of images: CSV, TSV, JSON Lines and Parquet, with a path or an image column.

What a column means is recognised by its name, unless `Columns` says it. Parquet may hold the
encoded images themselves. A row that cannot be used is a record that fails when it is read, so that
it is counted and the others are used; a table that cannot be understood is an error with its line.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import quote, unquote

from clipsys.corpora.columns import FETCH_FIRST, Columns, Roles, find_roles, is_path_name
from clipsys.corpora.delimited import JSON_SUFFIXES, Row, read_text_rows
from clipsys.corpora.parquet_cells import ImageCell, ParquetRow, ParquetTable, read_cell
from clipsys.corpora.real_paths import real_path
from clipsys.corpora.records import Record, file_record, text_record
from clipsys.errors import ConfigError, DataError

__all__ = [
    "TABLE_SUFFIXES",
    "Columns",
    "class_label_names",
    "iterate_table",
    "locate",
    "read_table_image",
]

#: What makes metadata of a cell.
_Clean: TypeAlias = Callable[[Any], Any]

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".tab")


def iterate_table(path: Path, columns: Columns) -> Iterator[Record]:
    """Reads a table as records; rows that name the same file are one.

    Raises:
        DataError: it cannot be read, has no rows, or its columns are not understood.
        ConfigError: its encoding is unknown, or named for a Parquet table.
    """
    records = _parquet_records if path.suffix.lower() == ".parquet" else _text_records
    return records(path, columns)


def locate(table: Path, cell: object) -> Path:
    """The file that a cell names, relative to the table's folder.

    Blanks around the name, backslashes and ``file://`` addresses are understood.

    Raises:
        DataError: the cell is empty, an address of the network, or no name of a file.
    """
    if isinstance(cell, dict):  # {"bytes": null, "path": "a.jpg"}, in JSON Lines too
        if cell.get("path") is None and cell.get("bytes") is not None:
            raise DataError("images inside JSON are not read; name a file, or use Parquet")
        cell = cell.get("path")
    if cell is None or cell == "":
        raise DataError("the row names no image")
    if isinstance(cell, list | bool):
        raise DataError(f"expected the path of a file, found {type(cell).__name__}")
    text = str(cell)
    if "\0" in text:
        raise DataError("the path holds a NUL character")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:  # half of a surrogate pair, from an escape in JSON
        raise DataError(f"the path {text!r} is not valid Unicode text") from None
    scheme, has_scheme, rest = text.strip().partition("://")
    if has_scheme and scheme.lower() == "file":
        host, slash, name = rest.partition("/")
        if host.lower() not in ("", "localhost") or not slash:
            raise DataError("a file:// address needs three slashes and an absolute path")
        return Path("/" + unquote(name, errors="surrogateescape"))
    if has_scheme and scheme.isalnum():
        raise DataError(FETCH_FIRST)
    forms = dict.fromkeys((text, text.strip(), text.strip().replace("\\", "/")))
    paths = [table.parent / Path(form).expanduser() for form in forms if form.strip()]
    if not paths:
        raise DataError("the row names no image")
    # Mostly there is one form. A name that really ends in a blank is taken as it is.
    return next((path for path in paths[:-1] if path.is_file()), paths[-1])


def read_table_image(table: Path, member: str) -> bytes:
    """Reads the image in a cell of a Parquet table again; ``member`` is what `_member` made.

    Raises:
        DataError: the table or the row is gone.
    """
    name, _, place = member.rpartition(":")
    row, _, element = place.partition(".")
    if not row.isdigit() or not (element.isdigit() or not element):
        raise DataError(f"{table}#{member}: the table has no such row any more")
    column = unquote(name) if name else _default_image(ParquetTable(table))
    if column is None:
        raise DataError(f"{table}#{member}: the table has no column of images any more")
    return read_cell(table, column, int(row), int(element) if element else None)


def class_label_names(path: Path, columns: Columns, label: str | None = None) -> list[str]:
    """The names of the classes of a Parquet table in their order, where its schema has them.

    Args:
        path: the table.
        columns: what its columns mean.
        label: the column that is the label; None: the one that is recognised.

    Raises:
        DataError: the table cannot be read, or its columns are not understood.
    """
    table = ParquetTable(path)
    name = label or _parquet_roles(path, table, columns).label
    return table.class_names.get(name or "", [])


# ---- text tables -------------------------------------------------------------------------------


def _text_records(path: Path, columns: Columns) -> Iterator[Record]:
    rows = list(read_text_rows(path, columns))
    if not rows:
        below = "" if path.suffix.lower() in JSON_SUFFIXES else " below the header"
        what = "text" if columns.without_images else "image"
        raise DataError(f"{path}: has no rows; expected one an {what}{below}")
    # In JSON Lines each row has names of its own.
    names = list(dict.fromkeys(name for row in rows for name in row.cells))
    roles = find_roles(path, names, columns)
    clean = _as_json if path.suffix.lower() in JSON_SUFFIXES else _as_cell
    if columns.without_images:
        yield from (_of_text(f"{path}#{row.number}", row.cells, roles, clean) for row in rows)
        return
    grouped: dict[Path, list[Row]] = {}
    files: dict[str, Path] = {}
    for row in rows:
        cell = row.cells.get(roles.path or "")
        key = str(cell)
        if key not in files:
            try:
                files[key] = real_path(locate(path, cell))
            except DataError as error:
                yield _unusable(f"{path}#{row.number}", error, row.cells, roles)
                continue
        grouped.setdefault(files[key], []).append(row)
    for file, group in grouped.items():
        yield _of_file(file, [row.cells for row in group], roles, clean)


def _as_json(value: Any) -> Any:
    return value


def _as_cell(text: Any) -> Any:
    """Cells that are plainly numbers become numbers, so that ``year >= 2020`` can be asked."""
    if not isinstance(text, str):
        return text
    text = text.strip()
    if not text or text[0] not in "-0123456789":
        return text
    if text.lstrip("-").isdigit():
        # 007 and 0012 are article numbers, not integers; thousands of digits are none either.
        return int(text) if len(text) < 20 and str(int(text)) == text else text
    try:
        number = float(text)
    except ValueError:
        return text
    return number if math.isfinite(number) and "e" not in text.lower() else text


# ---- Parquet -----------------------------------------------------------------------------------


def _parquet_records(path: Path, columns: Columns) -> Iterator[Record]:
    table = ParquetTable(path)
    if columns.encoding:
        raise ConfigError(f"{path}: the text of Parquet is UTF-8; leave out --encoding")
    roles = _parquet_roles(path, table, columns)
    grouped: dict[Path, list[dict[str, Any]]] = {}
    num_rows = 0
    for row in table.rows(roles.image):
        num_rows += 1
        if columns.without_images:
            yield _of_text(f"{path}#{row.number}", row.cells, roles, _as_json)
            continue
        for place, cell in enumerate(_images(row, roles)):
            element = place if roles.image in table.list_names else None
            member = _member(table, roles.image, row.number, element)
            if cell.has_bytes:
                assert roles.image is not None
                yield Record(
                    uri=f"{path}#{member}",
                    read=partial(read_cell, path, roles.image, row.number, element),
                    captions=_captions([row.cells], roles),
                    label=_label(row.cells, roles),
                    metadata=_metadata(row.cells, roles, _as_json),
                )
                continue
            try:
                grouped.setdefault(real_path(locate(path, cell.path)), []).append(row.cells)
            except DataError as error:
                yield _unusable(f"{path}#{member}", error, row.cells, roles)
    if not num_rows:
        raise DataError(f"{path}: has no rows; expected one an image")
    for file, group in grouped.items():
        yield _of_file(file, group, roles, _as_json)


def _images(row: ParquetRow, roles: Roles) -> list[ImageCell]:
    """The images of a row; where it has neither bytes nor a path, that of the path column."""
    if any(cell.has_bytes or cell.path for cell in row.images):
        return row.images
    return [ImageCell(has_bytes=False, path=row.cells.get(roles.path) if roles.path else None)]


def _parquet_roles(path: Path, table: ParquetTable, columns: Columns) -> Roles:
    names = table.names
    usable = (*table.image_names, *table.text_names)
    if not columns.path and not any(map(is_path_name, usable)):
        for name in filter(is_path_name, names):
            raise DataError(_wrong_type(path, table, name))
    roles = find_roles(path, names, columns, images=table.image_names, paths=table.text_names)
    if roles.path is not None and roles.path not in table.text_names:
        raise DataError(_wrong_type(path, table, roles.path))
    if roles.label is None:
        # A column of numbered classes, if there is just one, is the label whatever its name.
        numbered = [name for name in table.class_names if name in names]
        if len(numbered) == 1 and numbered[0] not in roles.used:
            roles = replace(roles, label=numbered[0])
    return roles


def _wrong_type(path: Path, table: ParquetTable, column: str) -> str:
    return (
        f"{path}: column {column!r} is of type {table.type_of(column)}; expected "
        "paths (text) or encoded images (binary)"
    )


def _member(table: ParquetTable, column: str | None, row: int, element: int | None) -> str:
    """A row, and where they are not clear, its column of images and which of a list it is."""
    is_default = column is None or column == _default_image(table)
    name = "" if is_default else f"{quote(str(column), safe='')}:"
    return f"{name}{row}" if element is None else f"{name}{row}.{element}"


def _default_image(table: ParquetTable) -> str | None:
    """The column of images that is meant where none is named."""
    images, paths = table.image_names, table.text_names
    try:
        return find_roles(Path(), table.names, Columns(), images=images, paths=paths).image
    except DataError:
        return None


# ---- records -----------------------------------------------------------------------------------


def _of_file(file: Path, rows: list[dict[str, Any]], roles: Roles, clean: _Clean) -> Record:
    return file_record(
        file,
        captions=_captions(rows, roles),
        label=_label(rows[0], roles),
        metadata=_metadata(rows[0], roles, clean),
    )


def _of_text(uri: str, row: dict[str, Any], roles: Roles, clean: _Clean) -> Record:
    return text_record(
        uri, _captions([row], roles), _label(row, roles), _metadata(row, roles, clean)
    )


def _unusable(uri: str, error: DataError, cells: dict[str, Any], roles: Roles) -> Record:
    """The record of a row that names no image: counted, never lost."""
    failure = DataError(f"{uri}: {error}")

    def fail() -> bytes:
        raise failure

    return Record(uri, fail, _captions([cells], roles), _label(cells, roles))


def _captions(rows: list[dict[str, Any]], roles: Roles) -> tuple[str, ...]:
    texts: list[str] = []
    for row in rows:
        for column in roles.captions:
            value = row.get(column)
            texts += ["" if one is None else str(one).strip() for one in _listed(value)]
    return tuple(dict.fromkeys(text for text in texts if text))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _label(row: dict[str, Any], roles: Roles) -> str | None:
    value = row.get(roles.label) if roles.label else None
    return str(value).strip() if value is not None and str(value).strip() else None


def _metadata(row: dict[str, Any], roles: Roles, clean: _Clean) -> dict[str, Any]:
    cells = {name: clean(value) for name, value in row.items() if name not in roles.used}
    return {name: value for name, value in cells.items() if value is not None and value != ""}
