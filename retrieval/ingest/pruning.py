"""Removing what the sources no longer have: only on request, and much of it only if confirmed.

A drive that is not mounted looks exactly like a folder that was emptied. So a source that is gone
or empty is an error before anything is pruned, a file that can merely not be reached is not gone,
and removing more than a tenth of a source's items has to be confirmed.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet

from clipsys.corpora.sources import source_kind
from clipsys.errors import PruningRefusedError
from clipsys.retrieval.ingest.moving import is_gone
from clipsys.retrieval.ingest.texts import Texts, without_source
from clipsys.retrieval.storage.annotations import annotated_keys
from clipsys.retrieval.storage.items import ItemUpdate
from clipsys.retrieval.storage.row_writing import update_item
from clipsys.retrieval.storage.schema import python_text, sql_text
from clipsys.retrieval.storage.sources import origins_of
from clipsys.retrieval.storage.store import Store

#: The share of a source's images that pruning removes without confirmation.
PRUNE_LIMIT = 0.1
_PAGE = 10_000


def find_vanished(
    store: Store, seen: Mapping[str, AbstractSet[str]], *, limit: float = PRUNE_LIMIT
) -> dict[str, list[str]]:
    """What each source gave once and no longer gives.

    Args:
        store: remembers which source gave what.
        seen: sources that have just been walked to their end, and the uris they gave.
        limit: the largest share of a source that may vanish.

    Raises:
        PruningRefusedError: more than that has vanished.
    """
    vanished: dict[str, list[str]] = {}
    for source, uris in seen.items():
        is_folder = "://" not in source and source_kind(source) == "folder"
        num_given, gone = 0, []
        for uri in given_uris(store, source):
            num_given += 1
            # A folder that may not be listed hides its files; they are not gone for that.
            if uri not in uris and not (is_folder and not is_gone(uri)):
                gone.append(uri)
        if len(gone) > limit * num_given:
            raise PruningRefusedError(
                f"{source}: no longer has {len(gone):,} of the {num_given:,} images that it gave, "
                f"more than {limit:.0%}, for example {gone[0]}; nothing is pruned. If no drive is "
                "missing and they are meant to go, say so with --yes"
            )
        vanished[source] = gone
    return vanished


def prune(store: Store, vanished: Mapping[str, list[str]]) -> int:
    """Removes the items and ledger entries that no source gives any more. Returns how many items.

    An image that another source still gives stays, with what that one says of it.
    """
    if not any(vanished.values()):
        return 0
    num_removed = 0
    with store.changing() as (connection, change):
        for source, uris in vanished.items():
            _withdraw(store, connection, change, source, uris)
            keys = [(sql_text(uri),) for uri in uris]
            unclaimed = "uri = ? AND NOT EXISTS (SELECT 1 FROM origins o WHERE o.uri = {0}.uri)"
            connection.executemany(
                f"DELETE FROM failures WHERE {unclaimed.format('failures')}", keys
            )
            num_removed += connection.executemany(
                f"UPDATE items SET state = 'deleted', change = {change} "
                f"WHERE state = 'live' AND {unclaimed.format('items')}",
                keys,
            ).rowcount
    return num_removed


def withdraw_removed_rows(store: Store, seen: Mapping[str, AbstractSet[str]]) -> None:
    """Takes back what removed rows of tables said of images that other sources still give.

    An image that no other source gives stays as it is until it is pruned.
    """
    for source, uris in seen.items():
        if "://" not in source and source_kind(source) == "table":
            gone = [uri for uri in given_uris(store, source) if uri not in uris]
            shared = [uri for uri in gone if len(origins_of(store, uri)) > 1]
            if shared:
                with store.changing() as (connection, change):
                    _withdraw(store, connection, change, source, shared)


def _withdraw(
    store: Store, connection: sqlite3.Connection, change: int, source: str, uris: Sequence[str]
) -> None:
    """Forgets that a source gave some uris, and what it said of those that others give."""
    annotated = annotated_keys(store).keys
    for uri in uris:
        origins = origins_of(store, uri)
        item = store.find(uri) if len(origins) > 1 else None
        if item is not None:
            texts = without_source(Texts.of_item(item), source, origins, annotated)
            if texts != Texts.of_item(item):
                facts = (item.id, item.size_bytes, item.mtime_ns)
                update = ItemUpdate(*facts, texts.captions, texts.metadata)
                update_item(connection, update, change)
    for table in ("claims", "origins"):
        connection.executemany(
            f"DELETE FROM {table} WHERE uri = ? "
            "AND source = (SELECT id FROM sources WHERE name = ?)",
            [(sql_text(uri), sql_text(source)) for uri in uris],
        )


def given_uris(store: Store, source: str) -> Iterator[str]:
    """What a source is known to give, in order."""
    query = (
        "SELECT uri FROM origins WHERE source = (SELECT id FROM sources WHERE name = ?) "
        "AND uri > ? ORDER BY uri LIMIT ?"
    )
    last: str | bytes = ""
    while rows := store.read(query, (sql_text(source), last, _PAGE)):
        yield from (python_text(uri) for (uri,) in rows)
        last = rows[-1][0]
