"""Where what can be computed again is stored for a user."""

from __future__ import annotations

import os
from pathlib import Path


def user_folder() -> Path:
    """``clipsys`` in XDG_CACHE_HOME, where that is an absolute path, or in ``~/.cache``.

    Raises:
        RuntimeError: there is no home folder.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(given) if Path(given).is_absolute() else Path("~/.cache").expanduser()
    return root / "clipsys"


def cache_folder(name: str) -> Path:
    """A folder in ``CLIPSYS_CACHE``, or in `user_folder`.

    Raises:
        RuntimeError: there is no home folder.
    """
    given = os.environ.get("CLIPSYS_CACHE")
    return (Path(given) if given else user_folder()) / name
