"""Another model: built beside the old vectors, swapped at once, resumed after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import clipsys
from clipsys.errors import CollectionError
from clipsys.retrieval import Collection
from clipsys.retrieval.ingest import pending
from clipsys.retrieval.maintenance.migration import MigrationOptions
from tests.retrieval.colours import COLOURS, ColourEncoder, paint, paint_folder
from tests.retrieval.commands.test_index import run

ROOT = Path(__file__).parents[3]


@pytest.fixture
def new() -> ColourEncoder:
    return ColourEncoder(dim=40, seed=7)


@pytest.fixture
def indexed(collection: Collection, photos: Path) -> Collection:
    collection.add(photos, show_progress=False)
    collection.remove([2])
    (photos / "bad.png").write_bytes(b"")
    table = photos.parent / "t.csv"
    rows = [f"photos/{name}.png,{2000 + n}" for n, name in enumerate(COLOURS) if n != 1]
    table.write_text("\n".join(["path,year", *rows, "photos/bad.png,1"]), encoding="utf-8")
    collection.add(table, show_progress=False)
    return collection


def facts(collection: Collection) -> list[tuple[object, ...]]:
    return [(i.id, i.uri, i.captions, i.metadata, i.mtime_ns) for i in collection.items()]


def test_migration_keeps_items_and_changes_vectors(
    indexed: Collection, photos: Path, new: ColourEncoder
) -> None:
    before = facts(indexed)
    report = indexed.migrate(new, show_progress=False)
    assert (report.added, report.failed) == (6, 0)
    with Collection.open(indexed.path, new) as opened:
        assert opened.verify() == []
        assert facts(opened) == before
        assert opened.info().model_name == "colours-7"
        assert opened.info().dim == 40
        assert len(opened.failures()) == 1
        assert Path(opened.search("red", k=1)[0].uri).stem == "red"
        assert opened.add(photos.parent / "t.csv", show_progress=False).unchanged == 5
        paint(photos / "late.png", "red")
        opened.add(photos / "..", show_progress=False)
        assert max(item.id for item in opened.items()) > 6, "ids are never used again"
    with pytest.raises(CollectionError, match="of model colours-7"):
        Collection.open(indexed.path, ColourEncoder())


def test_words_and_the_plan_of_the_index_come_along(
    indexed: Collection, new: ColourEncoder, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    indexed.remove([hit.id for hit in indexed.search(words="green")])
    expected = [(hit.id, hit.caption) for hit in indexed.search(words="square -red")]
    assert expected
    monkeypatch.setattr("clipsys.retrieval.indexes.planning.EXACT_ITEMS", 1)
    indexed.migrate(new, show_progress=False)
    with Collection.open(indexed.path, new) as opened:
        assert [(hit.id, hit.caption) for hit in opened.search(words="square -red")] == expected
        assert opened.index is not None
        assert opened.index.kind.startswith("ivf")
        assert opened.index.generation == 2
        assert opened.index.effort is not None
        assert set(opened.index.effort.recall) == {"image", "text"}
        opened.remove([expected[0][0]])
        assert len(opened.search(words="square -red")) == len(expected) - 1
        assert opened.verify() == []


def test_open_reader_goes_on_with_the_old_vectors(
    indexed: Collection, new: ColourEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    with Collection.open(indexed.path, ColourEncoder()) as reader:
        expected = reader.search("red", k=5)
        indexed.migrate(new, show_progress=False)
        assert reader.search("red", k=5) == expected
        assert reader.search("blue", k=5)
        assert "its vectors are now of model colours-7" in caplog.text
        with pytest.raises(CollectionError, match="are now of model colours-7"):
            reader.remove([1])


def test_readers_search_while_it_is_built(indexed: Collection, tmp_path: Path) -> None:
    inside, leave = threading.Event(), threading.Event()

    class Slow(ColourEncoder):
        def encode_pixels(self, pixels_BCHW):  # type: ignore[no-untyped-def]
            inside.set()
            leave.wait(10)
            return super().encode_pixels(pixels_BCHW)

    thread = threading.Thread(
        target=lambda: indexed.migrate(Slow(dim=40, seed=7), show_progress=False)
    )
    thread.start()
    try:
        assert inside.wait(10)
        with Collection.open(indexed.path, ColourEncoder()) as reader:
            assert len(reader.search("red", k=9)) == 6
            with pytest.raises(CollectionError, match="another writer"):
                reader.add(tmp_path / "photos", show_progress=False)
    finally:
        leave.set()
        thread.join()
    with Collection.open(indexed.path, ColourEncoder(dim=40, seed=7)) as opened:
        assert opened.verify() == []


def test_old_edition_is_deleted_after_its_grace(
    indexed: Collection, new: ColourEncoder, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    indexed.migrate(new, show_progress=False)
    kept = {path.name for path in indexed.path.iterdir()}
    assert {"items.sqlite", "segments", "indexes", "edition-1"} <= kept
    indexed.close()
    monkeypatch.setattr("clipsys.retrieval.writing.writer.GRACE_S", 0.0)
    with Collection.open(indexed.path, new) as opened:
        opened.add(photos, show_progress=False)
        left = sorted(path.name for path in indexed.path.iterdir())
        assert left == ["edition-1", "manifest.json", "writer.lock"]
        opened.migrate(ColourEncoder(), show_progress=False)
    with Collection.open(indexed.path, ColourEncoder()) as back:
        assert back.verify() == []
        assert Path(back.search("red", k=1)[0].uri).stem == "red"
        back.compact()
        assert {path.name for path in indexed.path.iterdir()} == {
            "edition-2",
            "manifest.json",
            "writer.lock",
        }


def test_same_model_is_refused(indexed: Collection) -> None:
    with pytest.raises(CollectionError, match="of model colours-0 already"):
        indexed.migrate(ColourEncoder(), show_progress=False)


def test_many_unreadable_images_stop_it_and_the_collection_is_as_it_was(
    indexed: Collection, photos: Path, new: ColourEncoder
) -> None:
    expected = indexed.search("red", k=9)
    (photos / "blue.png").rename(photos / "blue.away")
    with pytest.raises(CollectionError, match=r"1 of 6 images cannot be read .* --yes"):
        indexed.migrate(new, show_progress=False)
    assert indexed.search("red", k=9) == expected
    options = MigrationOptions(loss_limit=1.0)
    assert indexed.migrate(new, options=options, show_progress=False).failed == 1
    with Collection.open(indexed.path, new) as opened:
        assert len(opened) == 5
        assert len(opened.failures()) == 2
        (photos / "blue.away").rename(photos / "blue.png")
        assert opened.retry_failures(show_progress=False).added == 1


def test_interrupted_migration_resumes_and_follows_what_changed_meanwhile(
    tmp_path: Path, collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pending, "COMMIT_INTERVAL_S", 0.0)
    folder = paint_folder(tmp_path / "many", num_images=30)
    collection.add(folder, show_progress=False)

    class Interrupted(ColourEncoder):
        def encode_pixels(self, pixels_BCHW):  # type: ignore[no-untyped-def]
            if self.num_encoded >= 12:
                raise KeyboardInterrupt
            return super().encode_pixels(pixels_BCHW)

    options = MigrationOptions(batch_size=4)
    with pytest.raises(KeyboardInterrupt):
        collection.migrate(Interrupted(seed=7), options=options, show_progress=False)
    assert collection.verify() == []
    paint(folder / "0002.png", "red", mark=5)  # changed, removed, captioned, added
    paint(folder / "new.png", "green", mark=5)
    (folder / "0005.txt").write_text("a caption", encoding="utf-8")
    collection.add(folder, show_progress=False)
    collection.remove([1])
    before = facts(collection)
    resumed = ColourEncoder(seed=7)
    collection.migrate(resumed, options=options, show_progress=False)
    assert resumed.num_encoded == 31 - 1 - 10
    with Collection.open(collection.path, resumed) as opened:
        assert opened.verify() == []
        assert facts(opened) == before
        assert len(opened.search("red", k=99)) == 30


def test_another_target_starts_anew(
    tmp_path: Path, collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = paint_folder(tmp_path / "many", num_images=6)
    collection.add(folder, show_progress=False)
    monkeypatch.setattr("clipsys.retrieval.maintenance.migration._swap", lambda *_: None)
    collection.migrate(ColourEncoder(seed=7), show_progress=False)
    monkeypatch.undo()
    other = ColourEncoder(dim=12, seed=8)
    assert collection.migrate(other, show_progress=False).added == 6
    with Collection.open(collection.path, other) as opened:
        assert opened.verify() == []
        assert len(opened) == 6


_SCRIPT = """
import sys
from clipsys.retrieval import Collection
from clipsys.retrieval.ingest import embedding, pending
from tests.retrieval.colours import ColourEncoder
pending.COMMIT_INTERVAL_S = 0.0
from clipsys.retrieval.maintenance.migration import MigrationOptions
class Telling(ColourEncoder):
    def encode_pixels(self, pixels):
        print("batch", flush=True)
        return super().encode_pixels(pixels)
