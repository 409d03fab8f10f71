"""A collection whose folder cannot be written to is read all the same."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clipsys.cli import main
from clipsys.errors import CollectionError
from clipsys.retrieval import Collection
from clipsys.retrieval.storage import connecting
from tests.retrieval.colours import COLOURS, ColourEncoder
from tests.retrieval.storage.test_upgrading import make_version_2

#: Mounts a folder again, without the right to write.
Freeze = Callable[[Path], None]


@pytest.fixture
def freeze() -> Iterator[Freeze]:
    mounted: list[Path] = []

    def mount(folder: Path) -> None:
        for options in (["--bind"], ["-o", "remount,ro,bind"]):
            command = ["mount", *options, str(folder), str(folder)]
            if (
                shutil.which("mount") is None
                or subprocess.run(command, capture_output=True).returncode
            ):
                pytest.skip("a folder cannot be mounted read-only here (needs the rights to)")
            mounted[:] = [folder]

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def path(collection: Collection, photos: Path) -> Path:
    collection.add(photos, show_progress=False)
    collection.close()
    return collection.path


def check_readable(path: Path) -> None:
    before = sorted((file.name, file.stat().st_mtime_ns) for file in path.rglob("*"))
    with Collection.open(path, ColourEncoder()) as opened:
        assert [hit.caption for hit in opened.search("red", k=1)] == ["a red square"]
        assert len(opened.search(words="square")) == len(COLOURS)
        assert opened.search("red", where="label=a") == []
        assert opened.verify() == []
        assert opened.failures() == []
        assert len(opened.duplicates(show_progress=False)) <= len(COLOURS)
        assert opened.info().num_items == len(opened) == len(COLOURS)
        assert len(opened.sources()) == 1
    assert sorted((file.name, file.stat().st_mtime_ns) for file in path.rglob("*")) == before


def test_read_only_collection_is_read_and_whatever_writes_says_why_not(
    path: Path, photos: Path, freeze: Freeze, capsys: pytest.CaptureFixture[str]
) -> None:
    freeze(path)
    check_readable(path)
    with Collection.open(path, ColourEncoder()) as opened:
        for change in (
            lambda: opened.add(photos, show_progress=False),
            lambda: opened.remove([1]),
            opened.compact,
            opened.repair,
            lambda: opened.forget_source(photos),
            opened.build_index,
        ):
            with pytest.raises(CollectionError, match="the folder is not writable"):
                change()
    for words in (["info", path], ["verify", path], ["failures", path], ["sources", path]):
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        assert end.value.code in (0, None), capsys.readouterr().err


def test_log_of_a_killed_writer_is_read_on_a_read_only_disk(
    path: Path, tmp_path: Path, freeze: Freeze, caplog: pytest.LogCaptureFixture
) -> None:
    writer = sqlite3.connect(path / "items.sqlite", isolation_level=None)
    writer.execute("UPDATE items SET state = 'deleted', change = change + 1 WHERE id = 2")
    writer.execute("UPDATE state SET value = value + 1 WHERE name = 'change'")
    killed = Path(shutil.copytree(path, tmp_path / "killed"))
    writer.close()
    (killed / "items.sqlite-shm").unlink()
    assert (killed / "items.sqlite-wal").stat().st_size > 0
    freeze(killed)
    with Collection.open(killed, ColourEncoder()) as opened:
        assert len(opened) == len(opened.search("red", k=99)) == len(COLOURS) - 1
        copy = opened._store._database._opened.copy
        assert copy is not None
    assert "its last writer was killed" in caplog.text
    assert not Path(copy.name).exists()


def test_earlier_version_is_read_through_a_copy(
    path: Path, freeze: Freeze, caplog: pytest.LogCaptureFixture
) -> None:
    make_version_2(path / "items.sqlite")
    freeze(path)
    check_readable(path)
    assert "is of database version 2: a copy" in caplog.text


def test_collection_of_before_there_were_words_is_searched_for_them(
    path: Path, freeze: Freeze
) -> None:
    from contextlib import closing

    from clipsys.retrieval.storage import words

    with closing(sqlite3.connect(path / "items.sqlite")) as connection, connection:
        for name in words.TRIGGERS:
            connection.execute(f"DROP TRIGGER {name}")
        connection.execute(f"DROP TABLE {words.TABLE}")
    freeze(path)
    check_readable(path)


def test_reader_without_the_right_to_write_follows_a_writer_elsewhere(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write = [True]
    monkeypatch.setattr(connecting, "is_writable", lambda _: may_write[0])

    def remove(item_id: int) -> None:
        may_write[0] = True
        with Collection.open(path, ColourEncoder()) as writer:
            writer.remove([item_id])
            may_write[0] = False
            assert len(reader.search("red", k=99)) == len(writer), "while the log is there"
        assert len(reader.search("red", k=99)) == len(COLOURS) - item_id, "after it was taken over"

    may_write[0] = False
    with Collection.open(path, ColourEncoder()) as reader:
        assert len(reader.search("red", k=99)) == len(COLOURS)
        remove(1)
        remove(2)
        assert reader.verify() == []
