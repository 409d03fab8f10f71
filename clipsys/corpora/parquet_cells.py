"""Parquet tables: which columns hold images, their rows without the images, single images.

Which columns hold images is decided by the schema, never by the first row: bytes, or a struct
``{bytes, path}`` as Hugging Face's datasets write it, or lists of these. Where ``bytes`` is null,
``path`` names the file. The encoded images themselves are not read with the rows, as far as the
file's statistics say that no cell is empty.
"""

from __future__ import annotations

import functools
import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipsys.errors import DataError

if TYPE_CHECKING:
    import pyarrow

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class ImageCell:
    """One image of a row.

    Attributes:
        has_bytes: the encoded image stands in the cell.
        path: the file that the cell names.
    """

    has_bytes: bool
    path: str | None = None


@dataclass(frozen=True)
class ParquetRow:
    """One row: its number from 0, its cells without images, and the images of one column."""

    number: int
    cells: dict[str, Any]
    images: list[ImageCell] = field(default_factory=list)


class ParquetTable:
    """The schema of a table, and its rows.

    Attributes:
        names: names of all columns.
        image_names: names of the columns that hold images.
        list_names: names of the columns that hold lists of images.
        text_names: names of the columns that hold texts, and so may hold paths.
        class_names: names of numbered classes by column, as Hugging Face's datasets note them.
    """

    def __init__(self, path: Path) -> None:
        """Reads the schema.

        Raises:
            DataError: the file is not Parquet, or two columns share a name.
        """
        import pyarrow

        self._path = path
        try:
            schema = _schema(path, path.stat().st_mtime_ns)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: cannot be read as Parquet ({error})") from error
        self.names: list[str] = list(schema.names)
        repeated = sorted({name for name in self.names if self.names.count(name) > 1})
        if repeated:
            raise DataError(f"{path}: several columns are called {repeated[0]!r}; rename them")
        self._types = {name: schema.field(name).type for name in self.names}
        self.image_names = [name for name in self.names if _holds_images(self._types[name])]
        self.list_names = [
            name for name in self.image_names if _element_type(self._types[name]) is not None
        ]
        self.text_names = [name for name in self.names if _is_text(self._types[name])]
        self.class_names = _class_names(schema.metadata or {})

    def type_of(self, name: str) -> str:
        """The type of a column in a word, for messages."""
        kind = self._types[name]
        return "struct" if hasattr(kind, "fields") else str(kind).partition("<")[0]

    def rows(self, image: str | None) -> Iterator[ParquetRow]:
        """All rows.

        Args:
            image: the column whose images are read; None where there are none.

        Raises:
            DataError: the file is damaged.
        """
        import pyarrow
        import pyarrow.parquet

        others = [name for name in self.names if name not in self.image_names]
        number = 0
        try:
            with pyarrow.parquet.ParquetFile(self._path) as file:
                for group in range(file.num_row_groups):
                    is_full = image is not None and _is_full(file, group, image)
                    columns_read = others if image is None or is_full else [*others, image]
                    for cells, images in _batches(
                        file, group, columns_read, image, is_full=is_full
                    ):
                        yield ParquetRow(number, self._readable(cells), images)
                        number += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{self._path}: cannot be read as Parquet ({error})") from error

    def _readable(self, cells: dict[str, Any]) -> dict[str, Any]:
        for name, class_names in self.class_names.items():
            value = cells.get(name)
            if isinstance(value, int) and 0 <= value < len(class_names):
                cells[name] = class_names[value]
        for name, value in cells.items():
            if isinstance(value, float):
                cells[name] = _shortest(value, self._types[name])
            elif isinstance(value, dict | list):
                cells[name] = _without_bytes(value)
        return cells


def read_cell(path: Path, column: str, row: int, element: int | None = None) -> bytes:
    """The encoded image in one cell. Rows that follow one another are read together.

    Args:
        path: the table.
        column: the column of images.
        row: counted from 0.
        element: which one, where the cell is a list.

    Raises:
        DataError: the table cannot be read, or has no such cell any more.
    """
    import pyarrow

    gone = DataError(f"{path}#{row}: the table has no such row any more")
    try:
        ends = _row_group_ends(path, path.stat().st_mtime_ns)
        group = bisect_right(ends, row)
        if group == len(ends):
            raise gone
        first = ends[group - 1] if group else 0
        cell = _row_group(path, path.stat().st_mtime_ns, column, group)[row - first].as_py()
    except (pyarrow.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise DataError(f"{path}#{row}: cannot be read ({error})") from error
    if element is not None:
        if not isinstance(cell, list) or element >= len(cell):
            raise gone
        cell = cell[element]
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes):
        raise DataError(f"{path}#{row}: the cell of column {column!r} holds no image")
    return data


# ---- types -------------------------------------------------------------------------------------


def _is_binary(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    is_view = str(kind) == "binary_view"  # older versions of pyarrow know none
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or is_view)


def _is_text(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or str(kind) == "string_view")


