"""Writing metadata to items afterwards, without overwriting what their sources give.

    values --20,000 at a time--> is the key new? no source may give it --> one transaction

Killed at any moment, what was committed holds, and the same call again writes the rest.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from clipsys.errors import DataError
from clipsys.retrieval.ingest.texts import Texts, claims_of_all
from clipsys.retrieval.storage.annotations import (
    annotated_keys,
    forget_keys,
    items_with,
    register_keys,
    write_values,
)
from clipsys.retrieval.storage.conditions import ITEM_FIELDS
from clipsys.retrieval.storage.schema import python_text
from clipsys.retrieval.storage.sources import origins_of
from clipsys.retrieval.storage.store import Store

Values: TypeAlias = "Mapping[int, Mapping[str, Any]] | Iterable[tuple[int, Mapping[str, Any]]]"

#: Items that are written in one transaction.
BATCH_ITEMS = 20_000

#: Live items of which a source has claimed a metadata key, and the source.
_CLAIMED = (
    "SELECT items.id, sources.name FROM claims JOIN sources ON sources.id = claims.source "
    "JOIN items ON items.uri = claims.uri AND items.state = 'live' "
    "WHERE EXISTS (SELECT 1 FROM json_each(claims.keys) WHERE value = ?) "
    "AND EXISTS (SELECT 1 FROM json_each(items.metadata) WHERE key = ?)"
)


def annotate(store: Store, values: Values, *, of_image: bool) -> int:
    """Sets metadata keys of items; see `Collection.annotate`. Call with the writer lock held.

    Raises:
        DataError: a source gives one of the keys, or one cannot be a key.
    """
    pairs = values.items() if isinstance(values, Mapping) else values
    checked: set[str] = set()
    num_written = 0
    stream = iter(pairs)
    while batch := dict(itertools.islice(stream, BATCH_ITEMS)):
        fresh = {key for given in batch.values() for key in given} - checked
        if fresh:
            check_keys(store, sorted(fresh))
            register_keys(store, fresh, of_image=of_image)
            checked |= fresh
        num_written += write_values(store, batch)
    return num_written


def check_keys(store: Store, keys: Sequence[str]) -> None:
    """Refuses metadata keys that cannot be written.

    Raises:
        DataError: a source gives one of them, or one cannot be a key.
    """
    annotated = annotated_keys(store).keys
    for key in keys:
        if not key.strip() or key != key.strip():
            raise DataError(f"{key!r} cannot be a metadata key; it is empty or begins with blanks")
        if key in ITEM_FIELDS:
            raise DataError(f"{key} is a field of every item and cannot be written; name another")
        source = _claimant(store, key) if key in annotated else _giver(store, key)
        if source is not None:
            raise DataError(
                f"{key}: is metadata that {source} gives and would be overwritten; choose another "
                "key"
            )


def forget(store: Store, key: str) -> int:
    """Takes an annotation away from all items. Returns how many had it. With the lock held.

    Raises:
        DataError: the key is no annotation.
    """
    known = sorted(annotated_keys(store).keys)
    if key not in known:
        near = difflib.get_close_matches(key, known, 1)
        source = _giver(store, key)
        hint = f"{source} gives it" if source else f"written are {', '.join(known) or 'none'}"
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(
            f"{key}: was not written by classify and cannot be forgotten; {hint}{meant}"
        )
    claimed = {item_id for item_id, _ in _claimed(store, key)}
    ids = [item_id for item_id in items_with(store, key) if item_id not in claimed]
    for start in range(0, len(ids), BATCH_ITEMS):
        write_values(store, {item_id: {key: None} for item_id in ids[start : start + BATCH_ITEMS]})
    forget_keys(store, [key])
    return len(ids)


def _claimed(store: Store, key: str) -> list[tuple[int, str]]:
    return [(item_id, python_text(name)) for item_id, name in store.read(_CLAIMED, (key, key))]


def _claimant(store: Store, key: str) -> str | None:
    """The source that gives an annotated key for some item; None if none does."""
    rows = store.read(f"{_CLAIMED} LIMIT 1", (key, key))
    return python_text(rows[0][1]) if rows else None


def _giver(store: Store, key: str) -> str | None:
    """The source that gives a key that is no annotation; None if no item has the key."""
    ids = items_with(store, key)
    if not ids:
        return None
    item = store.items(ids[:1])[ids[0]]
    claims = claims_of_all(Texts.of_item(item), origins_of(store, item.uri))
    givers = [name for name, claim in claims.items() if key in claim.keys]
    return ", ".join(givers or claims) or f"the image {item.uri}"
