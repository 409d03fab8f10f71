from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from clipsys.errors import QueryError
from clipsys.retrieval.storage.items import Batch, ItemUpdate, Location, NewItem
from clipsys.retrieval.storage.segments import SegmentFile
from clipsys.retrieval.storage.store import Store
from clipsys.retrieval.storage.words import TABLE, fuse, match_expression

CAPTIONS: list[tuple[str, ...]] = [
    ("A brown dog on the beach", "the dog's ball"),
    ("a black dog",),
    (),
    ("Été à la plage, a café", "line\nbreak"),
    ("a cat surfing",),
    ('quotes " and AND OR NOT NEAR( * ^',),
]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store.create(tmp_path / "items.sqlite")
    new = [NewItem(f"/{n}", str(n), 1, 1, captions, {}) for n, captions in enumerate(CAPTIONS)]
    assert made.commit(Batch(new=new), SegmentFile("s.npy", len(new), "0")) == [1, 2, 3, 4, 5, 6]
    return made


def found(store: Store, words: str) -> set[int]:
    return {item_id - 1 for item_id in store.match_words(match_expression(words)).tolist()}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("dog", {0, 1}),
        ("DOG brown", {0}),
        ("dog -brown", {1}),
        ('"dog on the"', {0}),
        ('"on dog"', set()),
        ('a -"brown dog" -cat', {1, 3}),
        ("surf*", {4}),
        ("surf", set()),
        ("ete cafe", {3}),  # capitals and accents do not count
        ("break", {3}),
        ("dog's", {0}),
        # Nothing acts as an operator of FTS5.
        ("dog OR cat", set()),
        ("NEAR(", {5}),
        ("text:dog", set()),
        ('and "or" not', {5}),
        ("^dog", {0, 1}),
        ("brown; DROP TABLE items", set()),
    ],
)
def test_captions_are_found(store: Store, words: str, expected: set[int]) -> None:
    assert found(store, words) == expected


@pytest.mark.parametrize("words", ["", "  ", "-dog", '"', "*", "( ^ *"])
def test_no_words_are_an_error(words: str) -> None:
    with pytest.raises(QueryError, match="hold nothing to look for"):
        match_expression(words)


def test_table_follows_every_change_of_the_items(store: Store) -> None:
    store.commit(Batch(updates=[ItemUpdate(2, 1, 1, ("a white horse",), {})]), None)
    store.commit(Batch(updates=[ItemUpdate(5, 1, 1, (), {})]), None)
    assert found(store, "dog") == {0}
    assert found(store, "horse") == {1}
    assert found(store, "cat") == set()
    store.delete([1])
    assert found(store, "dog") == set()
    replacing = NewItem("/1", "x", 1, 1, ("a dog again",), {}, Location(1, 0), replaces=2)
    assert store.commit(Batch(new=[replacing]), None) == [7]
    assert (found(store, "horse"), found(store, "dog")) == (set(), {6})


def test_database_made_before_there_was_a_table_gets_one_filled(
    store: Store, tmp_path: Path
) -> None:
    store.delete([2])
    with closing(sqlite3.connect(tmp_path / "items.sqlite")) as connection:
        names = "SELECT name FROM sqlite_master WHERE type = 'trigger'"
        for (name,) in connection.execute(names).fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        connection.execute(f"DROP TABLE {TABLE}")
        connection.commit()
    with closing(Store(tmp_path / "items.sqlite")) as opened:
        assert found(opened, "dog") == {0}
        opened.delete([1])
        assert found(opened, "dog") == set()
        assert opened.check_integrity() == []


def test_fusion_is_the_sum_of_reciprocal_ranks() -> None:
    vectors, words = np.array([5, 3, 9, 1]), np.array([9, 5])
    # 5: 1/61 + 1/62; 9: 1/63 + 1/61; 3: 1/62; 1: 1/64
    assert fuse([vectors, words]).tolist() == [5, 9, 3, 1]
    assert fuse([vectors, np.array([8])]).tolist() == [5, 8, 3, 9, 1]
    assert fuse([np.array([], np.int64), np.array([], np.int64)]).tolist() == []
