"""Files and sources that have another place by now, and sources that are gone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clipsys.cli import main
from clipsys.errors import DataError, PruningRefusedError
from clipsys.retrieval import Collection
from tests.conftest import write_training_shards
from tests.retrieval.colours import COLOURS, ColourEncoder, paint, paint_folder


def ids(collection: Collection) -> dict[str, int]:
    return {Path(item.uri).name: item.id for item in collection.items()}


def test_renamed_source_keeps_its_items_and_the_old_name_is_forgotten(
    collection: Collection, photos: Path, encoder: ColourEncoder
) -> None:
    collection.add(photos, show_progress=False)
    before, encoded = ids(collection), encoder.num_encoded
    renamed = photos.rename(photos.with_name("renamed"))
    report = collection.add(renamed, show_progress=False)
    assert (report.moved, encoder.num_encoded) == (len(COLOURS), encoded)
    assert ids(collection) == before
    assert {Path(item.uri).parent for item in collection.items()} == {renamed}
    assert all(item.captions for item in collection.items())
    assert [one.name for one in collection.sources()] == [str(renamed)]
    assert collection.info().sources == (str(renamed),)
    assert collection.add(renamed, show_progress=False, prune_vanished=True).pruned == 0


def test_files_moved_inside_a_source_keep_their_items_copies_are_new(
    collection: Collection, photos: Path
) -> None:
    collection.add(photos, show_progress=False)
    before = ids(collection)
    for name in ("red", "blue"):
        paint(photos / "deep" / f"{name}.png", name)  # same bytes
    (photos / "red.png").unlink()
    report = collection.add(photos, show_progress=False)
    assert (report.moved, report.reused) == (1, 1)
    assert len(collection) == len(COLOURS) + 1
    moved = collection.item(before["red.png"])
    assert moved.uri == str(photos / "deep" / "red.png")
    assert collection.verify() == []


def test_equal_files_that_move_keep_their_names(collection: Collection, photos: Path) -> None:
    for name in ("x", "y", "z"):
        paint(photos / f"{name}.png", "red")
    collection.add(photos, show_progress=False)
    before = ids(collection)
    renamed = photos.rename(photos.with_name("renamed"))
    collection.add(renamed, show_progress=False)
    assert ids(collection) == before


def test_many_equal_files_move_at_once(collection: Collection, tmp_path: Path) -> None:
    first = paint(tmp_path / "many" / "0.png", "red")
    for number in range(1, 150):
        first.with_name(f"{number}.png").write_bytes(first.read_bytes())
    collection.add(first.parent, show_progress=False)
    before = ids(collection)
    renamed = first.parent.rename(tmp_path / "renamed")
    assert collection.add(renamed, show_progress=False).moved == 150
    assert ids(collection) == before


def test_shards_that_move_keep_their_items(collection: Collection, tmp_path: Path) -> None:
    write_training_shards(tmp_path / "shards", 6)
    collection.add(tmp_path / "shards", show_progress=False)
    before = sorted(item.id for item in collection.items())
    (tmp_path / "shards").rename(tmp_path / "renamed")
    assert collection.add(tmp_path / "renamed", show_progress=False).moved == len(before)
    assert sorted(item.id for item in collection.items()) == before
    (tmp_path / "renamed").rename(tmp_path / "again")
    collection.rename_source(tmp_path / "renamed", tmp_path / "again")
    assert collection.add(show_progress=False).unchanged == len(before)


def test_moved_file_keeps_what_a_table_says_of_it(collection: Collection, photos: Path) -> None:
    table = photos.parent / "t.csv"
    table.write_text("path,tag\nphotos/red.png,wool\n", encoding="utf-8")
    collection.add(table, photos, show_progress=False)
    (photos / "deep").mkdir()
    (photos / "red.png").rename(photos / "deep" / "red.png")
    for _ in range(2):
        collection.add(photos, show_progress=False)
        (red,) = (item for item in collection.items() if item.uri.endswith("red.png"))
        assert red.metadata == {"label": "deep", "tag": "wool"}


def test_source_is_renamed_by_name_without_reading_a_file(
    collection: Collection, photos: Path, encoder: ColourEncoder
) -> None:
    (photos / "bad.png").write_bytes(b"no image")
    collection.add(photos, show_progress=False)
    before = ids(collection)
    renamed = photos.rename(photos.with_name("renamed"))
    with pytest.raises(DataError, match="there is no such folder"):
        collection.rename_source(photos, photos.with_name("nowhere"))
    with pytest.raises(
        DataError, match=r"is not a source of the collection; did you mean .*photos"
    ):
        collection.rename_source(photos.with_name("photo"), renamed)
    assert collection.rename_source(photos, renamed) == len(COLOURS) + 1
    assert ids(collection) == before
    assert collection.failures()[0].uri == str(renamed / "bad.png")
    report = collection.add(show_progress=False)
    assert (report.unchanged, report.known_failures) == (len(COLOURS), 1)


def test_renamed_source_that_was_indexed_again_is_joined(
    collection: Collection, photos: Path
) -> None:
    collection.add(photos, show_progress=False)
    before = ids(collection)
    copy = photos.with_name("copy")
    copy.mkdir()
    for path in photos.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    collection.add(copy, show_progress=False)
    assert len(collection) == 2 * len(COLOURS)
    collection.rename_source(photos, copy)
    assert ids(collection) == before
    assert [one.name for one in collection.sources()] == [str(copy)]
    assert collection.verify() == []


def test_table_that_was_moved_with_its_images_takes_them_along(
    collection: Collection, photos: Path
) -> None:
    table = photos / "t.csv"
    table.write_text("path,tag\nred.png,wool\nblue.png,silk\n", encoding="utf-8")
    collection.add(table, show_progress=False)
    before = ids(collection)
    renamed = photos.rename(photos.with_name("renamed"))
    assert collection.rename_source(table, renamed / "t.csv") == 2
    assert ids(collection) == before
    assert collection.add(show_progress=False).unchanged == 2


def test_forgotten_source_takes_what_it_alone_gave(
    collection: Collection, photos: Path, tmp_path: Path
) -> None:
    many = paint_folder(tmp_path / "many", num_images=80)
    collection.add(photos, many, photos / "red.png", show_progress=False)
    with pytest.raises(PruningRefusedError, match=r"80 of 86 items .* --yes"):
        collection.forget_source(many)
    for path in photos.iterdir():
        path.unlink()
    photos.rmdir()
    assert collection.forget_source(photos) == len(COLOURS) - 1, "the single image stays"
    assert [one.name for one in collection.sources()] == [str(many), str(photos / "red.png")]
    assert collection.verify() == []


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def test_bare_index_refreshes_what_is_there_and_says_what_is_not(
    collection: Collection, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = paint_folder(tmp_path / "many", num_images=3)
    (many / "thumb_1.png").write_bytes((many / "0001.png").read_bytes())
    collection.add(photos, show_progress=False)
    collection.add(many, show_progress=False, exclude=["thumb_*"])
    path = collection.path
    photos.rename(photos.with_name("away"))
    (many / "0001.png").write_bytes((many / "0002.png").read_bytes())
    status, out, err = run(capsys, "index", path)
    assert (status, out) == (1, "")
    for words in (f"{photos}: there is no such folder", "--rename", "--forget", "up to date"):
        assert words in err
    with Collection.open(path, ColourEncoder()) as photos_and_many:
        assert len(photos_and_many) == len(COLOURS) + 3, "the pattern is remembered"
    rows = json.loads(run(capsys, "sources", path, "--json")[1])
    assert [(row["images"], row["present"]) for row in rows] == [(len(COLOURS), False), (3, True)]
    assert rows[1]["settings"] == {"exclude": ["thumb_*"]}
    status, out, err = run(capsys, "sources", path, "--rename", photos, photos.with_name("away"))
    assert (status, "6 images moved along" in err) == (0, True)
    assert "(not there)" not in out
    assert run(capsys, "index", path)[1].splitlines()[-1].startswith("9 items")
    status, _, err = run(capsys, "index", path, photos, "--prune")
    assert (status, "there is no such folder" in err) == (1, True)


def test_a_source_is_not_renamed_to_itself_nor_to_where_its_images_are_not(
    collection: Collection, photos: Path, tmp_path: Path
) -> None:
    collection.add(photos, show_progress=False)
    with pytest.raises(DataError, match="is the source's name already"):
        collection.rename_source(photos, f"{photos}/../{photos.name}")
    other = paint_folder(tmp_path / "other", num_images=1)
    for wrong in (other, other / "0000.png"):
        with pytest.raises(DataError, match=r"none of the \d+ images"):
            collection.rename_source(photos, wrong)
    assert [one.name for one in collection.sources()] == [str(photos)]
    assert len(list(collection.items())) == len(COLOURS)


def test_a_damaged_table_is_no_source_that_is_gone(
    collection: Collection, photos: Path, tmp_path: Path
) -> None:
    table = tmp_path / "t.csv"
    table.write_text(f"path,caption\n{photos}/red.png,a\n")
    collection.add(table, show_progress=False)
    table.write_text(f'path,caption\n{photos}/red.png,"a\n')
    with pytest.raises(DataError, match="quotation mark") as damaged:
        collection.add(table, show_progress=False)
    assert "--forget" not in str(damaged.value)


def test_an_empty_source_is_not_the_current_folder(collection: Collection) -> None:
    with pytest.raises(DataError, match="empty text"):
        collection.add("", show_progress=False)
