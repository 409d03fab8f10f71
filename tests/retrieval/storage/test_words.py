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
from clipsys.retrieval.storage.words import (
    COUNT_STRAY,
    TABLE,
    TRIGGERS,
    fuse,
    match_expression,
)

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


@pytest.mark.parametrize(
    ("uri", "words", "others"),
    [
        ("/pictures/summer/Beach_dog-01.JPG", "beach dog 01", "summer pictures"),
        ("/s/walk.tar#00/kite_7", "kite 7", "walk tar"),
        ("/s/kites.tar#kite_7", "kite", "kites tar"),
        ("/s/table.parquet#12", "", "table parquet 12"),
        ("/p/Forêt (été).png", "foret ete", ""),
        ("/p/caf\udce9_beach.jpg", "beach", "p"),
        ("/p/with # sign.jpg", "sign", ""),
        ("name.jpg", "name", ""),
    ],
)
def test_words_of_file_names_are_found(tmp_path: Path, uri: str, words: str, others: str) -> None:
    with closing(Store.create(tmp_path / "items.sqlite")) as made:
        made.commit(Batch(new=[NewItem(uri, "0", 1, 1, ("a cat",), {})]), SegmentFile("s", 1, "0"))
        for word in words.split():
            assert found(made, word) == {0}, word
            assert found(made, f"cat {word}") == {0}  # one word of each
            assert found(made, f'"cat {word}"') == set()  # they are no phrase
        for word in others.split():
            assert found(made, word) == set(), word
        assert made.read(COUNT_STRAY) == [(0,)]


_OLD_TEXT = "(SELECT group_concat(value, char(10)) FROM json_each({}.captions))"


def make_captions_only(path: Path) -> None:
    """The table as it was before it held the names of files."""
    with closing(sqlite3.connect(path)) as connection, connection:
        for name in TRIGGERS:
            connection.execute(f"DROP TRIGGER {name}")
        connection.execute(f"DROP TABLE {TABLE}")
        connection.execute(
            f"CREATE VIRTUAL TABLE {TABLE} "
            "USING fts5(text, tokenize = 'unicode61 remove_diacritics 2')"
        )
        connection.execute(
            f"CREATE TRIGGER {TABLE}_insert AFTER INSERT ON items WHEN new.captions != '[]' BEGIN "
            f"INSERT INTO {TABLE} (rowid, text) VALUES (new.id, {_OLD_TEXT.format('new')}); END"
        )
        connection.execute(
            f"INSERT INTO {TABLE} (rowid, text) SELECT id, {_OLD_TEXT.format('items')} FROM items "
            "WHERE state = 'live' AND captions != '[]'"
        )


def test_a_table_without_file_names_is_made_anew_at_the_first_search(
    store: Store, tmp_path: Path
) -> None:
    make_captions_only(tmp_path / "items.sqlite")
    with closing(Store(tmp_path / "items.sqlite")) as opened:
        new = [NewItem("/late_kite.jpg", "9", 1, 1, (), {}, Location(1, 0))]
        opened.commit(Batch(new=new), None)
        assert found(opened, "kite") == {6}
        assert found(opened, "dog") == {0, 1}
        assert opened.read(COUNT_STRAY) == [(0,)]
