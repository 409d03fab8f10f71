"""Which source gave what: the sources of a collection, their settings, and whose the texts are.

An image may be given by several sources, a table and the folder that it describes for instance.
What a source gave and no longer gives goes; what another one gave stays. Where an item has more
than one origin, the table ``claims`` says which of its captions and metadata keys each of them
gave. One origin may be without a row: what no other claims is its own. So a collection with one
source, which most are, needs no row at all.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from clipsys.retrieval.storage.schema import python_text, sql_text
from clipsys.retrieval.storage.store import Store


@dataclass(frozen=True)
class KnownSource:
    """A source as the database knows it.

    Attributes:
        name: its real path, or its address.
        num_uris: how many images it gave and has not been seen without.
        settings: with which options it was indexed last.
    """

    name: str
    num_uris: int
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """Which of an item's texts a source gave: its captions or not, and keys of its metadata."""

    captions: bool = False
    keys: frozenset[str] = frozenset()


def known_sources(store: Store) -> list[KnownSource]:
    """All sources, in the order in which they were first indexed."""
    settings = {}
    if store.read("SELECT 1 FROM sqlite_master WHERE name = 'source_settings'"):
        settings = dict(store.read("SELECT source, settings FROM source_settings"))
    rows = store.read(
        "SELECT s.id, s.name, (SELECT count(*) FROM origins o WHERE o.source = s.id) "
        "FROM sources s ORDER BY s.id"
    )
    return [
        KnownSource(python_text(name), count, json.loads(settings.get(number, "{}")))
        for number, name, count in rows
    ]


def remember_settings(store: Store, source: str, settings: Mapping[str, Any]) -> None:
    """Notes with which options a source is indexed, for when all are brought up to date."""
    with store.changing() as (connection, _):
        connection.execute("INSERT OR IGNORE INTO sources (name) VALUES (?)", (sql_text(source),))
        connection.execute(
            "INSERT OR REPLACE INTO source_settings SELECT id, ? FROM sources WHERE name = ?",
            (json.dumps(dict(settings), sort_keys=True), sql_text(source)),
        )


def origins_of(store: Store, uri: str) -> dict[str, Claim | None]:
    """The sources that gave a uri, each with its claim; None where it has no row."""
    rows = store.read(
        "SELECT s.name, c.captions, c.keys FROM origins o JOIN sources s ON s.id = o.source "
        "LEFT JOIN claims c ON c.source = o.source AND c.uri = o.uri WHERE o.uri = ?",
        (sql_text(uri),),
    )
    return {
        python_text(name): None
        if keys is None
        else Claim(bool(captions), frozenset(json.loads(keys)))
        for name, captions, keys in rows
    }


def rename_uri(connection: sqlite3.Connection, old: str, new: str) -> None:
    """Gives a uri another name wherever it is noted beside the items."""
    for table in ("origins", "claims", "failures"):
        connection.execute(
            f"UPDATE OR IGNORE {table} SET uri = ? WHERE uri = ?", (sql_text(new), sql_text(old))
        )
        connection.execute(f"DELETE FROM {table} WHERE uri = ?", (sql_text(old),))


def rename_source(connection: sqlite3.Connection, old: str, new: str) -> None:
    """Gives a source another name; joins it to the one that has that name already."""
    rows = dict(connection.execute("SELECT name, id FROM sources").fetchall())
    number, target = rows[sql_text(old)], rows.get(sql_text(new))
    if target == number:
        return
    if target is None:
        connection.execute("UPDATE sources SET name = ? WHERE id = ?", (sql_text(new), number))
        return
    for table in ("origins", "claims"):
        connection.execute(
            f"UPDATE OR IGNORE {table} SET source = ? WHERE source = ?", (target, number)
        )
    forget_source(connection, number)


def forget_source(connection: sqlite3.Connection, number: int) -> None:
    """Deletes a source and every note of what it gave; its items stay."""
    for table in ("claims", "origins", "source_settings"):
        connection.execute(f"DELETE FROM {table} WHERE source = ?", (number,))
    connection.execute("DELETE FROM sources WHERE id = ?", (number,))


def forget_empty_sources(store: Store, keep: set[str]) -> list[str]:
    """Forgets sources of which nothing is left, since what they gave was moved."""
    gone = [one.name for one in known_sources(store) if not one.num_uris and one.name not in keep]
    if gone:
        with store.changing() as (connection, _):
            for name in gone:
                (number,) = connection.execute(
                    "SELECT id FROM sources WHERE name = ?", (sql_text(name),)
                ).fetchone()
                forget_source(connection, number)
    return gone
