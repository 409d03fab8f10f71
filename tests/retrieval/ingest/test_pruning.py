"""Bringing a collection up to date: what vanished, and what only seems to."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from clipsys.errors import CollectionError, DataError
from clipsys.retrieval import Collection
from tests.retrieval.colours import COLOURS, ColourEncoder, paint, paint_folder


def uris(collection: Collection) -> set[str]:
    return {Path(item.uri).name for item in collection.items()}


@pytest.fixture
def many(tmp_path: Path, collection: Collection) -> Path:
    """An indexed folder of twenty images."""
    folder = paint_folder(tmp_path / "many", num_images=20)
    collection.add(folder, show_progress=False)
    return folder


def test_what_vanished_stays_until_it_is_pruned(collection: Collection, many: Path) -> None:
    (many / "0003.png").unlink()
    collection.add(many, show_progress=False)
    assert len(collection) == 20
    report = collection.add(many, show_progress=False, prune_vanished=True)
    assert (report.pruned, report.unchanged) == (1, 19)
    assert "0003.png" not in uris(collection)
    assert collection.verify() == []
    assert collection.add(many, show_progress=False, prune_vanished=True).pruned == 0


def test_moved_file_has_not_vanished(
    collection: Collection, many: Path, encoder: ColourEncoder
) -> None:
    before = encoder.num_encoded
    (many / "0003.png").rename(many / "moved.png")
    report = collection.add(many, show_progress=False, prune_vanished=True)
    assert (report.moved, report.pruned) == (1, 0)
    assert encoder.num_encoded == before
    assert "moved.png" in uris(collection)


def test_more_than_a_tenth_is_pruned_only_when_it_is_said_twice(
    collection: Collection, many: Path
) -> None:
    for number in range(3):
        (many / f"{number:04d}.png").unlink()
    paint(many / "new.png", "red")
    with pytest.raises(CollectionError, match=r"no longer has 3 of the 21 images .* --yes"):
        collection.add(many, show_progress=False, prune_vanished=True)
    assert len(collection) == 21, "what is new is added nevertheless"
    report = collection.add(many, show_progress=False, prune_vanished=True, prune_limit=1.0)
    assert report.pruned == 3
    assert len(collection) == 18


def test_source_whose_root_vanished_is_no_deletion(collection: Collection, many: Path) -> None:
    away = many.rename(many.with_name("away"))
    for empty in (False, True):  # a drive that is not mounted may leave an empty folder
        if empty:
            many.mkdir()
        with pytest.raises(DataError):
            collection.add(many, show_progress=False, prune_vanished=True, prune_limit=1.0)
        assert len(collection) == 20
    many.rmdir()
    away.rename(many)
    assert collection.add(many, show_progress=False).unchanged == 20


def test_other_sources_are_not_touched(collection: Collection, many: Path, photos: Path) -> None:
    collection.add(photos, show_progress=False)
    (many / "0003.png").unlink()
    (photos / "red.png").unlink()
    collection.add(many, show_progress=False, prune_vanished=True)
    assert "red.png" in uris(collection)


def test_image_that_another_source_still_gives_stays(
    collection: Collection, tmp_path: Path, photos: Path
) -> None:
    table = tmp_path / "t.csv"
    rows = [f"photos/{name}.png" for name in COLOURS]
    table.write_text("\n".join(["path", *rows]), encoding="utf-8")
    collection.add(photos, table, show_progress=False)
    table.write_text("\n".join(["path", *rows[1:]]), encoding="utf-8")
    first = collection.add(table, show_progress=False, prune_vanished=True, prune_limit=1.0)
    assert first.pruned == 0
    (photos / f"{next(iter(COLOURS))}.png").unlink()
    second = collection.add(photos, show_progress=False, prune_vanished=True, prune_limit=1.0)
    assert second.pruned == 1


def test_row_that_left_its_table_is_pruned_although_its_file_is_there(
    collection: Collection, tmp_path: Path, photos: Path
) -> None:
    table = tmp_path / "t.csv"
    rows = [f"photos/{name}.png" for name in COLOURS]
    table.write_text("\n".join(["path", *rows]), encoding="utf-8")
    collection.add(table, show_progress=False)
    table.write_text("\n".join(["path", *rows[1:]]), encoding="utf-8")
    collection.add(table, show_progress=False, prune_vanished=True, prune_limit=1.0)
    assert len(collection) == len(COLOURS) - 1
    assert photos.exists()


def test_member_that_left_its_shard_is_pruned(collection: Collection, many: Path) -> None:
    shard = many.parent / "a.tar"
    for count in (20, 19):
        with tarfile.open(shard, "w") as tar:
            for path in sorted(many.iterdir())[:count]:
                tar.add(path, path.name)
        report = collection.add(shard, show_progress=False, prune_vanished=True)
    assert report.pruned == 1
    assert len(collection) == 39
    assert collection.verify() == []


def test_file_that_cannot_be_listed_is_not_gone(
    collection: Collection, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "clipsys.corpora.folders._walk", lambda root, _: (root / f"{n:04d}.png" for n in range(5))
    )
    collection.add(many, show_progress=False, prune_vanished=True)
    assert len(collection) == 20


def test_ledger_forgets_what_vanished(collection: Collection, many: Path) -> None:
    (many / "bad.png").write_bytes(b"no")
    collection.add(many, show_progress=False)
    assert len(collection.failures()) == 1
    (many / "bad.png").unlink()
    collection.add(many, show_progress=False, prune_vanished=True)
    assert collection.failures() == []


def test_sources_are_remembered_by_their_absolute_paths(
    collection: Collection, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (many / "0003.png").unlink()
    monkeypatch.chdir(many.parent)
    assert collection.add("many", show_progress=False, prune_vanished=True).pruned == 1
