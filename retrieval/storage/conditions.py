"""Conditions on metadata, and how they are written.

    {"year": 2024}                      equality; a list means: one of these
    ["year>=2020", "colour=red"]        conditions as text, as on the command line
    Condition("tags", "contains", "sea")

All conditions must hold. As text a condition is a key, an operator and a value:

    colour=Blue                  also != < <= > >= and "title contains dog"
    colour in Blue,Red           one of several, separated by commas
    brand in "Annas, Ltd",Nike   quotation marks around what holds commas
    "sign in"="say ""hi"" "      around keys too; a quotation mark inside is doubled
    season is missing            null, or not there at all; the same as season=null
    season is present            the same as season!=null
    size.width>=100              a field of a struct

Blanks around keys and values do not count, except in quotation marks. ``"null"`` in quotation marks
is the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast, get_args

from clipsys.errors import QueryError

Operator = Literal["=", "!=", "<", "<=", ">", ">=", "in", "contains"]

_OPERATOR = re.compile(
    r"\s*(?:(?P<sign>!=|<=|>=|==|=|<|>)|(?<=\s)(?P<word>in|contains)\s"
    r"|(?<=\s)is\s+(?P<state>missing|present)\s*$)",
    re.IGNORECASE,
)
_QUOTED = re.compile(r'\s*"((?:[^"]|"")*)"\s*')
#: Fields that mean a column of the item and not a metadata key.
ITEM_FIELDS = ("uri", "caption")


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

    def __str__(self) -> str:
        if self.value is None and self.operator in ("=", "!="):
            return f"{self.field} is {'missing' if self.operator == '=' else 'present'}"
        if self.operator == "in":
            return f"{self.field} in {','.join(map(str, self.value))}"
        blank = " " if self.operator == "contains" else ""
        return f"{self.field}{blank}{self.operator}{blank}{self.value}"


Where: TypeAlias = "Mapping[str, Any] | Sequence[str | Condition] | str | Condition | None"


def parse_condition(text: str) -> Condition:
    """Reads one condition; see above.

    Raises:
        QueryError: it is none.
    """
    field, rest = _key(text)
    match = _OPERATOR.match(rest)
    if match is None or not field:
        raise QueryError(
            f"filter {text!r} is not understood; expected KEY=VALUE, one of != < <= > >= in "
            "contains between key and value, or KEY is missing, KEY is present"
        )
    if match["state"]:
        return Condition(field, "=" if match["state"].lower() == "missing" else "!=", None)
    operator = cast(Operator, (match["word"] or match["sign"].replace("==", "=")).lower())
    value = rest[match.end() :]
    _check_operator(text, operator, value)
    if operator == "in":
        return Condition(field, "in", list(_listed(text, value)))
    return Condition(field, operator, _value(text, value, may_be_null=operator in ("=", "!=")))


def _check_operator(text: str, operator: str, value: str) -> None:
    """Refuses what would be read as another condition than it looks like.

    Raises:
        QueryError: the operator goes on (``<>``, ``=>``), or an order has nothing to compare with.
    """
    meant = {"<>": "!=", "=>": ">=", "=<": "<=", "=!": "!="}.get(operator + value[:1])
    if meant is not None:
        raise QueryError(
            f"filter {text!r}: {operator + value[0]} is no operator, write {meant}; a value that "
            "begins with such a sign needs quotation marks"
        )
    if operator in ("<", "<=", ">", ">=", "in") and not value.strip(" \t,"):
        raise QueryError(f"filter {text!r}: there is no value after {operator}")


def parse_conditions(text: str) -> list[Condition]:
    """Reads conditions that are separated by semicolons; within quotation marks they are text.

    Raises:
        QueryError: one of them is none.
    """
    parts, is_quoted = [""], False
    for character in text:
        is_quoted ^= character == '"'
        if character == ";" and not is_quoted:
            parts.append("")
        else:
            parts[-1] += character
    return [parse_condition(part) for part in parts if part.strip()]


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


def _key(text: str) -> tuple[str, str]:
    """The key of a condition, and what follows it."""
    quoted = _QUOTED.match(text)
    if quoted is not None:
        return quoted[1].replace('""', '"'), text[quoted.end(1) :].removeprefix('"')
    for place in range(1, len(text)):
        if _OPERATOR.match(text, place):
            return text[:place].strip(), text[place:]
    return "", ""


def _value(text: str, value: str, *, may_be_null: bool) -> str | None:
    if not value.lstrip().startswith('"'):
        return None if may_be_null and value.strip().lower() == "null" else value.strip()
    quoted = _QUOTED.fullmatch(value)
    if quoted is None:
        raise _malformed(text)
    return quoted[1].replace('""', '"')


def _listed(text: str, values: str) -> Iterator[str | None]:
    place = 0
    while True:
        quoted = _QUOTED.match(values, place)
        if quoted is not None:
            yield quoted[1].replace('""', '"')
            place = quoted.end()
        else:
            comma = values.find(",", place)
            end = len(values) if comma < 0 else comma
            yield _value(text, values[place:end], may_be_null=False)
            place = end
        if place == len(values):
            return
        if values[place] != ",":
            raise _malformed(text)
        place += 1


def _malformed(text: str) -> QueryError:
    return QueryError(
        f"filter {text!r}: a value that begins with a quotation mark has to end with one, as in "
        'brand in "Annas, Ltd",Nike; write "" for a quotation mark inside'
    )
