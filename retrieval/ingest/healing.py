"""One item a file: paths of collections made before there was one path a file are set right.

    ../img/a.jpg, /data/img/a.jpg, /data/sub/../img/a.jpg, a link  -->  /data/img/a.jpg

Each writer's run looks at the items that came since the last one that did, and gives them their
real paths. Of items that so get the same path the oldest stays, with its id; the others are
deleted, and what they say besides it is added to it.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence

from clipsys.corpora.real_paths import forget_folders, real_path, real_source
from clipsys.retrieval.ingest.texts import Texts
from clipsys.retrieval.storage.items import ItemUpdate
from clipsys.retrieval.storage.row_writing import mark_deleted, update_item
from clipsys.retrieval.storage.schema import python_text, sql_text
from clipsys.retrieval.storage.sources import rename_source, rename_uri
from clipsys.retrieval.storage.store import Store

#: Name of the counter: items up to this id have their real paths.
_COUNTER = "real_paths"
_PAGE = 10_000
#: Files that are set right in one transaction.
_GROUPS = 1_000


class Places:
    """The one path of each file, also where a folder is mounted in several places.

    The first folder that is asked for gives its name to all that are the same folder.
    """

    def __init__(self) -> None:
        self._names: dict[tuple[int, int], str] = {}
        self._folders: dict[str, str] = {}

    def learn(self, other: Places) -> None:
        """Takes over what another one knows."""
        self._names.update(other._names)
        self._folders.clear()

    def folder(self, path: str) -> str:
        """The one path of a folder."""
        if path not in self._folders:
            real = os.path.realpath(path)
            try:
                status = os.stat(real)  # noqa: PTH116
                real = self._names.setdefault((status.st_dev, status.st_ino), real)
            except (OSError, ValueError):
                pass
            self._folders[path] = real
        return self._folders[path]

    def uri(self, uri: str) -> str:
        """The one uri of an image: a file, or a member of a shard or a table."""
        if "://" in uri or "\0" in uri:
            return uri
        container, mark, member = uri.rpartition("#")
        is_member = container.endswith((".tar", ".parquet")) and not os.path.exists(uri)  # noqa: PTH110
        path = str(real_path(container if is_member else uri))
        folder, name = os.path.split(path)
        place = os.path.join(self.folder(folder), name)  # noqa: PTH118
        return f"{place}{mark}{member}" if is_member else place


def heal_paths(store: Store) -> int:
    """Gives items, sources and ledger entries their real paths. Returns how many doubles went."""
    forget_folders()
    places = Places()
    _heal_sources(store)
    _heal_failures(store, places)
    checked = store.read("SELECT value FROM state WHERE name = ?", (_COUNTER,))
    start_after = checked[0][0] if checked else 0
    ((last_id,),) = store.read("SELECT coalesce(max(id), 0) FROM items")
    if last_id <= start_after:
        return 0
    groups: dict[str, list[tuple[int, str]]] = {}
    for item_id, uri in _live_uris(store, start_after):
        real = places.uri(uri)
        if real != uri:
            groups.setdefault(real, []).append((item_id, uri))
    num_doubles = 0
    wrong = list(groups.items())
    for start in range(0, len(wrong), _GROUPS):
        with store.changing() as (connection, change):
            for real, group in wrong[start : start + _GROUPS]:
                num_doubles += join_items(store, connection, change, real, group)
    with store.changing() as (connection, _):
        connection.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (_COUNTER, last_id))
    return num_doubles


def places_of_items(store: Store) -> Places:
    """Knows the folders of all items, so that one that is mounted elsewhere too is recognised."""
    places = Places()
    for folder in dict.fromkeys(os.path.dirname(uri) for _, uri in _live_uris(store, 0)):  # noqa: PTH120
        if folder.startswith("/"):
            places.folder(folder)
    return places


def _live_uris(store: Store, start_after: int) -> Iterator[tuple[int, str]]:
    query = "SELECT id, uri FROM items WHERE state = 'live' AND id > ? ORDER BY id LIMIT ?"
    while rows := store.read(query, (start_after, _PAGE)):
        yield from ((item_id, python_text(uri)) for item_id, uri in rows)
        start_after = rows[-1][0]


def _heal_sources(store: Store) -> None:
    names = [python_text(name) for (name,) in store.read("SELECT name FROM sources ORDER BY id")]
    wrong = [(name, real_source(name)) for name in names if real_source(name) != name]
    if wrong:
        with store.changing() as (connection, _):
            for name, real in wrong:
                rename_source(connection, name, real)


def _heal_failures(store: Store, places: Places) -> None:
    uris = [failure.uri for failure in store.failures()]
    wrong = [(uri, places.uri(uri)) for uri in uris if places.uri(uri) != uri]
    if wrong:
        with store.changing() as (connection, _):
            for uri, real in wrong:
                rename_uri(connection, uri, real)


def join_items(
    store: Store,
    connection: sqlite3.Connection,
    change: int,
    real: str,
    group: Sequence[tuple[int, str]],
) -> int:
    """Makes one item, under its real path, of several and of the one that has it already.

    Args:
        store: their items.
        connection, change: the transaction, and the number that its rows are stamped with.
        real: the path.
        group: ids and uris.

    Returns:
        How many items went: all but the oldest.
    """
    uris = dict(group)
    present = store.find(real)
    if present is not None:
        uris.setdefault(present.id, real)
    oldest_id, *doubles = sorted(uris)
    items = store.items([oldest_id, *doubles])
    oldest = items[oldest_id]
    texts = Texts.of_item(oldest)
    for double in doubles:
        texts = texts.over(Texts.of_item(items[double]))
    mark_deleted(connection, doubles, change)
    connection.execute("UPDATE items SET uri = ? WHERE id = ?", (sql_text(real), oldest_id))
    for uri in uris.values():
        if uri != real:
            rename_uri(connection, uri, real)
    facts = (oldest_id, oldest.size_bytes, oldest.mtime_ns)
    update_item(connection, ItemUpdate(*facts, texts.captions, texts.metadata), change)
    return len(doubles)
