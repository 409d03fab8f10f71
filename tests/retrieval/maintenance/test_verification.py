from __future__ import annotations

import os
import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from clipsys.errors import CollectionError
from clipsys.retrieval import Collection
from clipsys.retrieval.maintenance.verification import verify
from clipsys.retrieval.storage import durable
from clipsys.retrieval.storage.manifest import read_manifest, write_manifest
from tests.retrieval.colours import ColourEncoder, paint


def run_sql(folder: Path, statement: str) -> None:
    with closing(sqlite3.connect(folder / "items.sqlite")) as connection, connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute(statement)


def only_file(folder: Path, name: str) -> Path:
    (path,) = (folder / name).iterdir()
    return path


def zero_a_row(folder: Path) -> None:
    path = only_file(folder, "segments")
    rows = np.load(path)
    rows[2] = 0
    np.save(path, rows)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    later(path)


def later(path: Path) -> None:
    """A file system's clock may stand still for milliseconds."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))


def overwrite_a_page(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096 * 3 : 4096 * 4] = bytes(4096)
    path.write_bytes(data)


def forget_the_last_ids(folder: Path) -> None:
    """What a database restored from an older backup than the index looks like."""
    run_sql(folder, "DELETE FROM items")
    run_sql(folder, "DELETE FROM segments")
    run_sql(folder, "UPDATE sqlite_sequence SET seq = 0 WHERE name = 'items'")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: cut(only_file(f, "segments")), r"\.npy: .*cannot be read"),
    (lambda f: cut(only_file(f, "indexes")), r"\.faiss: .*damaged"),
    (lambda f: cut(f / "items.sqlite"), r"items\.sqlite: is cut off"),
    (lambda f: cut(f / "manifest.json"), r"manifest\.json: not a manifest"),
    (lambda f: (f / "items.sqlite").unlink(), r"items\.sqlite: .*cannot be opened"),
    (lambda f: (f / "items.sqlite").write_bytes(b""), r"items\.sqlite: is not the database"),
    (lambda f: overwrite_a_page(f / "items.sqlite"), r"items\.sqlite: "),
    (lambda f: flip_a_bit(only_file(f, "segments")), r"\.npy: .*SHA-256 differs"),
    (lambda f: zero_a_row(f), r"\.npy: .*SHA-256 differs"),
    (lambda f: only_file(f, "segments").unlink(), r"\.npy: .*cannot be read"),
    (lambda f: flip_a_bit(only_file(f, "indexes")), r"\.faiss: .*damaged"),
    (lambda f: only_file(f, "indexes").unlink(), r"\.faiss: the index file is missing"),
    (lambda f: (f / "manifest.json").write_text("{"), r"manifest\.json: not a manifest"),
    (lambda f: (f / "items.sqlite").write_bytes(b"x" * 4096), r"items\.sqlite: .*cannot be opened"),
    (
        lambda f: run_sql(f, "UPDATE items SET row = 99 WHERE id = 2"),
        "item 2: its vector .* not exist",
    ),
    (lambda f: run_sql(f, "DELETE FROM items WHERE id = 3"), "1 rows belong to no item"),
    (
        lambda f: run_sql(f, "UPDATE items SET segment = NULL WHERE id = 2"),
        r"items\.sqlite: CHECK constraint failed in items",
    ),
    (
        lambda f: run_sql(f, "UPDATE sqlite_sequence SET seq = 2 WHERE name = 'items'"),
        r"items\.sqlite: the id counter is behind item 6",
    ),
    (
        lambda f: run_sql(f, "UPDATE state SET value = 0 WHERE name = 'change'"),
        r"items\.sqlite: the change counter is behind change 1",
    ),
    (
        lambda f: run_sql(f, "UPDATE items SET captions = '{}' WHERE id = 4"),
        "item 4: its captions or metadata are not of their form",
    ),
    (
        lambda f: run_sql(
            f,
            "INSERT INTO failures (uri, reason, message, captions, metadata) "
            "VALUES ('/x.jpg', '', '', '[]', '{}')",
        ),
        r"/x\.jpg: is in the failure ledger without a reason",
    ),
    (lambda f: run_sql(f, "DELETE FROM caption_words"), r"words: 6 rows are not the captions"),
    (
        lambda f: run_sql(f, "UPDATE caption_words SET text = 'a lie' WHERE rowid = 2"),
        r"words: 2 rows are not the captions",
    ),
    (
        lambda f: run_sql(f, "UPDATE caption_words_content SET c0 = 'a lie' WHERE id = 2"),
        r"words: its index is not that of its rows",
    ),
    (
        lambda f: run_sql(f, "DROP TRIGGER caption_words_retire"),
        r"words: trigger caption_words_retire is missing",
    ),
    (lambda f: run_sql(f, "DROP TABLE caption_words_data"), r"items\.sqlite.*(words|no such)"),
    (
        lambda f: run_sql(f, "INSERT INTO metadata_keys VALUES (1, 'ghost')"),
        "metadata index: 1 keys are of no live item",
    ),
    (lambda f: run_sql(f, "DROP TABLE metadata_postings"), r"metadata index: .*no such table"),
    (forget_the_last_ids, r"\.faiss: covers items up to 6, which the database never had"),
]


def test_index_that_lacks_what_it_claims_is_named(collection: Collection, photos: Path) -> None:
    collection.add(photos, show_progress=False)
    paint(photos / "late.png", "red", mark=4)
    collection.add(photos, show_progress=False)
    assert collection.verify() == []
    manifest = read_manifest(collection.path)
    assert manifest.index is not None
    boast = manifest.index.model_copy(update={"last_id": 7})
    write_manifest(collection.path, manifest.model_copy(update={"index": boast}))
    (fault,) = collection.verify()
    assert (fault.kind, fault.problem) == ("index", "lacks 1 of the items that it is to cover")
    assert collection.repair().index_rebuilt
    assert collection.verify() == []


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damage_is_named(
    collection: Collection, photos: Path, damage: Callable[[Path], object], message: str
) -> None:
    collection.add(photos, show_progress=False)
    collection.close()
    damage(collection.path)
    faults = collection.verify()
    assert faults
    assert any(re.search(message, str(fault)) for fault in faults), faults
    assert all(fault.place and fault.problem and "\n" not in str(fault) for fault in faults)


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (lambda f: cut(f / "items.sqlite"), "items.sqlite"),
        (lambda f: (f / "items.sqlite").write_bytes(b""), "items.sqlite"),
        (lambda f: cut(f / "manifest.json"), "manifest.json"),
        (lambda f: overwrite_a_page(f / "items.sqlite"), "items.sqlite"),
        (lambda f: cut(only_file(f, "segments")), ".npy"),
        (lambda f: flip_a_bit(only_file(f, "segments")), ".npy"),
        (lambda f: zero_a_row(f), ".npy"),
        (lambda f: only_file(f, "segments").unlink(), ".npy"),
    ],
)
def test_damage_is_named_when_it_is_met(
    collection: Collection, photos: Path, damage: Callable[[Path], object], name: str
) -> None:
    collection.add(photos, show_progress=False)
    collection.close()
    damage(collection.path)
    only_file(collection.path, "indexes").unlink()
    with (
        pytest.raises(CollectionError, match=re.escape(name)),
        Collection.open(collection.path, ColourEncoder()) as opened,
    ):
        opened.search("red")


@pytest.mark.parametrize("damage", [flip_a_bit, cut, Path.unlink])
def test_damaged_vectors_are_refused_by_opening_alone(
    collection: Collection, photos: Path, damage: Callable[[Path], object]
) -> None:
    collection.add(photos, show_progress=False)
    collection.close()
    path = only_file(collection.path, "segments")
    damage(path)
    with pytest.raises(CollectionError, match=rf"{path.name}: .*clipsys repair") as caught:
        Collection.open(collection.path)
    assert "\n" not in str(caught.value)


def test_damage_of_the_index_is_named_when_it_is_met_and_searched_without(
    collection: Collection, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    collection.add(photos, show_progress=False)
    expected = [hit.id for hit in collection.search("red", k=9)]
    path = only_file(collection.path, "indexes")
    for damage in (flip_a_bit, cut, Path.unlink):
        damage(path)
        caplog.clear()
        with Collection.open(collection.path, ColourEncoder()) as opened:
            assert [hit.id for hit in opened.search("red", k=9)] == expected
        assert path.name in caplog.text


def test_copied_collection_opens_and_is_hashed_until_a_writer_noted_its_times(
    collection: Collection, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection.add(photos, show_progress=False)
    collection.close()
    copy = tmp_path / "copy"
    shutil.copytree(collection.path, copy, copy_function=shutil.copyfile)
    later(only_file(copy, "segments"))
    hashed: list[str] = []
    real = durable.sha256_of
    monkeypatch.setattr(durable, "sha256_of", lambda path: hashed.append(path.suffix) or real(path))

    def open_and_search() -> int:
        hashed.clear()
        with Collection.open(copy, ColourEncoder(), few_searches=True) as opened:
            assert len(opened.search("red", k=9)) == 6
        return hashed.count(".npy")

    assert open_and_search() == 1
    assert open_and_search() == 1  # readers do not write
    with Collection.open(copy, ColourEncoder()) as opened:
        opened.remove([99])
    assert open_and_search() == 0
    assert verify(copy) == []


def test_vectors_that_another_process_committed_are_looked_at_too(
    collection: Collection, photos: Path
) -> None:
    with Collection.open(collection.path, ColourEncoder(), few_searches=True) as reader:
        collection.add(photos, show_progress=False)
        path = only_file(collection.path, "segments")
        flip_a_bit(path)
        with pytest.raises(CollectionError, match=path.name):
            reader.search("red")


def test_index_of_another_hash_is_never_given_to_faiss(
    collection: Collection, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection.add(photos, show_progress=False)
    flip_a_bit(only_file(collection.path, "indexes"))

    def unreachable(*_: object) -> None:
        raise AssertionError("FAISS read a file that is not the published one")

    monkeypatch.setattr("faiss.read_index", unreachable)
    with Collection.open(collection.path, ColourEncoder()) as opened:
        assert len(opened.search("red", k=9)) == 6
        assert [fault.kind for fault in opened.verify()] == ["index"]


def test_sound_collection_has_no_faults(collection: Collection, photos: Path) -> None:
    collection.add(photos, show_progress=False)
    collection.remove([2])
    assert collection.verify() == []
