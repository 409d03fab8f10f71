"""Files of a run that hold one JSON object in each line, and that a crash may have cut.

What is written is JSON alone: a figure that is not a number (NaN, infinity) becomes null, since
other readers refuse the names that Python gives them.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_logger = logging.getLogger(__name__)


def format_line(entry: Mapping[str, Any]) -> str:
    """One line, with its end."""
    finite = _finite(entry)
    text = json.dumps(finite, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a pair of surrogates, from a file name or a caption
        text = json.dumps(finite, allow_nan=False)
    return text + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, each with its ``step``; none where there is no file.

    Lines that were cut, or that a crash has left as other bytes, are left out and counted.
    """
    if not path.is_file():
        return []
    entries, damaged = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line:
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            damaged += 1
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append(entry)
        else:
            damaged += 1
    if damaged:
        noun = "line that was" if damaged == 1 else "lines that were"
        _logger.warning("%s: %d %s cut by a crash or altered, left out", path, damaged, noun)
    return entries


def rewrite(path: Path, entries: list[dict[str, Any]]) -> None:
    """Replaces a file by these objects, complete or not at all."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text("".join(map(format_line, entries)), encoding="utf-8")
    partial.replace(path)
