from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clipsys.errors import CollectionError
from clipsys.retrieval.storage import durable


def test_replace_leaves_the_new_content_and_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    durable.replace(path, b"old")
    durable.replace(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["manifest.json"]


def test_replace_clears_what_a_killed_writer_left_beside(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    (tmp_path / ".manifest.json.new").write_bytes(b"half")
    durable.replace(path, b"new")
    assert path.read_bytes() == b"new"


def test_write_new_refuses_to_overwrite(tmp_path: Path) -> None:
    durable.write_new(tmp_path / "a", b"1")
    with pytest.raises(FileExistsError):
        durable.write_new(tmp_path / "a", b"2")


def test_second_writer_is_refused_at_once_with_the_holders_process_id(tmp_path: Path) -> None:
    lock = tmp_path / "writer.lock"
    with (
        durable.writer_lock(lock, holder="photos"),
        pytest.raises(CollectionError, match=rf"^photos: .*process {os.getpid()}"),
        durable.writer_lock(lock, holder="photos"),
    ):
        pass


def test_lock_is_free_again_after_its_holder_was_killed(tmp_path: Path) -> None:
    lock = tmp_path / "writer.lock"
    script = (
        "import sys, time; from pathlib import Path\n"
        "from clipsys.retrieval.storage import durable\n"
        "with durable.writer_lock(Path(sys.argv[1]), holder='x'):\n"
        "    print('locked', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(lock)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "locked"
        with pytest.raises(CollectionError), durable.writer_lock(lock, holder="x"):
            pass
        process.kill()
    with durable.writer_lock(lock, holder="x"):
        pass
