"""Figures stored in the user's cache folder, one small JSON file each.

Nothing depends on them but time: a file that is missing, damaged or of another version is measured
again, and a folder that cannot be written to is no error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipsys.files.user_cache import user_folder
from clipsys.probe.figures import Figures

#: Raised when what is measured, or how, changes.
VERSION = 1

_logger = logging.getLogger(__name__)


def folder() -> Path:
    """Where figures are stored: ``clipsys/probe`` in XDG_CACHE_HOME or ``~/.cache``."""
    return user_folder() / "probe"


def read(measured: Mapping[str, Any]) -> Figures | None:
    """The figures stored for exactly this machine, these versions and this work.

    Args:
        measured: everything that they depend on, as JSON.
    """
    try:
        document = json.loads(_path(measured).read_text(encoding="utf-8"))
        if document["version"] != VERSION or document["measured"] != measured:
            return None
        return Figures.from_json(document["figures"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        if not isinstance(error, FileNotFoundError):
            _logger.debug("stored speeds are not used (%s: %s)", type(error).__name__, error)
        return None


def write(measured: Mapping[str, Any], figures: Figures) -> None:
    """Stores figures, whole or not at all."""
    document = {"version": VERSION, "measured": measured, "figures": figures.to_json()}
    try:
        path = _path(measured)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            partial.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
            partial.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        _logger.debug("speeds are not stored (%s)", error)


def _path(measured: Mapping[str, Any]) -> Path:
    text = json.dumps({"version": VERSION, "measured": measured}, sort_keys=True)
    return folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
