"""Annotations: metadata written to items afterwards, which no source gave.

    clipsys classify --write kind      items 1 .. N  {"kind": "dog", "kind_probability": 0.93, ...}
                                       annotations   kind, kind_probability

The values stand in the items' metadata like any other, so filters, sorting and hints see them. The
table ``annotations`` says which keys are written so; a source that gives an item again leaves them
as they are (`clipsys.retrieval.ingest.texts`).

Many items are written in one transaction. There the triggers of the index of metadata rest, which
would enter each item's whole metadata once more; the entries of the written keys are changed by a
few statements over all items of the batch.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clipsys.retrieval.storage import metadata_index
from clipsys.retrieval.storage.items import plain_text, to_json
from clipsys.retrieval.storage.store import Store

_ROWS = 5_000


@dataclass(frozen=True)
class AnnotatedKeys:
    """The metadata keys of a collection that are annotations.

    Attributes:
        keys: all of them.
        of_image: those that describe the image's content, and go when it changes.
    """

    keys: frozenset[str] = frozenset()
    of_image: frozenset[str] = frozenset()


def annotated_keys(store: Store) -> AnnotatedKeys:
    """Which metadata keys are annotations."""
    if not store.read("SELECT 1 FROM sqlite_master WHERE name = 'annotations'"):
        return AnnotatedKeys()  # of an earlier version, and not written to since
    rows = store.read("SELECT key, of_image FROM annotations")
    return AnnotatedKeys(
        frozenset(key for key, _ in rows), frozenset(key for key, of_image in rows if of_image)
    )


def register_keys(store: Store, keys: Iterable[str], *, of_image: bool) -> None:
    """Notes that metadata keys are annotations; before the first value is written."""
    with store.changing() as (connection, _):
        connection.executemany(
            "INSERT OR REPLACE INTO annotations VALUES (?, ?)",
            [(plain_text(key), of_image) for key in keys],
        )


def write_values(store: Store, values: Mapping[int, Mapping[str, Any]]) -> int:
    """Sets metadata keys of live items, in one transaction. Returns how many items there were.

    Call with the writer lock held.

    Args:
        store: the items.
        values: what is set, by id; None takes a key away.
    """
    with store.changing() as (connection, _):
        given = {item_id: json.loads(to_json(dict(keys))) for item_id, keys in values.items()}
        texts: list[tuple[str, int]] = []
        changed: list[tuple[int, str, str]] = []
        num_found = 0
        for item_id, text in _metadata(connection, list(given)):
            num_found += 1
            metadata, news = json.loads(text), given[item_id]
            before = {key: metadata[key] for key in news if key in metadata}
            after = {key: value for key, value in news.items() if value is not None}
            if before != after:
                kept = {key: value for key, value in metadata.items() if key not in news}
                texts.append((_json({**kept, **after}), item_id))
                changed.append((item_id, _json(before), _json(after)))
        if changed:
            with metadata_index.resting_triggers(connection):
                connection.executemany("UPDATE items SET metadata = ? WHERE id = ?", texts)
                metadata_index.replace_entries(connection, changed)
    return num_found


#: What comes out of JSON needs no `to_json`, whose form this is; made once, since it takes long.
_encoder = json.JSONEncoder(sort_keys=True, ensure_ascii=False)


def _json(values: Mapping[str, Any]) -> str:
    return _encoder.encode(values) if values else "{}"


def _metadata(connection: sqlite3.Connection, ids: Sequence[int]) -> Iterable[tuple[int, str]]:
    for start in range(0, len(ids), _ROWS):
        chunk = [item_id for item_id in ids[start : start + _ROWS] if 0 < item_id < 2**63]
        marks = ",".join("?" * len(chunk))
        yield from connection.execute(
            f"SELECT id, metadata FROM items WHERE id IN ({marks}) AND state = 'live'", chunk
        ).fetchall()


def items_with(store: Store, key: str) -> list[int]:
    """Ids of the live items that have a metadata key, ascending; from the index of metadata."""
    rows = store.read(
        "SELECT DISTINCT posting.item FROM metadata_values AS entry "
        "CROSS JOIN metadata_postings AS posting ON posting.value = entry.id "
        "WHERE entry.key = (SELECT id FROM metadata_keys WHERE key = ?) ORDER BY 1",
        (plain_text(key),),
    )
    return [item_id for (item_id,) in rows]


def forget_keys(store: Store, keys: Sequence[str]) -> None:
    """Notes that metadata keys are no annotations any more; after their last value is gone.

    The failure ledger, which remembers what its files' items had, forgets them as well.
    """
    with store.changing() as (connection, _):
        for uri, text in connection.execute("SELECT uri, metadata FROM failures").fetchall():
            metadata = json.loads(text)
            kept = {key: value for key, value in metadata.items() if key not in keys}
            if kept != metadata:
                connection.execute(
                    "UPDATE failures SET metadata = ? WHERE uri = ?", (_json(kept), uri)
                )
        connection.executemany(
            "DELETE FROM annotations WHERE key = ?", [(plain_text(key),) for key in keys]
        )