def _is_image(kind: pyarrow.DataType) -> bool:
    """Encoded bytes, or a struct of bytes, a path or both; all-null bytes have the type null."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    if not types.is_struct(kind):
        return _is_binary(kind)
    fields = {kind.field(at).name: kind.field(at).type for at in range(kind.num_fields)}
    if "bytes" in fields:
        return _is_binary(fields["bytes"]) or (types.is_null(fields["bytes"]) and "path" in fields)
    return set(fields) == {"path"} and _is_text(fields["path"])


def _element_type(kind: pyarrow.DataType) -> pyarrow.DataType | None:
    from pyarrow import types

    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return kind.value_type if is_list else None


def _holds_images(kind: pyarrow.DataType) -> bool:
    element = _element_type(kind)
    return _is_image(kind if element is None else element)


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Names of numbered classes by column, as Hugging Face's datasets note them."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {
            name: list(map(str, feature["names"]))
            for name, feature in features.items()
            if feature.get("_type") == "ClassLabel" and "names" in feature
        }
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _shortest(value: float, kind: pyarrow.DataType) -> float:
    """0.1 of a float32 column as 0.1 and not as 0.10000000149011612."""
    import numpy as np
    from pyarrow import types

    if types.is_float32(kind):
        return float(str(np.float32(value)))
    return float(str(np.float16(value))) if types.is_float16(kind) else value


def _without_bytes(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: _without_bytes(one) for name, one in value.items() if not isinstance(one, bytes)
        }
    if isinstance(value, list):
        return [_without_bytes(one) for one in value if not isinstance(one, bytes)]
    return value


# ---- reading -----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def _schema(path: Path, mtime_ns: int) -> pyarrow.Schema:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        return file.schema_arrow


def _is_full(file: Any, group: int, column: str) -> bool:
    """Whether the statistics of a row group say that each cell of a column has its bytes."""
    about = file.metadata.row_group(group)
    for at in range(about.num_columns):
        leaf = about.column(at)
        if leaf.path_in_schema in (column, f"{column}.bytes"):
            known = leaf.statistics
            return bool(known is not None and known.has_null_count and known.null_count == 0)
    return False


def _batches(
    file: Any, group: int, columns_read: list[str], image: str | None, *, is_full: bool
) -> Iterator[tuple[dict[str, Any], list[ImageCell]]]:
    if not columns_read:
        for _ in range(file.metadata.row_group(group).num_rows):
            yield {}, [ImageCell(has_bytes=True)]
        return
    for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns_read):
        found: list[list[ImageCell]] = [[] for _ in range(batch.num_rows)]
        if is_full:
            found = [[ImageCell(has_bytes=True)] for _ in range(batch.num_rows)]
        elif image is not None:
            found = _image_cells(batch.column(image))
        cells = batch if image not in batch.schema.names else batch.drop_columns([image])
        rows = _rows(cells) if cells.num_columns else [{} for _ in found]
        yield from zip(rows, found, strict=True)


def _rows(cells: Any) -> list[dict[str, Any]]:
    """The rows of a batch; a cell that Python has no value for does not cost the others."""
    try:
        rows: list[dict[str, Any]] = cells.to_pylist()
        return rows
    except (ValueError, OverflowError):  # text that is not UTF-8; a date after the year 9999
        names = cells.schema.names
        columns = [[_any_value(cell) for cell in column] for column in cells.columns]
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _any_value(cell: Any) -> Any:
    """A cell's value; text that is not UTF-8 as file names are read, and otherwise what Arrow
    writes of it, or None.
    """
    import pyarrow
    from pyarrow import types

    try:
        return cell.as_py()
    except (ValueError, OverflowError):
        if types.is_string(cell.type) or types.is_large_string(cell.type):
            return cell.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")
        try:
            return cell.cast(pyarrow.string()).as_py()
        except (pyarrow.ArrowException, ValueError):
            return None


def _image_cells(column: Any) -> list[list[ImageCell]]:
    """The images of each row; nothing of them is copied but their paths."""
    import pyarrow.compute as pc
    from pyarrow import types

    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _element_type(column.type) is not None:
        return [[_image_cell(one) for one in row or []] for row in column.to_pylist()]
    bytes_column, paths = column, [None] * len(column)
    if types.is_struct(column.type):
        names = {column.type.field(at).name for at in range(column.type.num_fields)}
        if "path" in names:
            paths = pc.struct_field(column, "path").to_pylist()
        bytes_column = pc.struct_field(column, "bytes") if "bytes" in names else None
    if bytes_column is None or types.is_null(bytes_column.type):
        return [[ImageCell(has_bytes=False, path=path)] for path in paths]
    lengths = pc.binary_length(bytes_column).to_pylist()
    return [
        [ImageCell(length is not None and (length > 0 or path is None), path)]
        for length, path in zip(lengths, paths, strict=True)
    ]


def _image_cell(value: Any) -> ImageCell:
    if isinstance(value, dict):
        return ImageCell(isinstance(value.get("bytes"), bytes), value.get("path"))
    return ImageCell(isinstance(value, bytes))


@functools.lru_cache(maxsize=16)
def _row_group_ends(path: Path, mtime_ns: int) -> list[int]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        sizes = (file.metadata.row_group(at).num_rows for at in range(file.num_row_groups))
        return list(accumulate(sizes))


@functools.lru_cache(maxsize=2)
def _row_group(path: Path, mtime_ns: int, column: str, group: int) -> Any:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        return file.read_row_group(group, [column])[column]
