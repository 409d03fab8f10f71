"""Results of a benchmark that are kept as they come, so that one that was stopped goes on."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

_logger = logging.getLogger(__name__)


class Lines:
    """A file of JSON lines, each with a ``key``, that several processes add to."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def all(self) -> dict[str, dict[str, Any]]:
        """Lines by key."""
        if not self._path.exists():
            return {}
        lines = self._path.read_text(encoding="utf-8").splitlines()
        return {line["key"]: line for line in map(json.loads, lines)}

    def add(self, line: dict[str, Any]) -> None:
        """Adds one, whole."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def add_once(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The line of a key, made, added and logged where it is not there yet."""
        known = self.all().get(key)
        if known is not None:
            return known
        line = {"key": key, **make()}
        self.add(line)
        _logger.info("%s", json.dumps(line))
        return line
