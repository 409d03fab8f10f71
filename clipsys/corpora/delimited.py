"""Rows of text tables: CSV and its relatives, and JSON Lines.

The encoding is UTF-8, or what a byte order mark says (Excel's "Unicode text" is UTF-16), or what
the caller names. Cells may be separated by commas, semicolons, tabs or vertical bars; the header
decides, or a first line ``sep=;`` as Excel writes it. Quotation marks are read strictly: one that
is not closed would silently swallow the rows that follow.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TextIO

from clipsys.corpora.columns import Columns, check_unique, is_known_name, plain_name
from clipsys.errors import ConfigError, DataError

_logger = logging.getLogger(__name__)

JSON_SUFFIXES = (".jsonl", ".ndjson")
_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_SEP_LINE = re.compile(r'"?sep=(.)"?[ ]*(\r\n|\r|\n|\Z)')
#: The longer ones first: the mark of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_HEAD_CHARACTERS = 1 << 16
#: The largest cell that the csv module takes; by itself it would refuse 131,073 characters.
_MAX_CELL = 2**31 - 1


@dataclass(frozen=True)
class Row:
    """One row of a table: its number, as messages give it, and its cells by column."""

    number: int
    cells: dict[str, Any]


@dataclass(frozen=True)
class _Dialect:
    delimiter: str
    skipped_lines: int = 0


def read_text_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """Reads the rows of a CSV, TSV or JSON Lines file; the number is the line a row begins in.

    Raises:
        ConfigError: there is no such encoding.
        DataError: the text is of another encoding, or not such a table.
    """
    encoding = _encoding_of(path, columns.encoding)
    with _explained(path, encoding, named=bool(columns.encoding)):
        if path.suffix.lower() in JSON_SUFFIXES:
            with path.open(encoding=encoding, newline="") as file:
                yield from _json_rows(path, file, columns)
            return
        dialect = _detect(path, encoding, columns)
        with path.open(encoding=encoding, newline="") as file:
            yield from _delimited_rows(path, file, dialect, columns)


# ---- encodings ---------------------------------------------------------------------------------


def _encoding_of(path: Path, asked: str) -> str:
    if asked:
        try:
            is_text = codecs.lookup(asked)._is_text_encoding
        except LookupError:
            is_text = False
        if not is_text:
            raise ConfigError(
                f"--encoding {asked}: there is no such text encoding; expected one such as utf-8, "
                "utf-16, cp1252 or latin-1"
            )
        return "utf-8-sig" if codecs.lookup(asked).name == "utf-8" else asked
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    found = next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8")
    if found in ("utf-16", "utf-32"):
        _say(path, f"read as {found.upper()}, as its first bytes say")
    return found


@contextmanager
def _explained(path: Path, encoding: str, *, named: bool) -> Iterator[None]:
    try:
        yield
    except UnicodeError as error:
        if named or encoding != "utf-8":
            raise DataError(f"{path}: cannot be read as {encoding} text ({error})") from error
        line, byte = _first_foreign_byte(path)
        if _holds_nul(path):
            raise DataError(
                f"{path}: is not UTF-8 text and holds NUL characters; UTF-16 text without a byte "
                "order mark needs --encoding utf-16-le or utf-16-be, and other files are no tables"
            ) from error
        raise DataError(
            f"{path}:{line}: is not UTF-8 text (byte 0x{byte:02x}); name its encoding, such as "
            "--encoding cp1252 for Windows in western Europe, or convert it: "
            f"iconv -f cp1252 -t utf-8 {path.name} > converted{path.suffix}"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _holds_nul(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" in file.read(_HEAD_CHARACTERS)


def _first_foreign_byte(path: Path) -> tuple[int, int]:
    """Line and value of the first byte that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return number, line[error.start]
    return 1, 0


# ---- separated cells ---------------------------------------------------------------------------


