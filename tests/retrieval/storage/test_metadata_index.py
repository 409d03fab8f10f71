"""The index of metadata follows the items, whatever changes them, and its damage is seen."""

from __future__ import annotations

import random
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from clipsys.errors import CollectionError
from clipsys.retrieval.storage.filters import Condition
from clipsys.retrieval.storage.items import Batch, ItemUpdate, NewItem, to_json
from clipsys.retrieval.storage.metadata_index import COUNTER, MAX_VALUE_BYTES, rebuild_index
from clipsys.retrieval.storage.segments import SegmentFile
from clipsys.retrieval.storage.store import Store

VALUES: list[Any] = [
    *(0, 1, 1.0, "1", True, None, "red", "Red", [], ["red", 1, "red"], {"x": 1}, "x" * 500),
]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store.create(tmp_path / "items.sqlite")) as made:
        yield made


def add(store: Store, documents: list[dict[str, Any]], name: str = "s.npy") -> list[int]:
    new = [NewItem(f"/{name}/{n}", f"{name}{n}", 1, 1, (), d) for n, d in enumerate(documents)]
    return store.commit(Batch(new=new), SegmentFile(name, len(new), "0"))


def content(store: Store) -> list[tuple[Any, ...]]:
    return store.read(
        "SELECT posting.item, known.key, stored.type, stored.value, stored.number "
        "FROM metadata_postings AS posting JOIN metadata_values AS stored "
        "ON stored.id = posting.value JOIN metadata_keys AS known ON known.id = stored.key "
        "ORDER BY 1, 2, 3, 4"
    )


def size(store: Store) -> tuple[int, ...]:
    tables = ("metadata_keys", "metadata_values", "metadata_postings")
    return tuple(store.read(f"SELECT count(*) FROM {table}")[0][0] for table in tables)


@pytest.mark.parametrize("seed", range(3))
def test_index_kept_by_triggers_is_the_index_made_anew(store: Store, seed: int) -> None:
    generator = random.Random(seed)

    def document() -> dict[str, Any]:
        return {key: generator.choice(VALUES) for key in generator.sample("abcdef", 3)}

    live: list[int] = []
    for number in range(30):
        live += add(store, [document() for _ in range(generator.randrange(1, 5))], f"{number}.npy")
        some = generator.sample(live, min(len(live), 3))
        updates = [ItemUpdate(some[0], 1, 1, (), document())]
        store.commit(Batch(updates=updates), None)
        store.delete(some[1:])
        live = [item_id for item_id in live if item_id not in some[1:]]
        if number % 7 == 0:  # as a purge does, and what nothing does yet: bringing items back
            with store.changing() as (connection, _):
                connection.execute("DELETE FROM items WHERE state = 'deleted' AND id % 2")
                connection.execute("DELETE FROM items WHERE id = ?", (live.pop(),))
                connection.execute("UPDATE items SET state = 'live' WHERE id % 5 = 0")
            live = [item.id for item in store.live_items()]
        assert store.find_metadata_problems() == []
    kept = content(store)
    with store.changing() as (connection, _):
        rebuild_index(connection)
    assert content(store) == kept
    assert store.find_metadata_problems() == []


def test_values_that_no_live_item_has_are_gone_at_once(store: Store) -> None:
    ids = add(store, [{"k": n, "both": 1} for n in range(50)])
    assert size(store) == (2, 51, 100)
    store.delete(ids[:49])
    assert size(store) == (2, 2, 2)
    store.delete(ids[49:])
    assert size(store) == (0, 0, 0)
    assert store.metadata_keys() == []


def test_change_of_captions_alone_writes_nothing_to_the_index(store: Store) -> None:
    (item_id,) = add(store, [{"k": 1}])
    with store.changing() as (connection, _):
        connection.execute("DELETE FROM metadata_postings")  # whoever writes would enter it again
    store.commit(Batch(updates=[ItemUpdate(item_id, 2, 3, ("new",), {"k": 1})]), None)
    assert store.items([item_id])[item_id].captions == ("new",)
    assert content(store) == []


