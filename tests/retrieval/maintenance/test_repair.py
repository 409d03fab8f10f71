"""What is damaged is mended as far as it can be, and never more than is damaged."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from clipsys.errors import CollectionError
from clipsys.retrieval import Collection
from clipsys.retrieval.ingest import pending
from tests.retrieval.colours import COLOURS, ColourEncoder
from tests.retrieval.maintenance.test_verification import cut, flip_a_bit, only_file, run_sql


@pytest.fixture
def indexed(collection: Collection, photos: Path, monkeypatch: pytest.MonkeyPatch) -> Collection:
    """Six images with captions and years, in three segments of two."""
    monkeypatch.setattr(pending, "COMMIT_INTERVAL_S", 0.0)
    table = photos.parent / "t.csv"
    rows = [f"photos/{name}.png,a {name} thing,{2000 + n}" for n, name in enumerate(COLOURS)]
    table.write_text("\n".join(["path,caption,year", *rows]), encoding="utf-8")
    collection.add(table, batch_size=2, show_progress=False)
    return collection


def answers(collection: Collection) -> list[tuple[str, str | None, object]]:
    hits = collection.search("red", k=20)
    return [(hit.uri, hit.caption, hit.metadata["year"]) for hit in hits]


def test_sound_collection_has_nothing_to_repair(indexed: Collection) -> None:
    generation = indexed.info().index_generation
    report = indexed.repair()
    assert not any(report.to_dict().values())
    assert indexed.info().index_generation == generation


def test_damaged_index_is_built_again_without_an_encoder(indexed: Collection) -> None:
    expected = answers(indexed)
    flip_a_bit(only_file(indexed.path, "indexes"))
    with Collection.open(indexed.path) as opened:
        report = opened.repair()
    assert (report.index_rebuilt, report.requeued, report.remaining) == (True, 0, [])
    assert answers(indexed) == expected


@pytest.mark.parametrize("damage", [flip_a_bit, cut, Path.unlink])
def test_lost_vectors_are_encoded_again_with_their_captions_and_metadata(
    indexed: Collection, encoder: ColourEncoder, damage: Callable[[Path], object]
) -> None:
    expected, before = answers(indexed), encoder.num_encoded
    damage(sorted((indexed.path / "segments").iterdir())[1])
    with pytest.raises(CollectionError, match="clipsys repair"):
        Collection.open(indexed.path, encoder)
    with Collection.open(indexed.path, encoder, to_repair=True) as opened:
        report = opened.repair()
        assert (report.requeued, report.segments_dropped, report.remaining) == (2, 1, [])
        assert len(opened) == 4
        assert {failure.reason for failure in opened.failures()} == {"vector lost"}
        assert opened.retry_failures(show_progress=False).added == 2
        assert encoder.num_encoded == before + 2
        assert opened.failures() == []
        assert opened.verify() == []
        assert answers(opened) == expected


def test_indexing_the_source_again_brings_lost_images_back_too(
    indexed: Collection, encoder: ColourEncoder, photos: Path
) -> None:
    expected = answers(indexed)
    sorted((indexed.path / "segments").iterdir())[0].unlink()
    with Collection.open(indexed.path, encoder, to_repair=True) as opened:
        opened.repair()
        assert opened.add(photos.parent / "t.csv", show_progress=False).added == 2
        assert answers(opened) == expected


@pytest.mark.parametrize(
    ("statement", "requeued"),
    [
        ("UPDATE items SET row = 99 WHERE id = 2", 1),
        ("UPDATE items SET segment = 77 WHERE id = 2", 1),
        ("DELETE FROM items WHERE id = 3", 0),
        ("UPDATE sqlite_sequence SET seq = 2 WHERE name = 'items'", 0),
        ("UPDATE state SET value = 0 WHERE name = 'change'", 0),
    ],
)
def test_inconsistent_rows_are_mended(indexed: Collection, statement: str, requeued: int) -> None:
    indexed.close()
    run_sql(indexed.path, statement)
    with Collection.open(indexed.path, ColourEncoder()) as opened:
        assert opened.verify() != []
        report = opened.repair()
        assert (report.requeued, report.remaining) == (requeued, [])
        assert opened.verify() == []
        assert len(opened.search("red", k=20)) == len(opened)


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM caption_words",
        "UPDATE caption_words SET text = 'a lie' WHERE rowid = 2",
        "UPDATE caption_words_content SET c0 = 'a lie' WHERE id = 2",
        "DELETE FROM caption_words_data",
        "DROP TABLE caption_words_data",
        "DROP TRIGGER caption_words_retire",
        "DROP TRIGGER caption_words_insert",
    ],
)
def test_words_are_taken_from_the_items_again(
    indexed: Collection, encoder: ColourEncoder, photos: Path, statement: str
) -> None:
    expected = [hit.id for hit in indexed.search(words="thing -red")]
    assert len(expected) == 5
    indexed.close()
    run_sql(indexed.path, statement)
    with Collection.open(indexed.path, encoder) as opened:
        assert any("caption_words" in str(fault) for fault in opened.verify())
        report = opened.repair()
        assert (report.words_rebuilt, report.requeued, report.remaining) == (True, 0, [])
        assert [hit.id for hit in opened.search(words="thing -red")] == expected
        opened.remove(expected[:1])
        assert [hit.id for hit in opened.search(words="thing -red")] == expected[1:]
        assert opened.verify() == []


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM metadata_postings",
        "UPDATE metadata_values SET value = 2001 WHERE value = 2002",
        "DROP TRIGGER metadata_forget",
        "DROP TABLE metadata_values",
    ],
)
def test_index_of_metadata_is_made_of_the_items_again(
    indexed: Collection, encoder: ColourEncoder, statement: str
) -> None:
    indexed.close()
    with closing(sqlite3.connect(indexed.path / "items.sqlite")) as connection, connection:
        if "UPDATE" in statement:
            connection.execute("DELETE FROM metadata_values WHERE value = 2001")
        connection.execute(statement)
    with Collection.open(indexed.path, encoder) as opened:
        assert {fault.kind for fault in opened.verify()} == {"metadata"}
        report = opened.repair()
        assert (report.metadata_rebuilt, report.requeued, report.remaining) == (True, 0, [])
        assert opened.select("year in 2001, 2002") == [2, 3]
        opened.remove([2])
        assert opened.select("year in 2001, 2002") == [3]
        assert opened.verify() == []


def test_words_go_and_come_back_with_lost_vectors(
    indexed: Collection, encoder: ColourEncoder
) -> None:
    flip_a_bit(sorted((indexed.path / "segments").iterdir())[1])
    with Collection.open(indexed.path, encoder, to_repair=True) as opened:
        opened.repair()
        assert len(opened.search(words="thing")) == 4
        opened.retry_failures(show_progress=False)
        assert len(opened.search(words="thing")) == 6
        assert opened.verify() == []


def test_damaged_database_is_not_made_up(indexed: Collection) -> None:
    indexed.close()
    path = indexed.path / "items.sqlite"
    data = bytearray(path.read_bytes())
    for page in range(4, len(data) // 4096):
        data[4096 * page : 4096 * page + 64] = b"\xff" * 64
    path.write_bytes(data)
    with (
        pytest.raises(CollectionError, match=r"items\.sqlite"),
        Collection.open(indexed.path, ColourEncoder()) as opened,
    ):
        opened.repair()


def test_ledger_is_retried_with_what_it_knows(collection: Collection, photos: Path) -> None:
    table = photos.parent / "t.csv"
    table.write_text("path,caption,year\nphotos/x.png,an x,1999\n", encoding="utf-8")
    (photos / "x.png").write_bytes(b"no image yet")
    collection.add(table, show_progress=False)
    assert collection.add(table, show_progress=False).known_failures == 1
    assert collection.retry_failures(show_progress=False).failed == 1
    assert collection.failures()[0].attempts == 2
    (photos / "x.png").write_bytes((photos / "red.png").read_bytes())
    assert collection.retry_failures(show_progress=False).added == 1
    (item,) = collection.items()
    assert (item.caption, item.metadata) == ("an x", {"year": 1999})
    assert collection.add(table, show_progress=False).unchanged == 1
