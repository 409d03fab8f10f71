from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from clipsys.retrieval import Collection


def run_sql(folder: Path, statement: str) -> None:
    with closing(sqlite3.connect(folder / "items.sqlite")) as connection, connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute(statement)


def only_file(folder: Path, name: str) -> Path:
    (path,) = (folder / name).iterdir()
    return path


def zero_a_row(folder: Path) -> None:
    path = only_file(folder, "segments")
    rows = np.load(path)
    rows[2] = 0
    np.save(path, rows)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: flip_a_bit(only_file(f, "segments")), r"\.npy: .*SHA-256 differs"),
    (lambda f: zero_a_row(f), r"\.npy: .*SHA-256 differs"),
    (lambda f: only_file(f, "segments").unlink(), r"\.npy: .*cannot be read"),
    (lambda f: flip_a_bit(only_file(f, "indexes")), r"\.faiss: .*damaged"),
    (lambda f: only_file(f, "indexes").unlink(), r"\.faiss: the index file is missing"),
    (lambda f: (f / "manifest.json").write_text("{"), r"manifest\.json: not a manifest"),
    (lambda f: (f / "items.sqlite").write_bytes(b"x" * 4096), r"items\.sqlite: .*cannot be opened"),
    (
        lambda f: run_sql(f, "UPDATE items SET row = 99 WHERE id = 2"),
        "item 2: its vector .* not exist",
    ),
    (lambda f: run_sql(f, "DELETE FROM items WHERE id = 3"), "1 rows belong to no item"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damage_is_named(
    collection: Collection, photos: Path, damage: Callable[[Path], object], message: str
) -> None:
    collection.add(photos, show_progress=False)
    collection.close()
    damage(collection.path)
    faults = collection.verify()
    assert faults
    assert any(re.search(message, fault) for fault in faults), faults


def test_sound_collection_has_no_faults(collection: Collection, photos: Path) -> None:
    collection.add(photos, show_progress=False)
    collection.remove([2])
    assert collection.verify() == []