with Collection.open(sys.argv[1]) as photos:
    photos.migrate(Telling(seed=7), options=MigrationOptions(batch_size=2), show_progress=False)
"""


def test_killed_migration_leaves_the_old_collection_and_resumes(
    tmp_path: Path, collection: Collection
) -> None:
    folder = paint_folder(tmp_path / "many", num_images=40)
    collection.add(folder, show_progress=False)
    expected = collection.search("red", k=40)
    for batches in (3, 6):
        command = [sys.executable, "-c", _SCRIPT, str(collection.path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
            assert process.stdout is not None
            for _ in range(batches):
                assert process.stdout.readline() == "batch\n"
            os.kill(process.pid, signal.SIGKILL)
        assert collection.search("red", k=40) == expected
        assert collection.verify() == []
    last = ColourEncoder(seed=7)
    collection.migrate(last, show_progress=False)
    assert last.num_encoded <= 40 - 2 * (2 + 5)
    with Collection.open(collection.path, last) as opened:
        assert opened.verify() == []
        assert [item.id for item in opened.items()] == list(range(1, 41))


def test_command_migrates_and_adds(
    tmp_path: Path,
    photos: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clipsys, "load", lambda spec, **_: ColourEncoder(seed=int(spec)))
    run(capsys, "index", tmp_path / "c", photos, "--model", "0")
    status, _, err = run(capsys, "index", tmp_path / "c", "--migrate")
    assert (status, "--migrate needs the new model" in err) == (1, True)
    paint(photos / "late.png", "red", mark=3)
    status, out, _ = run(capsys, "index", tmp_path / "c", photos, "--model", "1", "--migrate")
    assert status == 0
    assert "now of model 1; 6 added" in out
    assert "1 added, 6 unchanged" in out
    assert json.loads(run(capsys, "info", tmp_path / "c", "--json")[1])["model"] == "1"
    assert run(capsys, "index", tmp_path / "c")[0] == 0
