"""Why a filter selects nothing: an unknown key or value, and the nearest that there is.

People write ``color`` for ``colour`` and ``blue`` for ``Blue``. A filter compares exactly, since a
collection may hold both; an empty result says what is likely meant.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any

from clipsys.retrieval.storage.conditions import ITEM_FIELDS, Condition
from clipsys.retrieval.storage.filters import split_path
from clipsys.retrieval.storage.items import plain_text

#: Distinct values of a key that are compared with one that is unknown.
_MOST_VALUES = 20_000
_SHOWN = 8
_SHOWN_CHARACTERS = 60
_VALUES = (
    "SELECT entry.type, entry.value, entry.number FROM metadata_values AS entry "
    "WHERE entry.key = (SELECT id FROM metadata_keys WHERE key = ?) LIMIT ?"
)

Read = Callable[[str, Sequence[Any]], list[tuple[Any, ...]]]


def explain_nothing(
    conditions: Sequence[Condition], *, count: Callable[[Sequence[Condition]], int], read: Read
) -> str | None:
    """One sentence on why no item passes; None if some do.

    Args:
        conditions: of the filter.
        count: how many items pass conditions.
        read: gives the rows of a query on the database.
    """
    if count(conditions):
        return None
    alone = [(condition, count([condition])) for condition in conditions]
    reasons = [_reason(condition, read) for condition, number in alone if not number]
    if reasons:
        return "; ".join(reasons)
    each = ", ".join(f"{condition} for {number:,}" for condition, number in alone)
    return f"each condition holds for some items, but for none do all: {each}"


def explain_unknown(conditions: Sequence[Condition], read: Read) -> str | None:
    """Says which key no item has, where a condition holds for all items because of it.

    ``colour!=red`` and ``colour is missing`` hold for everything where the key is ``color``.
    """
    fields = [
        one.field
        for one in conditions
        if one.operator == "!=" or (one.operator == "=" and one.value is None)
    ]
    if all(field in ITEM_FIELDS for field in fields):
        return None
    keys = [key for (key,) in read("SELECT key FROM metadata_keys ORDER BY 1", ())]
    for field in fields:
        path = split_path(field)
        if field not in (*keys, *ITEM_FIELDS) and (path is None or path[0] not in keys):
            return unknown_key(field, keys)
    return None


def unknown_key(key: str, known: Sequence[str]) -> str:
    """Says that no item has a key, and which are near it."""
    near = _near(key, known)
    shown = ", ".join(known[:_SHOWN]) + (", …" if len(known) > _SHOWN else "")
    meant = f" (did you mean {near[0]!r}?)" if near else ""
    return f"no item has metadata {key!r}; there is {shown or 'none at all'}{meant}"


def _reason(condition: Condition, read: Read) -> str:
    field = condition.field
    if field in ITEM_FIELDS:
        return f"no item has {condition}"
    keys = [key for (key,) in read("SELECT key FROM metadata_keys ORDER BY 1", ())]
    if field not in keys:
        path = split_path(field)
        if path is not None and path[0] in keys:
            return f"no item has {condition}, a field of {path[0]!r}"
        return unknown_key(field, keys)
    if condition.value is None:
        return (
            f"every item has {field!r}" if condition.operator == "=" else f"no item has {field!r}"
        )
    return _unknown_value(condition, read(_VALUES, (plain_text(field), _MOST_VALUES)))


def _unknown_value(condition: Condition, entries: Sequence[tuple[Any, ...]]) -> str:
    field, operator = condition.field, condition.operator
    texts = [str(value) for kind, value, _ in entries if kind in ("text", "integer", "real")]
    elements = [str(value) for kind, value, _ in entries if kind == "element"]
    numbers = [number for kind, _, number in entries if kind != "element" and number is not None]
    if operator in ("<", "<=", ">", ">="):
        if numbers:
            return (
                f"no {field!r} {operator} {condition.value}; it is {min(numbers)} to {max(numbers)}"
            )
        ordered = sorted(texts)
        span = f"; it is text, {_shown(ordered[0])} to {_shown(ordered[-1])}" if ordered else ""
        return f"no {field!r} {operator} {condition.value}{span}"
    wanted = condition.value if operator == "in" else [condition.value]
    words = [str(value) for value in wanted]
    if operator != "contains" and (same := [word for word in words if word in elements]):
        return f"{field!r} is a list; write: {field} contains {same[0]}"
    if words == [""]:
        return f"no {field!r} is an empty text; `{field} is missing` finds items without it"
    there = texts + elements
    missing = " or ".join(_shown(word) for word in words[:_SHOWN])
    said = f"no {field!r} {'contains' if operator == 'contains' else 'is'} {missing}"
    near = [one for word in words for one in _near(word, there)]
    if near:
        capitals = near[0].casefold() in map(str.casefold, words)
        remark = " (capitals count)" if capitals else ""
        return f"{said}; the nearest is {_shown(near[0])}{remark}"
    some = ", ".join(_shown(one) for one in sorted(set(there))[:_SHOWN])
    more = ", …" if len(set(there)) > _SHOWN else ""
    return f"{said}; there is {some}{more}" if some else said


def _near(word: str, known: Sequence[str]) -> list[str]:
    """The known words that are nearest, best first: the same but for capitals, then similar."""

    def plain(text: str) -> str:
        return re.sub(r"[\s_-]+", "", text).casefold()

    by_plain: dict[str, str] = {}
    for one in known:
        by_plain.setdefault(plain(one), one)
    if plain(word) in by_plain:
        return [by_plain[plain(word)]]
    return [by_plain[one] for one in difflib.get_close_matches(plain(word), by_plain, 1, 0.6)]


def _shown(value: str) -> str:
    cut = value if len(value) <= _SHOWN_CHARACTERS else f"{value[:_SHOWN_CHARACTERS]}…"
    return repr(cut)
