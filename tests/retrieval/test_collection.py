from __future__ import annotations

import logging
import shutil
import tarfile
import threading
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipsys.errors import CollectionError, DataError, ModelError, QueryError
from clipsys.retrieval import Collection, Hit, Part, Query
from clipsys.retrieval.storage.items import Batch, NewItem
from clipsys.retrieval.storage.store import Store
from tests.retrieval.colours import COLOURS, ColourEncoder, paint, paint_folder


def names(hits: list[Hit]) -> list[str]:
    return [Path(hit.uri).stem for hit in hits]


# ---- creating and opening ----------------------------------------------------------------------


def test_collection_can_be_opened_again_without_naming_paths_twice(
    tmp_path: Path, encoder: ColourEncoder, photos: Path
) -> None:
    with Collection.create(tmp_path / "c", encoder) as made:
        made.add(photos, show_progress=False)
        found = made.search("red", k=3)
    with Collection.open(tmp_path / "c", encoder) as opened:
        assert opened.search("red", k=3) == found
        assert len(opened) == len(COLOURS)


def test_empty_folder_may_become_a_collection(tmp_path: Path, encoder: ColourEncoder) -> None:
    (tmp_path / "c").mkdir()
    with Collection.create(tmp_path / "c", encoder) as made:
        assert made.verify() == []


def test_create_refuses_what_is_in_use(tmp_path: Path, encoder: ColourEncoder) -> None:
    Collection.create(tmp_path / "c", encoder).close()
    with pytest.raises(CollectionError, match="a collection here already"):
        Collection.create(tmp_path / "c", encoder)
    paint(tmp_path / "photos" / "a.png", "red")
    for path in (tmp_path / "photos", tmp_path / "photos" / "a.png"):
        with pytest.raises(CollectionError, match="not an empty folder and not a collection"):
            Collection.create(path, encoder)


def test_failed_create_leaves_nothing(
    tmp_path: Path, encoder: ColourEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clipsys.retrieval.storage.creation.write_manifest", full_disk)
    with pytest.raises(CollectionError, match="No space left"):
        Collection.create(tmp_path / "c", encoder)
    assert list(tmp_path.iterdir()) == []


def test_create_removes_what_a_killed_create_left(tmp_path: Path, encoder: ColourEncoder) -> None:
    abandoned = tmp_path / ".c.creating-0011"
    (abandoned / "segments").mkdir(parents=True)
    Collection.create(tmp_path / "c", encoder).close()
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_opening_what_is_not_a_collection_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CollectionError, match="no collection here; create it with `clipsys index`"):
        Collection.open(tmp_path / "none")
    (tmp_path / "manifest.json").write_text('{"format": "else"}')
    with pytest.raises(CollectionError, match=r"manifest\.json: not a manifest of this version"):
        Collection.open(tmp_path)


def test_another_model_is_refused_with_both_names(collection: Collection) -> None:
    with pytest.raises(CollectionError, match=r"of model colours-0 .*, not of colours-5 "):
        Collection.open(collection.path, ColourEncoder(seed=5))


def test_missing_model_is_an_error_when_it_is_first_needed(
    tmp_path: Path, encoder: ColourEncoder, photos: Path
) -> None:
    spec = str(tmp_path / "gone")
    with Collection.create(tmp_path / "c", encoder, model=spec) as made:
        made.add(photos, show_progress=False)
    with Collection.open(tmp_path / "c") as opened:
        assert opened.info().num_items == len(COLOURS)
        with pytest.raises(ModelError, match=r"its model colours-0 cannot be loaded from .*gone"):
            opened.search("red")


# ---- adding -----------------------------------------------------------------------------------


def test_added_items_are_found_with_caption_and_exact_score(
    collection: Collection, photos: Path, encoder: ColourEncoder
) -> None:
    report = collection.add(photos, show_progress=False)
    assert (report.added, report.total) == (len(COLOURS), len(COLOURS))
    hits = collection.search("red", k=2)
    assert [hit.rank for hit in hits] == [1, 2]
    assert hits[0].uri == str(photos / "red.png")
    assert hits[0].caption == "a red square"
    image = encoder.encode_image([Image.open(hits[1].uri)])[0]
    text = encoder.encode_text(["red"])[0]
    assert hits[0].score == pytest.approx(1.0, abs=1e-3)
    assert hits[1].score == pytest.approx(float(image @ text), abs=1e-3)


