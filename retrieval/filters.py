"""Conditions on metadata, turned into SQL with bound parameters.

    {"year": 2024}                      equality; a list means: one of these
    ["year>=2020", "colour=red"]        conditions as text, as on the command line
    Condition("tags", "contains", "sea")

All conditions must hold. Field names and values travel as parameters, never as SQL text. The fields
``uri`` and ``caption`` mean the item's own, every other name a key of its metadata.

Comparisons follow what people mean, whichever of a table's cells happened to be read as text: a
number equals its text (``2024`` and ``"2024"``), ordering is by number where both sides are numbers
and by text elsewhere, which puts ISO dates in order.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast, get_args

from clipsys.errors import QueryError

Operator = Literal["=", "!=", "<", "<=", ">", ">=", "in", "contains"]

_PATTERN = re.compile(
    r"\s*(?P<field>.+?)\s*(?:(?P<sign>!=|<=|>=|=|<|>)|\s(?P<word>in|contains)\s)\s*(?P<value>.*?)\s*",
    re.DOTALL,
)
#: Fields that mean a column of the item and not a metadata key.
ITEM_FIELDS = ("uri", "caption")

#: Keys that SQLite's JSON paths can name whichever way they are escaped in the text. Finding one
#: takes half as long as going through all of an item's keys.
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_ .:/-]+")

# A text counts as a number when it is one in JSON: '12', '-3.50', not '007' or '12 cm'. CASE fixes
# the order of evaluation: json_type() must not see text that is not JSON.
_IS_NUMBER = (
    "CASE WHEN entry.type IN ('integer', 'real') THEN 1 WHEN entry.type != 'text' THEN 0 "
    "WHEN json_valid(entry.value) THEN json_type(entry.value) IN ('integer', 'real') ELSE 0 END"
)


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


def to_sql(conditions: Sequence[Condition]) -> tuple[str, list[Any]]:
    """An SQL expression over the ``items`` table, and its parameters."""
    texts: list[str] = []
    parameters: list[Any] = []
    for condition in conditions:
        text, bound = _condition_sql(condition)
        texts.append(f"({text})")
        parameters += bound
    return " AND ".join(texts) or "1", parameters


def _condition_sql(condition: Condition) -> tuple[str, list[Any]]:
    if condition.operator == "!=":
        # "not red" includes items that have no colour at all.
        text, bound = _condition_sql(Condition(condition.field, "=", condition.value))
        return f"NOT ({text})", bound
    test, bound = _value_test(condition)
    if condition.field in ITEM_FIELDS:
        column = condition.field  # one of two constants, never a user's text
        row = f"SELECT {column} AS value, iif({column} IS NULL, 'null', 'text') AS type"
        return f"EXISTS (SELECT 1 FROM ({row}) AS entry WHERE {test})", bound
    if _PLAIN_KEY.fullmatch(condition.field):
        path = f'$."{condition.field}"'  # a parameter like all the rest
        row = "SELECT json_extract(metadata, ?) AS value, json_type(metadata, ?) AS type"
        found = f"SELECT 1 FROM ({row}) AS entry WHERE entry.type IS NOT NULL AND ({test})"
        if condition.operator == "=" and condition.value is None:
            return f"EXISTS ({found}) OR json_type(metadata, ?) IS NULL", [path, path, *bound, path]
        return f"EXISTS ({found})", [path, path, *bound]
    entries = "SELECT 1 FROM json_each(items.metadata) AS entry WHERE entry.key = ?"
    exists = f"EXISTS ({entries} AND ({test}))"
    if condition.operator == "=" and condition.value is None:  # null, or not there at all
        return f"{exists} OR NOT EXISTS ({entries})", [condition.field, *bound, condition.field]
    return exists, [condition.field, *bound]


def _value_test(condition: Condition) -> tuple[str, list[Any]]:
    """A test of ``entry``, a row with json_each's columns value and type, and its parameters."""
    operator, value = condition.operator, condition.value
    if operator == "in":
        tests = [_equals(one) for one in value]
        text = " OR ".join(f"({test})" for test, _ in tests) or "0"
        return text, [bound for _, some in tests for bound in some]
    if operator == "=":
        return _equals(value)
    if operator == "contains":
        # A list contains an equal element; a text contains a part of itself. Capitals do not count.
        # casefold() is Python's, registered by the store: SQLite's lower() knows ASCII only.
        elements = "SELECT 1 FROM json_each(entry.value) AS part WHERE casefold(part.value) = ?"
        part = "instr(casefold(CAST(entry.value AS TEXT)), ?) > 0"
        needle = _text(value).casefold()
        return (
            f"CASE entry.type WHEN 'array' THEN EXISTS ({elements}) WHEN 'null' THEN 0 "
            f"ELSE {part} END",
            [needle, needle],
        )
    number = _number(value)
    if number is None:
        return f"entry.type = 'text' AND entry.value {operator} ?", [_text(value)]
    by_number = f"CAST(entry.value AS NUMERIC) {operator} ?"
    return f"CASE WHEN {_IS_NUMBER} THEN {by_number} ELSE 0 END", [number]


def _equals(value: object) -> tuple[str, list[Any]]:
    if value is None:
        return "entry.type = 'null'", []
    if isinstance(value, bool) or (isinstance(value, str) and value.lower() in ("true", "false")):
        word = str(value).lower()
        return "entry.type = ? OR (entry.type = 'text' AND casefold(entry.value) = ?)", [word, word]
    by_text = "entry.type = 'text' AND entry.value = ?"
    number = _number(value)
    if number is None:
        return by_text, [_text(value)]
    by_number = f"CASE WHEN {_IS_NUMBER} THEN CAST(entry.value AS NUMERIC) = ? ELSE 0 END"
    return f"{by_number} OR ({by_text})", [number, _text(value)]


def _number(value: object) -> int | float | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    # SQLite binds 64-bit integers; beyond them, compare as it does itself, in floating point.
    return value if isinstance(value, float) or abs(value) < 2**63 else float(value)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
