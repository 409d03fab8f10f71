"""The SQL that decides conditions on metadata, over the index of metadata.

A condition becomes tests of an *entry*: a type, a value and what it is as a number; a list has an
entry for each of its elements besides. They are tried on the distinct values of the key
(`metadata_index`), by a seek where the operator allows it, and on the items themselves only where
values are too long to stand there. ``uri`` and ``caption`` are columns of the items.

Comparisons follow what people mean, whichever of a table's cells happened to be read as text: a
number equals its text (``2024`` and ``"2024"``), ordering is by number where both sides are numbers
and by text elsewhere, which puts ISO dates in order.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from clipsys.retrieval.storage.conditions import (
    ITEM_FIELDS,
    Condition,
    Operator,
    Where,
    parse_condition,
    parse_where,
)
from clipsys.retrieval.storage.items import plain_text
from clipsys.retrieval.storage.metadata_index import (
    LONG,
    MAX_VALUE_BYTES,
    entries_below,
    entries_of,
    number_of,
)
from clipsys.retrieval.storage.schema import sql_text

__all__ = [
    "Condition",
    "Operator",
    "Selection",
    "Where",
    "parse_condition",
    "parse_where",
    "to_selection",
]

_DATE = re.compile(r"\d{4}-\d\d(-\d\d)?")
_MOMENT = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d.*")
#: SQL: a text that begins with a year and a month.
_IS_DATE = "entry.type = 'text' AND entry.value GLOB '[12][0-9][0-9][0-9]-[01][0-9]*'"
_NOTHING = "SELECT 0 WHERE 0"
_ITEMS_OF = (
    "SELECT posting.item FROM metadata_values AS entry {index} "
    "CROSS JOIN metadata_postings AS posting ON posting.value = entry.id "
    "WHERE entry.key = (SELECT id FROM metadata_keys WHERE key = ?) AND ({test})"
)
#: The planner has no statistics, and takes a scan of the key for as good.
_BY_NUMBER = "INDEXED BY metadata_numbers"
# lower() knows ASCII only, and is much faster than casefold(), which is Python's. A text of as many
# bytes as characters is ASCII.
_FOLDED = (
    "CASE WHEN length(CAST(entry.value AS BLOB)) = length(entry.value) THEN lower(entry.value) "
    "ELSE casefold(CAST(entry.value AS BLOB)) END"
)
#: Types whose text is searched for a part.
_WITH_PARTS = "('text', 'integer', 'real', 'true', 'false', 'object')"


class _Test(NamedTuple):
    """A test of an entry that an index can answer, if any can."""

    text: str
    parameters: list[Any]
    by_number: bool = False


_PRESENT = _Test("entry.type != 'null'", [])


@dataclass(frozen=True)
class Selection:
    """A statement that gives ids of live items, perhaps repeatedly, and what they are.

    Attributes:
        statement: SQL; field names and values are among the parameters.
        parameters: in their order.
        excluded: the condition holds for all other items.
    """

    statement: str
    parameters: tuple[Any, ...]
    excluded: bool = False


def to_selection(condition: Condition) -> Selection:
    """How a condition is decided."""
    if condition.operator == "!=":
        # "not red" includes items that have no colour at all.
        found = to_selection(Condition(condition.field, "=", condition.value))
        return replace(found, excluded=not found.excluded)
    if condition.operator == "=" and condition.value is None:  # null, or not there at all
        return replace(_select(condition.field, [_PRESENT]), excluded=True)
    return _select(condition.field, _tests(condition), _may_be_long(condition))


def _select(field: str, tests: Sequence[_Test], may_be_long: bool = False) -> Selection:
    if field in ITEM_FIELDS:
        return _select_by_column(field, tests)
    name = plain_text(field)
    tests = [test._replace(parameters=[_plain(one) for one in test.parameters]) for test in tests]
    selects: list[str] = []
    parameters: list[Any] = []
    for test in tests:
        selects.append(_ITEMS_OF.format(index=_BY_NUMBER if test.by_number else "", test=test.text))
        parameters += [name, *test.parameters]
    if may_be_long and tests:
        long = _ITEMS_OF.format(index="", test=f"entry.type = '{LONG}'")
        together = " OR ".join(f"({test.text})" for test in tests)
        selects.append(
            f"SELECT items.id FROM ({long}) AS found CROSS JOIN items ON items.id = found.item "
            f"WHERE EXISTS (SELECT 1 FROM ({entries_of('items')}) AS entry "
            f"WHERE entry.key = ? AND ({together}))"
        )
        parameters += [name, name, *(one for test in tests for one in test.parameters)]
    if tests and (below := split_path(name)) is not None:
        key, path, last = below
        structs = _ITEMS_OF.format(index="", test=f"entry.type IN ('object', '{LONG}')")
        together = " OR ".join(f"({test.text})" for test in tests)
        selects.append(
            f"SELECT items.id FROM ({structs}) AS found CROSS JOIN items ON items.id = found.item "
            f"WHERE EXISTS (SELECT 1 FROM ({entries_below('items')}) AS entry "
            f"WHERE entry.key = ? AND ({together}))"
        )
        parameters += [key, path, path, last, *(one for test in tests for one in test.parameters)]
    return Selection(" UNION ALL ".join(selects) or _NOTHING, tuple(parameters))


def split_path(field: str) -> tuple[str, str, str] | None:
    """``a.b.c`` as the key ``a``, the JSON path of ``a.b`` and the field ``c``; None if it is none.

    A field of a struct. A key that holds the dots itself is found besides.
    """
    names = field.split(".")
    if len(names) < 2 or not all(names) or '"' in field:
        return None
    path = "".join(f'."{name}"' for name in names[:-1])
    return names[0], f"${path}", names[-1]


def _select_by_column(column: str, tests: Sequence[_Test]) -> Selection:
    # One of two constants, never a user's text.
    index = "INDEXED BY items_live_uri" if column == "uri" else "NOT INDEXED"
    row = f"SELECT id, {column} AS value, iif({column} IS NULL, 'null', 'text') AS type"
    rows = f"({row} FROM items {index} WHERE state = 'live') AS row"
    source = f"(SELECT id, value, type, {number_of('row')} AS number FROM {rows}) AS entry"
    selects = [f"SELECT entry.id FROM {source} WHERE {test.text}" for test in tests]
    # A file name that is not UTF-8 is a blob of its bytes in the database.
    parameters = [
        sql_text(one) if isinstance(one, str) else one for test in tests for one in test.parameters
    ]
    return Selection(" UNION ALL ".join(selects) or _NOTHING, tuple(parameters))


def _tests(condition: Condition) -> list[_Test]:
    """An entry passes if it passes one of them."""
    operator, value = condition.operator, condition.value
    if operator == "in":
        return _equals(value)
    if operator == "=":
        return _equals([value])
    number = _number(value)
    if operator == "contains":
        # A list contains an equal element; a text contains a part of itself. Capitals do not count.
        needle = _text(value).casefold()
        tests = [
            _Test(f"entry.type = 'element' AND {_FOLDED} = ?", [needle]),
            _Test(f"entry.type IN {_WITH_PARTS} AND instr({_FOLDED}, ?) > 0", [needle]),
        ]
        if number is not None:
            numbers = _same_numbers([number])
            test = f"entry.number IN ({_marks(numbers)})"
            tests.append(_Test(f"entry.type = 'element' AND {test}", numbers, True))
        return tests
    if number is None:
        return [_in_order_as_text(operator, _text(value))]
    return _in_order_as_number(operator, number)


def _in_order_as_text(operator: Operator, text: str) -> _Test:
    if _DATE.fullmatch(text):
        beginning = f"substr(entry.value, 1, {len(text)})"
        return _Test(f"entry.type = 'text' AND {beginning} {operator} ?", [text])
    if _MOMENT.fullmatch(text):
        return _Test(f"entry.type = 'text' AND {_SPACED} {operator} ?", [text.replace("T", " ", 1)])
    return _Test(f"entry.type = 'text' AND entry.value {operator} ?", [text])


#: SQL: a date and a time with a blank between them, as some write them and others with a T.
_SPACED = "(replace(substr(entry.value, 1, 11), 'T', ' ') || substr(entry.value, 12))"


def _in_order_as_number(operator: Operator, number: int | float) -> list[_Test]:
    both = _same_numbers([number])
    # 0.1 of 32 bits is a little more than 0.1: `<=` and `>=` include it, `<` and `>` do not.
    bound = max(both) if operator in ("<=", ">") else min(both)
    return [_Test(f"entry.type != 'element' AND entry.number {operator} ?", [bound], True)]


def _same_numbers(numbers: Sequence[int | float]) -> list[int | float]:
    """Numbers, and what 32 bits keep of those that are not whole."""
    kept: list[int | float] = []
    for number in numbers:
        kept.append(number)
        if isinstance(number, float) and number != int(number) and abs(number) < 3.4e38:
            kept.append(struct.unpack("f", struct.pack("f", number))[0])
    return list(dict.fromkeys(kept))


def _equals(values: Sequence[object]) -> list[_Test]:
    """Tests for being equal to one of several values."""
    tests: list[_Test] = []
    others = [one for one in values if one is not None and not _is_truth(one)]
    texts = [_text(one) for one in others]
    numbers = _same_numbers([number for one in others if (number := _number(one)) is not None])
    words = sorted({str(one).lower() for one in values if _is_truth(one)})
    if texts:
        tests.append(_Test(f"entry.type = 'text' AND entry.value IN ({_marks(texts)})", texts))
    if numbers:
        test = f"entry.number IS NOT NULL AND entry.number IN ({_marks(numbers)})"
        tests.append(_Test(f"entry.type != 'element' AND {test}", numbers, True))
    if words:
        tests.append(_Test(f"entry.type IN ({_marks(words)})", words))
        tests.append(_Test(f"entry.type = 'text' AND {_FOLDED} IN ({_marks(words)})", words))
    if None in values:
        tests.append(_Test("entry.type = 'null'", []))
    for text in texts:
        if _DATE.fullmatch(text):
            next_one = f"substr(entry.value, {len(text) + 1}, 1) IN ('-', 'T', ' ')"
            beginning = f"substr(entry.value, 1, {len(text)}) = ?"
            tests.append(_Test(f"{_IS_DATE} AND {beginning} AND {next_one}", [text]))
        elif _MOMENT.fullmatch(text):
            spaced = text.replace("T", " ", 1)
            tests.append(_Test(f"{_IS_DATE} AND {_SPACED} = ?", [spaced]))
    return tests


def _is_truth(value: object) -> bool:
    return isinstance(value, bool) or (
        isinstance(value, str) and value.lower() in ("true", "false")
    )


def _may_be_long(condition: Condition) -> bool:
    """Whether a value that is too long for the index may pass; numbers never are."""
    if condition.operator in ("=", "in"):
        values = condition.value if condition.operator == "in" else [condition.value]
        return any(
            isinstance(one, str) and len(one.encode("utf-8", "replace")) > MAX_VALUE_BYTES
            for one in values
        )
    return condition.operator == "contains" or _number(condition.value) is None


def _number(value: object) -> int | float | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:  # also thousands of digits
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if abs(value) < 2**63:
        return value
    try:  # SQLite binds 64-bit integers; beyond them, compare as it does itself, in floating point
        return float(value)
    except OverflowError:
        return math.copysign(math.inf, value)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _plain(parameter: object) -> object:
    """A parameter as metadata are stored: without lone surrogates."""
    return plain_text(parameter) if isinstance(parameter, str) else parameter


def _marks(values: Sequence[object]) -> str:
    return ",".join("?" * len(values))