def test_long_values_do_not_stand_in_the_index_and_are_found(store: Store) -> None:
    long = ["sea " * 5_000, [f"word {n}" for n in range(500)], {"a": "b" * 2_000}]
    ids = add(store, [{"k": value} for value in [*long, "x" * MAX_VALUE_BYTES, "9" * 400]])
    stored = store.read("SELECT type, value FROM metadata_values ORDER BY type, value")
    assert stored == [("long", ""), ("text", "9" * 400), ("text", "x" * MAX_VALUE_BYTES)]
    for operator, value, expected in (
        ("=", "sea " * 5_000, ids[:1]),
        ("in", ["sea " * 5_000, "x" * MAX_VALUE_BYTES], [ids[0], ids[3]]),
        ("contains", "SEA SEA", ids[:1]),
        ("contains", "word 499", ids[1:2]),
        ("contains", "bbb", ids[2:3]),
        ("<", "t", [ids[0], ids[4]]),
        ("!=", None, ids),
        (">", 10**300, ids[4:]),
    ):
        found = store.select_ids([Condition("k", operator, value)])  # type: ignore[arg-type]
        assert found.tolist() == expected, (operator, str(value)[:20])


def test_unique_long_texts_hardly_enlarge_the_database(store: Store) -> None:
    generator = random.Random(0)
    texts = ["".join(generator.choices("abcdefgh ", k=5_000)) for _ in range(100)]
    add(store, [{"description": text} for text in texts])
    sizes = store.read(
        "SELECT (SELECT sum(length(metadata)) FROM items), "
        "(SELECT count(*) FROM metadata_values), (SELECT count(*) FROM metadata_postings)"
    )
    assert sizes == [(sum(len(to_json({"description": text})) for text in texts), 1, 100)]


@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("DELETE FROM metadata_postings WHERE item = 2", "2 entries of the items are missing"),
        ("INSERT INTO metadata_postings VALUES (1, 77)", "1 entries are of no live item"),
        ("UPDATE metadata_values SET value = 'blue' WHERE value = 'red'", "entries .* missing"),
        ("UPDATE metadata_values SET number = 3 WHERE number = 2", "1 entries .* missing"),
        ("UPDATE metadata_values SET id = 1", "2 values share their id"),
        ("DELETE FROM metadata_keys WHERE key = 'n'", "2 entries of the items are missing"),
        ("INSERT INTO metadata_keys VALUES (9, 'ghost')", "1 keys are of no live item"),
        (
            "INSERT INTO metadata_values VALUES (1, 'text', 'ghost', NULL, 3)",
            "1 values share their id",
        ),
        ("UPDATE state SET value = 0 WHERE name = 'metadata'", "3 values .* given again"),
        ("DELETE FROM state WHERE name = 'metadata'", "3 values .* given again"),
        ("DROP TRIGGER metadata_forget", "metadata_forget is missing"),
        ("DROP INDEX metadata_numbers", "metadata_numbers is missing"),
        ("DROP TABLE metadata_postings", "no such table"),
        ("UPDATE items SET metadata = '{\"n\": 5}' WHERE id = 1", ""),
    ],
)
def test_damage_is_seen_and_mended(store: Store, statement: str, problem: str) -> None:
    add(store, [{"n": 1, "colour": "red"}, {"n": 2, "colour": "red"}])
    expected = content(store)
    with closing(sqlite3.connect(store.path)) as connection, connection:
        connection.execute(statement)
    if not problem:  # the triggers are the database's own: any program keeps the index
        assert store.find_metadata_problems() == []
        return
    try:
        problems = store.find_metadata_problems()
    except CollectionError as error:
        problems = [str(error)]
    assert any(re.search(problem, one) for one in problems), problems
    with store.changing() as (connection, _):
        rebuild_index(connection)
    assert store.find_metadata_problems() == []
    assert content(store) == expected
    assert store.state(COUNTER) >= 3
