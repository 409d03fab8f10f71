"""What the classes of labelled images are called, where their labels are numbers.

A ``.cls`` member is a number more often than a name. ``classnames.txt`` (the name that CLIP
benchmark's data sets use) has one name a line: the first line is class 0.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from clipsys.errors import DataError
from clipsys.files.expansion import expand_path
from clipsys.files.regular import read_named

FILE_NAME = "classnames.txt"
#: What CLIP benchmark's data sets have beside it: a prompt a line, with ``{c}`` for the class.
TEMPLATES_NAME = "zeroshot_classification_templates.txt"

_logger = logging.getLogger(__name__)


def class_names(
    labels: Sequence[str], places: Iterable[Path], *, file: str | None = None, setting: str
) -> dict[str, str]:
    """The classes of a zero-shot classification: label -> the name that goes into a prompt.

    Labels that are not all whole numbers are names themselves.

    Args:
        labels: labels of all images.
        places: folders in which `FILE_NAME` is looked for, and in their parents.
        file: one that the user names.
        setting: how the user names one, for messages.

    Raises:
        DataError: labels are numbers and nothing says their names, a number has no line, or a file
            is named and labels are names.
    """
    unique = sorted(set(labels))
    if not all(label.isascii() and label.isdigit() for label in unique):
        if file is not None:
            named = next(label for label in unique if not label.isdigit())
            raise DataError(
                f"{setting} is {file}, which does nothing: labels such as {named!r} are names "
                "already; leave it out"
            )
        return {label: label for label in unique}
    path = Path(expand_path(file)) if file is not None else _beside(places)
    if path is None:
        raise DataError(
            f"the labels are numbers ({', '.join(unique[:4])}{', …' if len(unique) > 4 else ''}), "
            f"and a prompt needs names; put a {FILE_NAME} beside the data, one name a line, the "
            f"first for class 0, or name such a file with {setting}"
        )
    try:
        lines = read_named(path).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the class names cannot be read ({error})") from error
    names = [line.strip() for line in lines]
    while names and not names[-1]:
        names.pop()
    missing = [label for label in unique if int(label) >= len(names) or not names[int(label)]]
    if missing:
        raise DataError(
            f"{path}: has no name for class {missing[0]} (line {int(missing[0]) + 1}); it has "
            f"{len(names)} lines"
        )
    spelled = {int(label): label for label in unique}  # with leading zeros, perhaps
    # Classes that no image has are candidates too.
    return {spelled.get(number, str(number)): name for number, name in enumerate(names) if name}


def prompt_templates(places: Iterable[Path]) -> list[str]:
    """The prompts that `TEMPLATES_NAME` beside the data gives; none where there is no such file.

    Raises:
        DataError: it cannot be read, or is empty.
    """
    path = _beside(places, TEMPLATES_NAME)
    if path is None:
        return []
    try:
        lines = read_named(path).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the templates cannot be read ({error})") from error
    templates = [line.strip().replace("{c}", "{}") for line in lines if line.strip()]
    if not templates:
        raise DataError(f"{path}: has no templates; write one a line, with {{c}} for the class")
    _logger.info("%s: %d templates are used; --template names others", path, len(templates))
    return templates


def _beside(places: Iterable[Path], name: str = FILE_NAME) -> Path | None:
    for place in places:
        for folder in (place, place.parent):
            if (folder / name).is_file():
                return folder / name
    return None
