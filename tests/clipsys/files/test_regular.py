"""What is no file is refused before it is opened, and named."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from clipsys.errors import ImageDecodeError
from clipsys.files.regular import NotRegularError, read_regular
from clipsys.images.decoding import decode_image
from clipsys.printing import counted


@pytest.mark.timeout(10)
def test_pipes_devices_sockets_and_folders_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(tmp_path / "socket"))  # short: such names have 108 bytes
        kinds = {"pipe": "named pipe", "link": "named pipe", "folder": "folder", "socket": "socket"}
        for name, kind in kinds.items():
            with pytest.raises(NotRegularError, match=f"a {kind}, not a file"):
                read_regular(tmp_path / name)
    with pytest.raises(NotRegularError, match="a device"):
        read_regular("/dev/zero")


def test_files_and_links_to_them_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    (tmp_path / "b").symlink_to("a")
    assert read_regular(tmp_path / "b") == b"content"
    (tmp_path / "c").symlink_to("c")
    with pytest.raises(OSError, match="symbolic links"):
        read_regular(tmp_path / "c")


@pytest.mark.timeout(10)
def test_image_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "cam.jpg")
    with pytest.raises(ImageDecodeError, match=r"cam\.jpg: is a named pipe") as raised:
        decode_image(tmp_path / "cam.jpg")
    assert raised.value.reason == "not a file"


def test_words_agree_with_their_number() -> None:
    assert counted(1, "file is", "files are") == "1 file is"
    assert counted(2, "file is", "files are") == "2 files are"
    assert [counted(n, "image") for n in (0, 1, 1234)] == ["0 images", "1 image", "1,234 images"]
