"""Collections of database version 2 become version 3 in place, or stay as they are."""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

from clipsys.errors import CollectionError
from clipsys.retrieval import Collection
from clipsys.retrieval.maintenance.verification import verify
from clipsys.retrieval.storage.store import Store
from clipsys.retrieval.storage.upgrading import upgrade_database
from tests.retrieval.colours import COLOURS, ColourEncoder

_KILLED = """
import os, signal, sqlite3, sys
from pathlib import Path
from clipsys.retrieval.storage.upgrading import upgrade_database

class Deadly(sqlite3.Connection):
    def execute(self, statement, *rest):
        if statement.startswith(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().execute(statement, *rest)

real = sqlite3.connect
sqlite3.connect = lambda *rest, **named: real(*rest, **named, factory=Deadly)
upgrade_database(Path(sys.argv[1]))
"""


def make_version_2(path: Path) -> None:
    """Takes away what version 3 has besides."""
    with closing(sqlite3.connect(path)) as connection, connection:
        for kind, name in connection.execute(
            "SELECT type, name FROM sqlite_master WHERE name LIKE 'metadata_%' "
            "AND type IN ('trigger', 'view', 'table') ORDER BY type = 'table', type = 'view'"
        ).fetchall():
            connection.execute(f"DROP {kind} {name}")
        connection.execute("DROP INDEX items_live")
        connection.execute("DELETE FROM state WHERE name = 'metadata'")
        connection.execute("ALTER TABLE segments DROP COLUMN mtime_ns")
        connection.execute("PRAGMA user_version = 2")


def shape(path: Path) -> set[tuple[object, ...]]:
    """Tables with their columns, indexes, views and triggers."""
    query = (
        "SELECT m.type, m.name, iif(m.type = 'table', c.name, m.sql), c.type "
        "FROM sqlite_master AS m LEFT JOIN pragma_table_info(m.name) AS c ON m.type = 'table'"
    )
    with closing(sqlite3.connect(path)) as connection:
        return set(connection.execute(query)) | set(connection.execute("PRAGMA user_version"))


@pytest.fixture
def old(collection: Collection, photos: Path) -> Path:
    """A collection of version 2: six images with captions and years, one deleted."""
    table = photos.parent / "t.csv"
    rows = [f"photos/{name}.png,a {name} thing,{2000 + n}" for n, name in enumerate(COLOURS)]
    table.write_text("\n".join(["path,caption,year", *rows]), encoding="utf-8")
    collection.add(table, show_progress=False)
    collection.remove([2])
    collection.close()
    make_version_2(collection.path / "items.sqlite")
    return collection.path


def test_opening_upgrades_once_and_says_so(old: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), Collection.open(old, ColourEncoder()) as opened:
        assert [record.message for record in caplog.records if "version 3" in record.message]
        assert sorted(hit.id for hit in opened.search("red", where="year>=2003")) == [4, 5, 6]
        assert opened.metadata_keys() == ["year"]
        assert opened.verify() == []
    caplog.clear()
    with Collection.open(old, ColourEncoder()) as again:
        assert caplog.records == []
        again.remove([4])
        assert sorted(hit.id for hit in again.search("red", where="year>=2003")) == [5, 6]
        assert again.verify() == []


def test_upgraded_database_has_the_shape_of_a_new_one(old: Path, tmp_path: Path) -> None:
    assert upgrade_database(old / "items.sqlite")
    assert not upgrade_database(old / "items.sqlite")
    Store.create(tmp_path / "new.sqlite").close()
    assert shape(old / "items.sqlite") == shape(tmp_path / "new.sqlite")


def test_times_of_vector_files_are_noted_by_the_upgrade(old: Path) -> None:
    Collection.open(old).close()
    with closing(Store(old / "items.sqlite")) as store:
        (segment,) = store.segments().values()
    assert segment.mtime_ns == (old / "segments" / segment.name).stat().st_mtime_ns


def test_verify_changes_nothing_and_names_the_remedy(old: Path) -> None:
    before = (old / "items.sqlite").read_bytes()
    (fault,) = verify(old)
    assert "version 2" in fault.problem
    assert "clipsys repair" in fault.problem
    assert (old / "items.sqlite").read_bytes() == before


def test_database_that_cannot_be_written_stays_and_says_why(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sqlite3.connect

    class Full(sqlite3.Connection):
        def execute(self, statement: str, *rest: object) -> sqlite3.Cursor:  # type: ignore[override]
            if statement.startswith("INSERT OR IGNORE INTO metadata_postings"):
                raise sqlite3.OperationalError("database or disk is full")
            return super().execute(statement, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", lambda *rest, **named: real(*rest, **named, factory=Full))
        with pytest.raises(CollectionError, match=r"version 2 and cannot .* disk is full"):
            Collection.open(old)
    with pytest.raises(CollectionError, match="is of database version 2"):
        Store(old / "items.sqlite")
    with Collection.open(old, ColourEncoder()) as opened:
        assert opened.verify() == []


@pytest.mark.parametrize(
    "statement", ["CREATE INDEX", "INSERT OR IGNORE INTO metadata_postings", "COMMIT"]
)
def test_killed_upgrade_leaves_version_2_and_goes_on(old: Path, statement: str) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, str(old / "items.sqlite"), statement],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(CollectionError, match="is of database version 2"):
        Store(old / "items.sqlite")
    with Collection.open(old, ColourEncoder()) as opened:
        assert len(opened.search("red", where="year<2003", k=9)) == 2
        assert opened.verify() == []


def test_two_that_open_at_once_upgrade_once(old: Path) -> None:
    done: list[bool] = []
    threads = [
        threading.Thread(target=lambda: done.append(upgrade_database(old / "items.sqlite")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [False, False, False, True]
    assert verify(old) == []


def test_writer_of_the_version_before_goes_on_beside_the_upgrade(old: Path) -> None:
    with closing(sqlite3.connect(old / "items.sqlite")) as earlier, earlier:
        earlier.execute("SELECT count(*) FROM items").fetchone()
        assert upgrade_database(old / "items.sqlite")
        earlier.execute("INSERT INTO segments (file, num_rows, sha256) VALUES ('x.npy', 1, 'x')")
        earlier.execute(
            "INSERT INTO items (uri, content_hash, captions, metadata, segment, row, change) "
            "VALUES ('/x', 'x', '[]', '{\"year\": 1999}', 2, 0, 9)"
        )
        earlier.commit()
    with closing(Store(old / "items.sqlite")) as store:
        assert store.find_metadata_problems() == []
        assert store.segments()[2].mtime_ns is None
