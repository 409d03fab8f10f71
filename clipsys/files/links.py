"""A second name of a file that is never written into again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Makes a file known under a second name; copies it on a drive without hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