def test_second_run_reads_and_encodes_nothing(
    collection: Collection, photos: Path, encoder: ColourEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection.add(photos, show_progress=False)
    before = encoder.num_encoded

    def unreadable(path: Path) -> bytes:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr("clipsys.corpora.records.read_file", unreadable)
    report = collection.add(photos, show_progress=False)
    assert (report.unchanged, report.total) == (len(COLOURS), len(COLOURS))
    assert encoder.num_encoded == before


def test_touched_file_is_read_but_not_encoded(
    collection: Collection, photos: Path, encoder: ColourEncoder
) -> None:
    collection.add(photos, show_progress=False)
    before = encoder.num_encoded
    data = (photos / "red.png").read_bytes()
    (photos / "red.png").unlink()
    (photos / "red.png").write_bytes(data)
    report = collection.add(photos, show_progress=False)
    assert (report.updated, report.unchanged) == (1, len(COLOURS) - 1)
    assert encoder.num_encoded == before
    assert collection.add(photos, show_progress=False).unchanged == len(COLOURS)


def test_changed_file_gets_a_new_vector_and_a_new_id(collection: Collection, photos: Path) -> None:
    collection.add(photos, show_progress=False)
    old = {item.uri: item.id for item in collection.items()}
    paint(photos / "red.png", "blue", mark=3)
    report = collection.add(photos, show_progress=False)
    assert report.changed == 1
    new = {item.uri: item.id for item in collection.items()}
    assert new.keys() == old.keys()
    assert new[str(photos / "red.png")] > max(old.values())
    assert set(names(collection.search("blue", k=2))) == {"red", "blue"}
    assert collection.verify() == []


def test_moved_file_keeps_its_item(
    collection: Collection, photos: Path, encoder: ColourEncoder
) -> None:
    collection.add(photos, show_progress=False)
    before, ids = encoder.num_encoded, [item.id for item in collection.items()]
    (photos / "red.png").rename(photos / "rouge.png")
    report = collection.add(photos, show_progress=False)
    assert (report.moved, report.reused) == (1, 0)
    assert encoder.num_encoded == before
    assert names(collection.search("red", k=1)) == ["rouge"]
    assert [item.id for item in collection.items()] == ids
    assert collection.verify() == []


def test_changed_caption_needs_no_encoding(
    collection: Collection, photos: Path, encoder: ColourEncoder
) -> None:
    collection.add(photos, show_progress=False)
    before = encoder.num_encoded
    (photos / "red.txt").write_text("une tomate\n", encoding="utf-8")
    assert collection.add(photos, show_progress=False).updated == 1
    assert collection.search("red", k=1)[0].caption == "une tomate"
    assert encoder.num_encoded == before


def test_table_adds_metadata_and_the_bare_folder_does_not_remove_it(
    collection: Collection, photos: Path
) -> None:
    for text in photos.glob("*.txt"):
        text.unlink()
    table = photos.parent / "table.csv"
    rows = [f"photos/{name}.png,{name} thing,{2000 + n}" for n, name in enumerate(COLOURS)]
    table.write_text("\n".join(["path,caption,year", *rows]), encoding="utf-8")
    collection.add(photos, show_progress=False)
    assert collection.add(table, show_progress=False).updated == len(COLOURS)
    assert collection.add(photos, show_progress=False).unchanged == len(COLOURS)
    hit = collection.search("green", k=1)[0]
    assert (hit.caption, hit.metadata) == ("green thing", {"year": 2001})


def test_bad_images_are_in_the_ledger_and_not_tried_again_until_they_change(
    collection: Collection, photos: Path
) -> None:
    (photos / "empty.jpg").write_bytes(b"")
    (photos / "text.jpg").write_text("not an image")
    (photos / "cut.png").write_bytes((photos / "red.png").read_bytes()[:60])
    report = collection.add(photos, show_progress=False)
    assert (report.added, report.failed) == (len(COLOURS), 3)
    reasons = {Path(failure.uri).name: failure.reason for failure in collection.failures()}
    assert reasons["empty.jpg"] == "empty"
    assert reasons["text.jpg"] == "not an image"
    assert set(reasons) == {"empty.jpg", "text.jpg", "cut.png"}
    assert "3 failed (" in report.summary()

    again = collection.add(photos, show_progress=False)
    assert (again.failed, again.known_failures) == (0, 3)
    paint(photos / "empty.jpg", "green")
    assert collection.add(photos, show_progress=False).added == 1
    assert len(collection.failures()) == 2


def test_file_that_a_table_names_and_is_missing_is_tried_again(
    collection: Collection, tmp_path: Path
) -> None:
    paint(tmp_path / "a.png", "red")
    table = tmp_path / "t.csv"
    table.write_text("path\na.png\nb.png\n", encoding="utf-8")
    for _ in range(2):
        report = collection.add(table, show_progress=False)
        assert report.reasons == {"unreadable": 1}
    assert collection.failures()[0].attempts == 2
    paint(tmp_path / "b.png", "blue")
    assert collection.add(table, show_progress=False).added == 1
    assert collection.failures() == []


def test_image_that_became_damaged_keeps_its_last_good_vector(
    collection: Collection, photos: Path
) -> None:
    collection.add(photos, show_progress=False)
    (photos / "red.png").write_bytes(b"half copied")
    report = collection.add(photos, show_progress=False)
    assert report.failed == 1
    assert names(collection.search("red", k=1)) == ["red"]
    assert collection.verify() == []


def test_sources_are_checked_before_anything_is_written(
    collection: Collection, photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError):
        collection.add(photos, tmp_path / "missing", show_progress=False)
    assert len(collection) == 0
    with pytest.raises(DataError, match="nothing to add"):
        collection.add()


def test_same_file_in_two_sources_is_one_item(collection: Collection, photos: Path) -> None:
    report = collection.add(photos, photos, show_progress=False)
    assert report.total == len(collection) == len(COLOURS)


def test_batches_and_workers_do_not_change_the_result(
    tmp_path: Path, encoder: ColourEncoder
) -> None:
    folder = paint_folder(tmp_path / "many", num_images=41)
    results = []
    for number, (batch_size, workers) in enumerate([(1, 1), (7, 3), (64, 2)]):
        with Collection.create(tmp_path / f"c{number}", encoder) as made:
            made.add(folder, batch_size=batch_size, num_workers=workers, show_progress=False)
            results.append([(hit.id, hit.uri, hit.score) for hit in made.search("red", k=41)])
            assert made.verify() == []
    assert results[0] == results[1] == results[2]


def test_interrupted_add_keeps_what_was_encoded_and_a_second_run_resumes(
    tmp_path: Path, encoder: ColourEncoder
) -> None:
    folder = paint_folder(tmp_path / "many", num_images=30)

    class Interrupted(ColourEncoder):
        def encode_pixels(self, pixels_BCHW):  # type: ignore[no-untyped-def]
            if self.num_encoded >= 12:
                raise KeyboardInterrupt
            return super().encode_pixels(pixels_BCHW)

    with Collection.create(tmp_path / "c", Interrupted()) as made:
        with pytest.raises(KeyboardInterrupt):
            made.add(folder, batch_size=4, show_progress=False)
        assert len(made) == 12
        assert made.verify() == []
    with Collection.open(tmp_path / "c", encoder) as resumed:
        report = resumed.add(folder, show_progress=False)
        assert (report.unchanged, report.added) == (12, 18)


def test_second_writer_is_refused_and_readers_are_not(collection: Collection, photos: Path) -> None:
    collection.add(photos, show_progress=False)
    with Collection.open(collection.path, ColourEncoder()) as other:
        inside, leave = threading.Event(), threading.Event()

        class Slow(ColourEncoder):
            def encode_pixels(self, pixels_BCHW):  # type: ignore[no-untyped-def]
                inside.set()
                leave.wait(10)
                return super().encode_pixels(pixels_BCHW)

        with Collection.open(collection.path, Slow()) as slow:
            more = paint_folder(photos.parent / "more", num_images=3)
            thread = threading.Thread(target=lambda: slow.add(more, show_progress=False))
            thread.start()
            assert inside.wait(10)
            with pytest.raises(CollectionError, match="another writer"):
                other.add(photos, show_progress=False)
            with pytest.raises(CollectionError, match="another writer"):
                other.remove([1])
            assert names(other.search("red", k=1)) == ["red"]
            leave.set()
            thread.join()
        assert len(other) == len(COLOURS) + 3


# ---- searching --------------------------------------------------------------------------------


def test_item_added_by_another_process_is_found_at_once(
    collection: Collection, photos: Path, encoder: ColourEncoder
) -> None:
    collection.add(photos, show_progress=False)
    assert names(collection.search("red", k=1)) == ["red"]
    with Collection.open(collection.path, encoder) as writer:
        paint(photos / "crimson.png", "red")
        writer.add(photos, show_progress=False)
        assert writer.info().index_generation == 1  # searched beside the index, not in it
    assert set(names(collection.search("red", k=2))) == {"red", "crimson"}


def test_removed_items_are_never_returned(collection: Collection, photos: Path) -> None:
    collection.add(photos, show_progress=False)
    red = collection.search("red", k=1)[0].id
    assert collection.remove([red, red, 999]) == 1
    for k in (1, 3, 100):
        assert red not in [hit.id for hit in collection.search("red", k=k)]
    assert len(collection.search("red", k=100)) == len(collection) == len(COLOURS) - 1
    with pytest.raises(QueryError, match=f"no item {red}"):
        collection.item(red)
    # Its file is still there, so the next run brings it back, under a new id.
    assert collection.add(photos, show_progress=False).added == 1
    assert collection.search("red", k=1)[0].id > red


def test_filter_is_applied_before_ranking(collection: Collection, tmp_path: Path) -> None:
    folder = paint_folder(tmp_path / "many", num_images=60)
    rows = [f"many/{n:04d}.png,{'yes' if n % 20 == 0 else 'no'}" for n in range(60)]
    table = tmp_path / "t.csv"
    table.write_text("\n".join(["path,rare", *rows]), encoding="utf-8")
    collection.add(table, show_progress=False)
    assert folder.exists()
    hits = collection.search("red", k=3, where={"rare": "yes"})
    assert sorted(names(hits)) == ["0000", "0020", "0040"]
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert collection.search("red", where="rare!=no", k=50) == collection.search(
        "red", where={"rare": "yes"}, k=50
    )


def test_filter_on_an_unknown_key_gives_nothing_and_says_so(
    collection: Collection, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    collection.add(photos, show_progress=False)
    with caplog.at_level(logging.WARNING, "clipsys"):
        assert collection.search("red", where={"yaer": 2024}) == []
        assert "no item has metadata 'yaer'" in caplog.text
        caplog.clear()
        assert collection.select("yaer<2024") == []
    assert "no item has metadata 'yaer'" in caplog.text


def test_image_query_finds_the_same_image_first(collection: Collection, photos: Path) -> None:
    collection.add(photos, show_progress=False)
    hit = collection.search(image=photos / "green.png", k=1)[0]
    assert hit.uri == str(photos / "green.png")
    assert hit.score == pytest.approx(1.0, abs=1e-3)


def test_negative_text_pushes_its_like_down(collection: Collection, photos: Path) -> None:
    collection.add(photos, show_progress=False)
    plain = {hit.uri: hit.score for hit in collection.search("white", k=10)}
    pushed = {hit.uri: hit.score for hit in collection.search("white", negative="yellow", k=10)}
    yellow = str(photos / "yellow.png")
    assert pushed[yellow] < plain[yellow]


def test_more_like_an_item_leaves_the_item_out(collection: Collection, photos: Path) -> None:
    paint(photos / "scarlet.png", "red", mark=2)
    collection.add(photos, show_progress=False)
    red = next(item for item in collection.items() if item.uri.endswith("red.png"))
    hits = collection.search(Query.of(item=red.id), k=3)
    assert names(hits)[0] == "scarlet"
    assert red.id not in [hit.id for hit in hits]
    assert len(hits) == 3


def test_vector_search_equals_text_search(
    collection: Collection, photos: Path, encoder: ColourEncoder
) -> None:
    collection.add(photos, show_progress=False)
    vector = encoder.encode_text(["blue"])[0] * 5
    assert names(collection.search_vector(vector, k=4)) == names(collection.search("blue", k=4))
    for bad in (np.zeros(24), np.ones(3), np.full(24, np.nan)):
        with pytest.raises(QueryError, match="the query vector has shape"):
            collection.search_vector(bad.astype(np.float32))


def test_empty_collection_gives_no_hits(collection: Collection) -> None:
    assert collection.search("red") == []
    assert collection.search("red", where={"a": 1}) == []
    assert collection.info().num_items == 0
    assert collection.verify() == []


def test_k_beyond_the_collection_gives_everything(collection: Collection, photos: Path) -> None:
    collection.add(photos, show_progress=False)
    assert len(collection.search("red", k=1_000)) == len(COLOURS)


@pytest.mark.parametrize("k", [0, -1, 1.5, True])
def test_k_that_is_no_count_is_an_error(collection: Collection, k: int) -> None:
    with pytest.raises(QueryError, match="k is "):
        collection.search("red", k=k)


def test_query_and_loose_parts_do_not_mix(collection: Collection) -> None:
    with pytest.raises(QueryError, match="parts of the Query"):
        collection.search(Query((Part(text="a"),)), negative="b")
    with pytest.raises(QueryError, match="something to look for"):
        collection.search()


# ---- the index is derived ----------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "altered"])
def test_lost_index_costs_nothing_but_a_warning_and_is_built_again(
    collection: Collection,
    photos: Path,
    encoder: ColourEncoder,
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    collection.add(photos, show_progress=False)
    expected = collection.search("red", k=4)
    (path,) = (collection.path / "indexes").iterdir()
    path.unlink() if damage == "missing" else path.write_bytes(b"x" + path.read_bytes()[1:])
    before = encoder.num_encoded
    with Collection.open(collection.path, encoder) as opened:
        assert len(opened.verify()) == 1
        assert opened.search("red", k=4) == expected
        assert "every vector is compared" in caplog.text
        opened.add(photos, show_progress=False)
        assert opened.verify() == []
        assert opened.search("red", k=4) == expected
    assert encoder.num_encoded == before


def test_reader_goes_on_with_its_generation_and_takes_the_next(
    collection: Collection, photos: Path, encoder: ColourEncoder
) -> None:
    collection.add(photos, show_progress=False)
    with Collection.open(collection.path, encoder) as reader:
        expected = reader.search("red", k=4)
        for _ in range(3):
            collection.build_index()
            assert reader.search("red", k=4) == expected
        assert reader.info().index_generation == 4
    assert len(list((collection.path / "indexes").iterdir())) == 1


def test_few_additions_cost_no_rebuild_and_many_do(
    collection: Collection, tmp_path: Path, photos: Path, encoder: ColourEncoder
) -> None:
    collection.add(photos, show_progress=False)
    assert collection.info().index_generation == 1
    collection.add(paint_folder(tmp_path / "few", num_images=9), show_progress=False)
    assert collection.info().index_generation == 1
    with closing(Store(collection.path / "items.sqlite")) as store:
        vector = store.find_vector(next(collection.items()).content_hash)
        copies = [NewItem(f"/{n}", "h", 1, 1, (), {}, location=vector) for n in range(1_000)]
        store.commit(Batch(new=copies), None)
    collection.add(photos, show_progress=False)
    assert collection.info().index_generation == 2
    assert collection.info().num_indexed == len(collection)


def test_orphans_of_a_killed_writer_are_ignored_and_cleaned(
    collection: Collection, photos: Path
) -> None:
    collection.add(photos, show_progress=False)
    (segment,) = (collection.path / "segments").iterdir()
    orphan = segment.with_name("00.npy")
    shutil.copy(segment, orphan)
    assert collection.verify() == []
    collection.add(photos, show_progress=False)
    assert not orphan.exists()
    assert segment.exists()


def test_info_counts(collection: Collection, photos: Path) -> None:
    (photos / "bad.jpg").write_bytes(b"")
    collection.add(photos, show_progress=False)
    collection.remove([1])
    info = collection.info()
    assert (info.num_items, info.num_deleted, info.num_failures) == (len(COLOURS) - 1, 1, 1)
    assert (info.num_segments, info.num_indexed, info.dim) == (1, len(COLOURS), 24)
    assert info.model_name == "colours-0"
    assert info.size_bytes > 10_000


def test_shard_that_breaks_off_keeps_the_others_from_nothing(
    collection: Collection, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(4):
        with tarfile.open(shards / f"{number}.tar", "w") as tar:
            for path in sorted(paint_folder(tmp_path / f"{number}", num_images=9).iterdir()):
                tar.add(path, arcname=path.name)
    for number in (0, 2):
        whole = (shards / f"{number}.tar").read_bytes()
        (shards / f"{number}.tar").write_bytes(b"nothing" if number == 0 else whole[:5_000])
    said = r"0\.tar.* \(and 1 more\); all that can be read is in the collection"
    with pytest.raises(DataError, match=said):
        collection.add(shards, show_progress=False)
    per_shard = Counter(Path(item.uri.rpartition("#")[0]).name for item in collection.items())
    assert (per_shard["0.tar"], per_shard["1.tar"], per_shard["3.tar"]) == (0, 9, 9)
    assert 0 < per_shard["2.tar"] < 9
    assert collection.index is not None
    with pytest.raises(DataError, match=r"0\.tar"):  # said before a model is loaded
        collection.add(shards / "0.tar", show_progress=False)
