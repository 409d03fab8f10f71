"""One item a file: whatever paths led to it, now or in an earlier version."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from clipsys.retrieval import Collection
from clipsys.retrieval.storage.items import Batch, NewItem
from clipsys.retrieval.storage.store import Store
from tests.retrieval.colours import COLOURS


def test_every_path_to_a_folder_gives_its_items_once(
    collection: Collection, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos.parent / "link").symlink_to("photos")
    monkeypatch.chdir(photos)
    monkeypatch.setenv("HOME", str(photos.parent))
    ways = [
        "../photos",
        f"{photos}/",
        "../link",
        f"{photos.parent}/link/../photos",
        "~/photos",
        ".",
    ]
    for way in ways:
        collection.add(way, show_progress=False)
        assert len(collection) == len(COLOURS)
    assert [one.name for one in collection.sources()] == [str(photos)]
    collection.add(*ways, photos / "red.png", show_progress=False)
    assert len(collection) == len(COLOURS)


def test_links_to_files_and_overlapping_sources_give_one_item_a_file(
    collection: Collection, photos: Path
) -> None:
    (photos / "sub").mkdir()
    (photos / "sub" / "link.png").symlink_to("../red.png")
    (photos / "red.png").rename(photos / "sub" / "red.png")
    (photos / "red.png").symlink_to("sub/red.png")
    (photos / "sub" / "link.png").unlink()
    (photos / "sub" / "link.png").symlink_to("red.png")
    collection.add(photos, show_progress=False)
    collection.add(photos / "sub", photos, show_progress=False)
    assert len(collection) == len(COLOURS)
    assert len(collection.search("red", k=99)) == len(COLOURS)


def double(store: Store, source: str, rebase: tuple[str, str], captions: tuple[str, ...]) -> None:
    """What indexing by another path did to a collection before."""
    new, origins = [], []
    for item in list(store.items(range(1, len(COLOURS) + 1)).values()):
        uri = item.uri.replace(*rebase)
        location = store.find_vector(item.content_hash)
        facts = (item.content_hash, item.size_bytes, item.mtime_ns)
        new.append(NewItem(uri, *facts, captions, {"label": "doubled"}, location=location))
        origins.append((source, uri))
    store.commit(Batch(new=new, origins=origins), None)


def test_doubles_of_an_earlier_version_are_joined_by_the_next_index(
    collection: Collection, photos: Path
) -> None:
    (photos.parent / "link").symlink_to("photos")
    collection.add(photos, show_progress=False)
    before = list(collection.items())
    with collection._writing():
        for way in ("link", "sub/../photos"):
            path = str(photos.parent / way)
            double(collection._store, path, (str(photos), path), ("another caption",))
        collection._store.delete([2])  # of one only doubles are left
    assert len(collection) == 3 * len(COLOURS) - 1
    report = collection.add(photos, show_progress=False)
    assert report.doubles == 2 * len(COLOURS) - 1
    assert "11 doubles of one file removed" in report.summary()
    after = list(collection.items())
    assert [item.uri for item in after] == sorted(
        (item.uri for item in before), key=lambda uri: [item.uri for item in after].index(uri)
    )
    kept = {item.uri: item for item in after}
    for item in before:
        if item.id != 2:
            assert (kept[item.uri].id, kept[item.uri].captions) == (item.id, item.captions)
    assert kept[before[1].uri].id == len(COLOURS) + 2, "the oldest that is left"
    assert [one.name for one in collection.sources()] == [str(photos)]
    assert collection.verify() == []
    assert collection.add(show_progress=False).unchanged == len(COLOURS)


def test_what_an_earlier_version_adds_later_is_joined_too(
    collection: Collection, photos: Path
) -> None:
    collection.add(photos, show_progress=False)
    collection.add(photos, show_progress=False)
    path = str(photos.parent / "sub/../photos")
    with collection._writing():
        double(collection._store, path, (str(photos), path), ())
    assert collection.add(show_progress=False).doubles == len(COLOURS)
    assert len(collection) == len(COLOURS)


def test_folder_that_is_mounted_twice_gives_its_items_once(
    collection: Collection, photos: Path
) -> None:
    elsewhere = photos.parent / "elsewhere"
    elsewhere.mkdir()
    mount = ["mount", "--bind", str(photos), str(elsewhere)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a folder cannot be mounted here (needs the rights to)")
    try:
        collection.add(photos, show_progress=False)
        collection.add(elsewhere, show_progress=False)
        assert len(collection) == len(COLOURS)
        assert {str(Path(item.uri).parent) for item in collection.items()} == {str(photos)}
    finally:
        subprocess.run(["umount", "-l", str(elsewhere)], check=True)
