"""The classes of ``clipsys classify``, as options and files give them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from clipsys.errors import DataError
from clipsys.files.regular import read_named
from clipsys.printing import printable

#: A class with its synonyms, or with one text that is used as it stands.
Classes: TypeAlias = "dict[str, list[str] | str]"


def read_classes(labels: str, label: Sequence[str], file: Path | None) -> Classes:
    """The classes of the options, each once.

    Raises:
        ConfigError: none is given.
        DataError: the file cannot be read, or is not understood.
    """
    named = [name.strip() for name in (*labels.split(","), *label)]
    given = [(name, [name]) for name in named if name]
    pairs: list[tuple[str, list[str] | str]] = [*given, *_of_file(file)]
    classes: Classes = {}
    for name, texts in pairs:
        if name in classes:
            print(
                f"warning: class {printable(name)!r} is named twice; it counts once",
                file=sys.stderr,
            )
        classes.setdefault(name, texts)
    return classes


def _of_file(path: Path | None) -> list[tuple[str, list[str] | str]]:
    if path is None:
        return []
    try:
        text = read_named(path.expanduser()).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"{path}: the classes cannot be read ({reason})") from error
    if path.suffix.lower() != ".json":
        return [(line.strip(), [line.strip()]) for line in text.splitlines() if line.strip()]
    try:
        document = json.loads(text, object_pairs_hook=_Pairs)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: is not JSON ({error.msg})") from error
    members: list[tuple[Any, Any]] = [(document, 0)]
    if isinstance(document, _Pairs):
        members = document
    elif isinstance(document, list):
        members = [(name, [name]) for name in document]
    found: list[tuple[str, list[str] | str]] = []
    for name, texts in members:
        values = texts if isinstance(texts, list) else [texts]
        is_text = all(isinstance(one, str) and one.strip() for one in (name, *values))
        if not values or not is_text or isinstance(texts, _Pairs):
            raise DataError(
                f"{path}: class {name!r} is not understood; expected a list of names, or an object "
                'such as {"dog": ["dog", "puppy"], "cat": "a photo of a cat, a small animal"}'
            )
        found.append((name.strip(), texts))
    return found


class _Pairs(list[tuple[str, Any]]):
    """The members of a JSON object, those of the same name too."""
