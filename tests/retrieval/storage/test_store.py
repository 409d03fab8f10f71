from __future__ import annotations

import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest

from clipsys.errors import CollectionError
from clipsys.retrieval.storage.items import (
    Batch,
    Failure,
    ItemUpdate,
    Location,
    NewItem,
    to_json,
)
from clipsys.retrieval.storage.segments import SegmentFile
from clipsys.retrieval.storage.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "items.sqlite")


def new_item(uri: str, **facts: Any) -> NewItem:
    defaults: dict[str, Any] = {
        "content_hash": f"hash of {uri}",
        "size_bytes": 10,
        "mtime_ns": 20,
        "captions": (),
        "metadata": {},
    }
    return NewItem(uri=uri, **{**defaults, **facts})


def segment(num_rows: int, name: str = "a.npy") -> SegmentFile:
    return SegmentFile(name, num_rows, "sha")


def test_committed_item_is_found_by_uri_id_and_content(store: Store) -> None:
    item = new_item("/a.jpg", captions=("one", "two"), metadata={"year": 2024, "tags": ["x"]})
    (item_id,) = store.commit(Batch(new=[item]), segment(1))
    found = store.find("/a.jpg")
    assert found is not None
    assert (found.id, found.caption, found.captions) == (item_id, "one", ("one", "two"))
    assert found.metadata == {"year": 2024, "tags": ["x"]}
    assert store.items([item_id]) == {item_id: found}
    assert store.find_vector("hash of /a.jpg") == Location(1, 0)
    assert store.find("/b.jpg") is None


def test_rows_of_a_segment_go_to_the_items_without_a_location_in_order(store: Store) -> None:
    store.commit(Batch(new=[new_item("/a")]), segment(1))
    batch = Batch(new=[new_item("/b"), new_item("/c", location=Location(1, 0)), new_item("/d")])
    store.commit(batch, segment(2, "b.npy"))
    changes = store.changes_since(0)
    assert changes.segments_N.tolist() == [1, 2, 1, 2]
    assert changes.rows_N.tolist() == [0, 0, 0, 1]


def test_failed_commit_changes_nothing(store: Store) -> None:
    store.commit(Batch(new=[new_item("/a")]), segment(1))
    twice = Batch(new=[new_item("/b"), new_item("/b")], failures=[Failure("/c", "corrupt", "m")])
    with pytest.raises(CollectionError, match="UNIQUE"):
        store.commit(twice, segment(2, "b.npy"))
    assert store.count_items() == 1
    assert store.count_failures() == 0
    assert len(store.segments()) == 1
    assert store.change() == 1


def test_ids_are_never_used_again(store: Store) -> None:
    (first,) = store.commit(Batch(new=[new_item("/a")]), segment(1))
    store.delete([first])
    connection = sqlite3.connect(store.path)
    connection.execute("DELETE FROM items")
    connection.commit()
    connection.close()
    (second,) = store.commit(Batch(new=[new_item("/a")]), segment(1, "b.npy"))
    assert second > first


def test_replacing_an_item_deletes_the_old_one_in_the_same_commit(store: Store) -> None:
    (old,) = store.commit(Batch(new=[new_item("/a")]), segment(1))
    replacement = new_item("/a", content_hash="new", replaces=old)
    (new,) = store.commit(Batch(new=[replacement]), segment(1, "b.npy"))
    assert new != old
    assert [item.id for item in store.live_items()] == [new]
    changes = store.changes_since(1)
    assert dict(zip(changes.ids_N.tolist(), changes.live_N.tolist(), strict=True)) == {
        old: 0,
        new: 1,
    }


def test_delete_counts_live_items_only(store: Store) -> None:
    ids = store.commit(Batch(new=[new_item("/a"), new_item("/b")]), segment(2))
    assert store.delete([*ids, 99]) == 2
    assert store.delete(ids) == 0


def test_update_changes_captions_and_clears_the_failure(store: Store) -> None:
    (item_id,) = store.commit(Batch(new=[new_item("/a")]), segment(1))
    store.commit(Batch(failures=[Failure("/a", "corrupt", "m", 1, 2)]), None)
    assert store.count_failures() == 1
    store.commit(Batch(updates=[ItemUpdate(item_id, 5, 6, ("new",), {"k": 1})]), None)
    found = store.items([item_id])[item_id]
    assert (found.caption, found.size_bytes, found.metadata) == ("new", 5, {"k": 1})
    assert store.count_failures() == 0


def test_failing_again_counts_the_attempts(store: Store) -> None:
    for reason in ("empty", "corrupt"):
        store.commit(Batch(failures=[Failure("/a", reason, "m")]), None)
    assert store.failures() == [Failure("/a", "corrupt", "m", attempts=2)]
    assert store.find_failure("/a") == store.failures()[0]


def test_file_names_that_are_not_utf8_survive(store: Store) -> None:
    uri = b"/photos/caf\xe9.jpg".decode("utf-8", "surrogateescape")
    (item_id,) = store.commit(
        Batch(new=[new_item(uri, content_hash="h", captions=("caf\udce9",))]), segment(1)
    )
    found = store.find(uri)
    assert found is not None
    assert (found.id, found.uri, found.caption) == (item_id, uri, "caf?")


def test_json_has_no_nan_and_takes_dates_as_text() -> None:
    import datetime

    value = {"b": float("nan"), "a": [float("inf"), 1.5], "d": datetime.date(2024, 5, 1)}
    assert to_json(value) == '{"a": [null, 1.5], "b": null, "d": "2024-05-01"}'


def test_items_are_paged_in_the_order_of_ids(store: Store) -> None:
    store.commit(Batch(new=[new_item(f"/{n}") for n in range(7)]), segment(7))
    first = store.live_items(limit=4)
    second = store.live_items(start_after=first[-1].id, limit=4)
    assert [item.uri for item in first + second] == [f"/{n}" for n in range(7)]


def test_many_ids_are_asked_for_at_once(store: Store) -> None:
    ids = store.commit(Batch(new=[new_item(f"/{n}") for n in range(12_000)]), segment(12_000))
    assert len(store.items(ids)) == 12_000


def test_readers_see_whole_commits_while_a_writer_goes_on(store: Store) -> None:
    writer = Store(store.path)
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            uris = [f"/{number}/{n}" for n in range(10)]
            writer.commit(Batch(new=[new_item(uri) for uri in uris]), segment(10, f"{number}.npy"))
            number += 1

    thread = threading.Thread(target=write)
    thread.start()
    try:
        counts = [store.count_items() for _ in range(300)]
    finally:
        stop.set()
        thread.join()
    assert all(count % 10 == 0 for count in counts)
    assert counts == sorted(counts)


def test_missing_database_and_other_versions_are_explained(tmp_path: Path) -> None:
    with pytest.raises(CollectionError, match="cannot be opened"):
        Store(tmp_path / "none.sqlite")
    (tmp_path / "junk.sqlite").write_bytes(b"not a database, but long enough to look like one" * 9)
    with pytest.raises(CollectionError, match="cannot be opened"):
        Store(tmp_path / "junk.sqlite")
    sqlite3.connect(tmp_path / "new.sqlite").execute("PRAGMA user_version = 9").close()
    with pytest.raises(CollectionError, match="version 9, this clipsys knows version 3"):
        Store(tmp_path / "new.sqlite")
