"""Conditions on metadata, and the SQL over the index of metadata that decides them.

    {"year": 2024}                      equality; a list means: one of these
    ["year>=2020", "colour=red"]        conditions as text, as on the command line
    Condition("tags", "contains", "sea")

All conditions must hold. Field names and values travel as parameters, never as SQL text. The fields
``uri`` and ``caption`` mean the item's own, every other name a key of its metadata.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias, cast, get_args

from clipsys.errors import QueryError
from clipsys.retrieval.storage.items import plain_text
from clipsys.retrieval.storage.metadata_index import LONG, MAX_VALUE_BYTES, entries_of, number_of
from clipsys.retrieval.storage.schema import sql_text

Operator = Literal["=", "!=", "<", "<=", ">", ">=", "in", "contains"]

_PATTERN = re.compile(
    r"\s*(?P<field>.+?)\s*(?:(?P<sign>!=|<=|>=|=|<|>)|\s(?P<word>in|contains)\s)\s*(?P<value>.*?)\s*",
    re.DOTALL,
)
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
#: Fields that mean a column of the item and not a metadata key.
ITEM_FIELDS = ("uri", "caption")


class _Test(NamedTuple):
    """A test of an entry that an index can answer, if any can."""

    text: str
    parameters: list[Any]
    by_number: bool = False


@dataclass(frozen=True)
class Condition:
    """``field operator value``; for ``in`` the value is a sequence.

    Raises:
        QueryError: the operator is unknown, or the value does not fit it.
    """

    field: str
    operator: Operator
    value: Any

    def __post_init__(self) -> None:
        if self.operator not in get_args(Operator):
            raise QueryError(
                f"filter on {self.field!r}: unknown operator {self.operator!r}; "
                f"expected one of {', '.join(get_args(Operator))}"
            )
        values = self.value if self.operator == "in" else [self.value]
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise QueryError(f"filter on {self.field!r}: `in` expects a list, found {values!r}")
        for value in values:
            if not isinstance(value, str | bool | int | float | None):
                raise QueryError(
                    f"filter on {self.field!r}: {value!r} is {type(value).__name__}; "
                    "expected text, a number, true, false or null"
                )


Where: TypeAlias = "Mapping[str, Any] | Sequence[str | Condition] | str | Condition | None"


def parse_condition(text: str) -> Condition:
    """Reads ``K=V``, ``K>=V`` and so on, ``K in A,B`` or ``K contains V``.

    Raises:
        QueryError: it is none of these.
    """
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise QueryError(
            f"filter {text!r} is not understood; expected KEY=VALUE, or one of "
            "!= < <= > >= in contains between key and value"
        )
    field, value = match["field"], match["value"]
    if match["word"] == "in":
        return Condition(field, "in", [part.strip() for part in value.split(",")])
    operator = cast(Operator, match["word"] or match["sign"])
    return Condition(field, operator, value)


def parse_where(where: Where) -> tuple[Condition, ...]:
    """Brings every accepted form of filter into conditions."""
    if where is None:
        return ()
    if isinstance(where, str):
        return (parse_condition(where),)
    if isinstance(where, Condition):
        return (where,)
    if isinstance(where, Mapping):
        return tuple(
            Condition(key, "in", list(value))
            if isinstance(value, list | tuple | set | frozenset)
            else Condition(key, "=", value)
            for key, value in where.items()
        )
    return tuple(parse_condition(part) if isinstance(part, str) else part for part in where)


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
        return replace(_select(condition.field, [_Test("entry.type != 'null'", [])]), excluded=True)
    return _select(condition.field, _tests(condition), _may_be_long(condition))


def _select(field: str, tests: Sequence[_Test], may_be_long: bool = False) -> Selection:
    if field in ITEM_FIELDS:
        return _select_by_column(field, tests)
    name = plain_text(field)
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
    return Selection(" UNION ALL ".join(selects) or _NOTHING, tuple(parameters))


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
            tests.append(_Test("entry.type = 'element' AND entry.number = ?", [number], True))
        return tests
    if number is None:
        return [_Test(f"entry.type = 'text' AND entry.value {operator} ?", [_text(value)])]
    return [_Test(f"entry.type != 'element' AND entry.number {operator} ?", [number], True)]


def _equals(values: Sequence[object]) -> list[_Test]:
    """Tests for being equal to one of several values."""
    tests: list[_Test] = []
    others = [one for one in values if one is not None and not _is_truth(one)]
    texts = [_text(one) for one in others]
    numbers = [number for one in others if (number := _number(one)) is not None]
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


def _marks(values: Sequence[object]) -> str:
    return ",".join("?" * len(values))