def _detect(path: Path, encoding: str, columns: Columns) -> _Dialect:
    """The character that separates the cells: its header has most of the known names."""
    with path.open(encoding=encoding, newline="") as file:
        head = file.read(_HEAD_CHARACTERS)
    usual = "\t" if path.suffix.lower() in (".tsv", ".tab") else ","
    if match := _SEP_LINE.match(head):
        dialect = _Dialect(match[1], 1)
    else:
        asked = {plain_name(name) for name in (columns.path, *columns.captions, columns.label)}

        def fitness(delimiter: str) -> tuple[int, int, bool]:
            names = _header_of(head, delimiter)
            known = sum(is_known_name(name) or plain_name(name) in asked for name in names if name)
            return known, len(names), delimiter == usual

        dialect = _Dialect(max(_NAMES, key=fitness))
    if dialect.delimiter != usual:
        name = _NAMES.get(dialect.delimiter, repr(dialect.delimiter))
        _say(path, f"cells are separated by {name}")
    return dialect


def _header_of(head: str, delimiter: str) -> list[str]:
    csv.field_size_limit(_MAX_CELL)
    reader = csv.reader(io.StringIO(head, newline=""), delimiter=delimiter)
    names: list[str] = next((row for row in reader if any(map(str.strip, row))), [])
    return [name.strip() for name in names]


def _delimited_rows(path: Path, file: TextIO, dialect: _Dialect, columns: Columns) -> Iterator[Row]:
    rows = _cells(path, file, dialect)
    _, header = next(rows, (1, []))
    if not header:
        raise DataError(f"{path}: is empty; expected a header that names the columns")
    names = [name.strip() or f"column_{place}" for place, name in enumerate(header, 1)]
    check_unique(path, names, columns)
    repeated = {name for name in names if names.count(name) > 1}
    for number, cells in rows:
        if any(cells[len(names) :]):
            raise DataError(
                f"{path}:{number}: more cells than the header has columns ({len(cells)} for "
                f"{len(names)}); a cell that holds {dialect.delimiter!r} needs quotation marks"
            )
        row: dict[str, Any] = dict(zip(names, cells, strict=False))
        for name in repeated:
            row[name] = [cell for other, cell in zip(names, cells, strict=False) if other == name]
        yield Row(number, row)


def _cells(path: Path, file: TextIO, dialect: _Dialect) -> Iterator[tuple[int, list[str]]]:
    """The line in which each row begins, and its cells, without rows that are blank."""
    csv.field_size_limit(_MAX_CELL)
    for _ in range(dialect.skipped_lines):
        file.readline()
    reader = csv.reader(file, delimiter=dialect.delimiter, strict=True)
    while True:
        line = dialect.skipped_lines + reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path}:{line}: {_csv_fault(str(error))}") from error
        cells = [cell.strip("\ufeff") if line == 1 else cell for cell in cells]
        if any("\0" in cell for cell in cells):
            raise DataError(
                f"{path}:{line}: holds a NUL character; UTF-16 text without a byte order mark "
                "needs --encoding utf-16-le or utf-16-be"
            )
        if any(cell.strip() for cell in cells):
            yield line, cells


def _csv_fault(fault: str) -> str:
    if "NUL" in fault:  # Python 3.10
        return "holds a NUL character; UTF-16 text needs --encoding utf-16-le or utf-16-be"
    return (
        "a cell begins with a quotation mark that does not end it (the row that begins here); "
        'close it, and write "" for a quotation mark inside a cell'
    )


# ---- JSON Lines --------------------------------------------------------------------------------


class _Repeated(dict[str, Any]):
    """A JSON object some of whose names occur several times."""

    pairs: Sequence[tuple[str, Any]] = ()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    repeated = _Repeated(pairs)
    repeated.pairs = pairs
    return repeated


def _json_rows(path: Path, file: TextIO, columns: Columns) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield Row(number, _json_row(path, number, line, columns))


def _json_row(path: Path, number: int, line: str, columns: Columns) -> dict[str, Any]:
    try:
        row = json.loads(line, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # also an integer of thousands of digits
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise DataError(f"{path}:{number}: not JSON ({reason})") from error
    if not isinstance(row, dict):
        raise DataError(
            f"{path}:{number}: expected a JSON object a line, found {type(row).__name__}"
        )
    if isinstance(row, _Repeated):
        names = [name for name, _ in row.pairs]
        check_unique(Path(f"{path}:{number}"), names, columns)
        for name in {name for name in names if names.count(name) > 1}:
            row[name] = [value for other, value in row.pairs if other == name]
    return row


@cache  # a table is read more than once: first it is counted
def _say(path: Path, what: str) -> None:
    _logger.info("%s: %s", path, what)
