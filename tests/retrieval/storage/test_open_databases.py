"""What is read of a database's file leaves the locks of open connections alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clipsys.retrieval import Collection
from clipsys.retrieval.storage import open_databases
from clipsys.retrieval.storage.store import Store
from tests.retrieval.colours import ColourEncoder

WRITE = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
connection.execute("UPDATE state SET value = value + 1 WHERE name = 'change'")
connection.commit()
connection.close()
"""


def write_elsewhere(database: Path) -> None:
    subprocess.run([sys.executable, "-c", WRITE, str(database)], check=True)


@pytest.mark.skipif(os.name == "nt", reason="such locks are those of POSIX")
def test_second_handle_does_not_blind_the_first(collection: Collection) -> None:
    """The writer elsewhere deleted the log that the first handle went on reading."""
    store = collection._store
    for _ in range(3):
        with Collection.open(collection.path, ColourEncoder()):
            pass
        assert collection.verify() == []
        before = store.change()
        write_elsewhere(store.path)
        assert store.change() == before + 1


def test_descriptor_goes_with_the_last_connection(tmp_path: Path) -> None:
    path = tmp_path / "items.sqlite"
    first, second = Store.create(path), Store(path)
    assert open_databases.read_header(path)[0].startswith(b"SQLite format 3")
    (known,) = (one for key, one in open_databases._open.items() if key[1] == path.stat().st_ino)
    descriptor = known.descriptor
    assert descriptor is not None and known.num_connections == 2
    second.close()
    os.fstat(descriptor)
    first.close()
    first.close()
    with pytest.raises(OSError):
        os.fstat(descriptor)
    assert open_databases.read_header(path)[1] == path.stat().st_size
