"""Compaction drops what is deleted, joins what is small, and disturbs nobody."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipsys.errors import CollectionError
from clipsys.retrieval import Collection
from clipsys.retrieval.ingest import pending
from clipsys.retrieval.storage.items import Location
from clipsys.retrieval.storage.store import Store
from clipsys.retrieval.writing import compaction, writer
from tests.retrieval.colours import ColourEncoder, paint, paint_folder


@pytest.fixture
def no_grace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replaced files may go at once."""
    monkeypatch.setattr(compaction, "GRACE_S", 0.0)
    monkeypatch.setattr("clipsys.retrieval.writing.writer.GRACE_S", 0.0)
    yield


@pytest.fixture
def many(tmp_path: Path, collection: Collection, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Thirty images, committed in segments of three."""
    monkeypatch.setattr(pending, "COMMIT_INTERVAL_S", 0.0)
    folder = paint_folder(tmp_path / "many", num_images=30)
    collection.add(folder, batch_size=3, show_progress=False)
    return folder


def segment_files(collection: Collection) -> list[Path]:
    return sorted((collection.path / "segments").iterdir())


def found(collection: Collection) -> list[tuple[int, str, float]]:
    return [(hit.id, hit.uri, hit.score) for hit in collection.search("red", k=100)]


def test_compaction_changes_no_answer_and_drops_the_deleted(
    collection: Collection, many: Path, no_grace: None
) -> None:
    collection.remove(range(1, 15))
    expected = found(collection)
    report = collection.compact()
    assert (report.vectors_dropped, report.segments_before, report.segments_after) == (14, 10, 1)
    assert found(collection) == expected
    assert collection.verify() == []
    assert collection.info().num_indexed == 16
    collection.compact()  # a writer that comes later deletes what was replaced
    assert len(segment_files(collection)) == 1
    with Collection.open(collection.path, ColourEncoder()) as opened:
        assert found(opened) == expected


def test_compacting_twice_changes_nothing(collection: Collection, many: Path) -> None:
    collection.compact()
    before = collection.info()
    report = collection.compact()
    assert (report.vectors_dropped, report.segments_before, report.segments_after) == (0, 1, 1)
    assert collection.info().index_generation == before.index_generation


def test_compaction_of_everything_deleted_leaves_an_empty_collection(
    collection: Collection, many: Path, no_grace: None
) -> None:
    collection.remove([item.id for item in collection.items()])
    collection.compact()
    collection.compact()
    assert segment_files(collection) == []
    assert collection.verify() == []
    assert collection.search("red") == []
    assert collection.add(many, show_progress=False).added == 30
    assert min(item.id for item in collection.items()) > 30, "ids are never used again"


def test_copies_go_on_sharing_one_vector(collection: Collection, many: Path) -> None:
    (many / "copy.png").write_bytes((many / "0004.png").read_bytes())
    collection.add(many, show_progress=False)
    (original,) = (item.id for item in collection.items() if item.uri.endswith("0004.png"))
    collection.remove([original])
    collection.compact()
    assert len(collection) == 30
    (path,) = [path for path in segment_files(collection) if len(np.load(path)) == 30]
    assert path.exists()
    assert collection.verify() == []


def test_reader_of_the_old_segments_goes_on(collection: Collection, many: Path) -> None:
    with Collection.open(collection.path, ColourEncoder()) as reader:
        snapshot = reader._view.snapshot()
        collection.remove(range(1, 15))
        collection.compact()
        vectors = snapshot.take(np.arange(30))  # none of these files was open before
        assert vectors.shape == (30, 24)
        assert len(found(reader)) == 16


def test_reader_that_missed_a_purge_starts_anew(
    collection: Collection, many: Path, no_grace: None
) -> None:
    with Collection.open(collection.path, ColourEncoder()) as reader:
        assert len(found(reader)) == 30
        collection.remove(range(1, 15))
        collection.compact()
        report = collection.compact()
        assert report.items_forgotten == 14
        assert found(reader) == found(collection)
        assert len(found(reader)) == 16


def test_many_small_segments_are_joined_without_being_asked(
    collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pending, "COMMIT_INTERVAL_S", 0.0)
    folder = paint_folder(tmp_path / "many", num_images=150)
    collection.add(folder, batch_size=1, show_progress=False)
    assert collection.info().num_segments < 2 * compaction.SEGMENTS_PER_TIER
    assert len(found(collection)) == 100
    assert len(collection) == 150
    assert collection.verify() == []


def test_altered_segment_is_not_copied_on(collection: Collection, many: Path) -> None:
    path = segment_files(collection)[3]
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CollectionError, match=rf"{path.name}: .*SHA-256 differs.*repair"):
        collection.compact()


def test_replaced_files_stay_for_readers_until_the_grace_is_over(
    collection: Collection, many: Path
) -> None:
    collection.compact()
    assert len(segment_files(collection)) == 11
    with closing(Store(collection.path / "items.sqlite")) as store:
        assert compaction.due(store) == []
        later = 10 * compaction.GRACE_S
        assert len(compaction.due(store, now=later + 4e9)) == 10
    paint(many / "one.png", "red")
    collection.add(many, show_progress=False)  # another writer, within the grace
    assert len(segment_files(collection)) == 12


def test_words_follow_removal_compaction_and_forgetting(
    collection: Collection, photos: Path, no_grace: None
) -> None:
    collection.add(photos, show_progress=False)
    (photos / "red.txt").write_text("a crimson circle", encoding="utf-8")
    collection.add(photos, show_progress=False)
    collection.remove([collection.search(words="blue")[0].id])
    (photos / "green.png").unlink()
    collection.add(photos, show_progress=False, prune_vanished=True, prune_limit=1.0)
    squares = {hit.id for hit in collection.search(words="square")}
    assert len(squares) == len(collection) - 1
    assert len(collection.search(words="crimson")) == 1
    for _ in range(3):
        collection.compact()
        assert {hit.id for hit in collection.search(words="square")} == squares
        assert collection.verify() == []
    assert collection.info().num_deleted == 0


def test_copies_find_their_vector_where_joining_has_put_it_meanwhile(
    tmp_path: Path, encoder: ColourEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Workers look ahead: what they know of a vector's place may be older than the last joining.
    for module in (compaction, writer):
        monkeypatch.setattr(module, "SEGMENTS_PER_TIER", 2)
    monkeypatch.setattr(pending, "COMMIT_INTERVAL_S", 0.0)
    folder = paint_folder(tmp_path / "many", num_images=24)
    for number in range(0, 24, 2):  # a copy of one of the first four before each new image
        source = folder / f"{number % 4 + 1:04d}.png"
        shutil.copy(source, folder / f"{number:04d}-copy.png")
    with Collection.create(tmp_path / "c", encoder) as photos:
        report = photos.add(folder, batch_size=2, num_workers=4, show_progress=False)
        assert report.total == len(photos) == 36
        assert photos.verify() == []
        for item in photos.items():
            (vector,) = encoder.encode_image([Image.open(item.uri)])
            assert photos.vector(item.id) @ vector > 0.999


def test_copy_whose_original_went_before_it_is_committed_is_encoded(
    collection: Collection, many: Path, encoder: ColourEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection.add(many, show_progress=False)
    for number in range(5):
        shutil.copy(many / f"{number:04d}.png", many / f"copy-{number}.png")
    find, committing = Store.find_vector, threading.current_thread()

    def find_in_workers(store: Store, content_hash: str) -> Location | None:
        gone = threading.current_thread() is committing
        return None if gone else find(store, content_hash)

    monkeypatch.setattr(Store, "find_vector", find_in_workers)
    report = collection.add(many, show_progress=False)
    assert (report.added, report.reused, report.unchanged) == (5, 0, 30)
    assert collection.verify() == []
    for item in collection.items():
        (vector,) = encoder.encode_image([Image.open(item.uri)])
        assert collection.vector(item.id) @ vector > 0.999
