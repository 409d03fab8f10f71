"""One name for each file, whatever way leads to it.

``../img``, an absolute path, a path with ``..`` in it, a link to the folder and a link to the file
all lead to one file, so they give one uri: the real path. A link whose target has another kind of
name, as the blobs of a download cache have, keeps its own name in its real folder: the ending of a
uri says how it is read, and its name is what people see.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

from clipsys.files.expansion import expand_path
from clipsys.images.decoding import EXTENSIONS


def real_path(path: str | Path) -> Path:
    """The real path of a file; of a link that leads nowhere, its own place."""
    try:
        folder, name = os.path.split(os.path.join(os.getcwd(), path))  # noqa: PTH109, PTH118
        place = os.path.join(real_folder(folder), name)  # noqa: PTH118  (once an image: str is cheap)
        if not os.path.islink(place):  # noqa: PTH114
            return Path(place)
        target = os.path.realpath(place)
    except ValueError:  # a null byte: said when it is read
        return Path(path)
    kept = _suffix(target) in EXTENSIONS or _suffix(target) == _suffix(place)
    return Path(target if kept and os.path.exists(target) else place)  # noqa: PTH110


def real_source(source: str | Path) -> str:
    """What a source is remembered by: its address, or its real path.

    A table that is a link keeps its own name: what its rows name lies beside the link.
    """
    text = str(source)
    if "://" in text:
        return text
    path = _absolute(text)
    if os.path.isdir(path):  # noqa: PTH112
        return os.path.realpath(path)
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder), name)  # noqa: PTH118


def forget_folders() -> None:
    """Clears what is remembered of folders: links may have changed since the last walk."""
    real_folder.cache_clear()


@functools.lru_cache(maxsize=65_536)
def real_folder(folder: str) -> str:
    """The real path of a folder, remembered: the images of a corpus share few folders."""
    return os.path.realpath(folder)


def _absolute(path: str | Path) -> str:
    return os.path.join(os.getcwd(), expand_path(str(path)))  # noqa: PTH109, PTH118


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()  # noqa: PTH122
