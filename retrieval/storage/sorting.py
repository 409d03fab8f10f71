"""What results are sorted by: a metadata key, or a column of the items.

Numbers come before texts, in their order; texts without regard to capitals, which puts ISO dates in
order. Items without the key are last in both directions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeAlias

from clipsys.errors import QueryError

#: Sorts numbers before texts.
SortValue: TypeAlias = tuple[int, float, str]

#: What an item itself can be sorted by, unless a metadata key has the name: columns of the items.
SORT_COLUMNS = {"uri": "uri", "caption": "caption", "added": "id", "modified": "mtime_ns"}


def parse_sort(sort: str) -> tuple[str, bool]:
    """A key, and whether the order is descending: ``-year``.

    Raises:
        QueryError: there is no key.
    """
    key = sort.strip().removeprefix("-").strip()
    if not key:
        raise QueryError(f"cannot sort by {sort!r}; name a key, as year, or -year for descending")
    return key, sort.strip().startswith("-")


def sort_queries(
    key: str, column: str | None, below: tuple[str, str, str] | None
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """SQL that gives id, type and value of what items are sorted by, and its parameters.

    Args:
        key: the metadata key.
        column: of the items, in its place.
        below: the parts of a key ``a.b``, a field of a struct.
    """
    if column is not None:
        yield f"SELECT id, typeof({column}), {column} FROM items", ()
        return
    value = "SELECT items.id AS id, field.type, field.value FROM items, json_each({}) AS field"
    if below is not None:
        _, path, last = below
        yield f"SELECT * FROM ({value.format('items.metadata, ?')} ON field.key = ?)", (path, last)
    yield f"SELECT * FROM ({value.format('items.metadata')} ON field.key = ?)", (key,)


def sort_value(kind: str, value: Any) -> SortValue | None:
    """A value as it is compared; None if there is none."""
    if kind == "null" or value is None:
        return None
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if kind not in ("true", "false") and (number := _number(value)) is not None:
        return (0, number, "")
    return (1, 0.0, str(kind if kind in ("true", "false") else value).casefold())


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
