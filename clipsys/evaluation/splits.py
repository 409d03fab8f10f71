"""Which splits data have: ``train``, ``test`` and so on, as folders or in the names of files.

    root/test/CLASS/a.jpg                        a folder of images for each split
    root/test/0.tar                              CLIP benchmark's shards
    root/val-000000.tar                          shards by the beginning of their names
    root/data/test-00000-of-00003.parquet        Hugging Face's Parquet; also root/default/test/…
    root/test.csv                                tables by their names

A folder called ``train`` beside folders that are no splits is a class (of vehicles), not a split.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from clipsys.corpora.folders import DEFAULT_EXCLUDED
from clipsys.corpora.tables import TABLE_SUFFIXES
from clipsys.errors import DataError
from clipsys.files.expansion import expand_path
from clipsys.images.decoding import EXTENSIONS
from clipsys.shards.reading import expand_shards

_logger = logging.getLogger(__name__)

#: Words for each split; where several splits exist, the first of `_PREFERRED` is taken.
_WORDS = {
    "test": {"test", "testing", "eval", "evaluation"},
    "validation": {"validation", "valid", "val", "dev", "devel"},
    "train": {"train", "training"},
}
_PREFERRED = ("test", "validation")
#: What numbers the parts of one split: ``-00000-of-00003``, ``_000``, ``-00000-of-00001-4c1d8e0f``.
_NUMBER = re.compile(r"[-_.]?\d+(-of-\d+)?(-[0-9a-f]{8,})?$")
_EXCLUDED = {name.casefold() for name in DEFAULT_EXCLUDED}
#: Folders that hold parts rather than classes are not searched deeper than this.
_MAX_DEPTH = 4

#: The name of each split -> sources that `clipsys.corpora.sources.iterate_source` reads.
Splits = dict[str, tuple[str, ...]]


def find_sources(spec: str, split: str | None) -> tuple[tuple[str, ...], str | None, bool]:
    """The sources of one split of the data.

    Args:
        spec: a folder, a table, shards or an image.
        split: name of a split; None takes the only one, or the test or else the validation split.

    Returns:
        the sources, the name of the split that they are, and whether a metadata key ``split`` has
        still to tell which images belong to it.

    Raises:
        DataError: there is no such split, or several and none is for testing.
    """
    splits, whole = _find(spec)
    if split is not None:
        found = [name for name in splits if name == split] or [
            name for name in splits if _meaning(name) == _meaning(split) is not None
        ]
        if len(found) == 1:
            return splits[found[0]], found[0], False
        inner = Path(expand_path(spec)) / split
        if inner.is_dir() and os.sep not in split and split not in ("..", "."):
            return _whole(inner), split, False
        if splits:
            raise DataError(
                f"{spec}: there is no split {split!r}; the splits are {', '.join(splits)}"
            )
        return whole, split, True
    known = {name: _meaning(name) for name in splits}
    if not any(known.values()):
        return whole, None, False
    if len(splits) == 1:
        name = next(iter(splits))
        return splits[name], name, False
    for wanted in _PREFERRED:
        for name, meaning in known.items():
            if meaning == wanted:
                _logger.info(
                    "%s: split %s of %s; --split names another", spec, name, ", ".join(splits)
                )
                return splits[name], name, False
    raise DataError(
        f"{spec}: the splits are {', '.join(splits)}, and none is for testing; name one with "
        "--split"
    )


def _meaning(name: str) -> str | None:
    """Which split a name means: ``imagenet_val`` and ``val2017`` are ``validation``."""
    words = re.findall(r"[a-z]+", name.casefold())
    return next(
        (split for word in reversed(words) for split, known in _WORDS.items() if word in known),
        None,
    )


def _find(spec: str) -> tuple[Splits, tuple[str, ...]]:
    """The splits of the data, and the sources of all of it where splits are not asked for."""
    text = expand_path(spec)
    if text and Path(text).is_dir():  # an unset variable of a script is not the current folder
        return _in_folder(Path(text), depth=0)
    if "://" not in text and any(character in text for character in "{*?["):
        shards = expand_shards(text)
        return _by_name(shards), (spec,)
    return {}, (spec,)


def _in_folder(folder: Path, *, depth: int) -> tuple[Splits, tuple[str, ...]]:
    folders, files = _listing(folder)
    parts = [name for name in files if name.endswith((".tar", ".parquet"))]
    if parts and not any(map(_is_image, files)):
        kinds = {Path(name).suffix for name in parts}
        if len(kinds) > 1:
            raise DataError(
                f"{folder}: holds shards and Parquet tables; name one kind of file, "
                f"such as '{folder}/*.tar'"
            )
        return _by_name([str(folder / name) for name in parts]), _whole(folder)
    tables = [name for name in files if Path(name).suffix.lower() in TABLE_SUFFIXES]
    holding = [name for name in folders if _holds_data(folder / name)]
    if holding and all(_meaning(name) for name in holding) and not any(map(_is_image, files)):
        return {name: _whole(folder / name) for name in holding}, _whole(folder)
    if tables and all(_meaning(Path(name).stem) for name in tables):
        return _by_name([str(folder / name) for name in tables]), _whole(folder)
    packed = [name for name in holding if _holds_data(folder / name, (".tar", ".parquet"))]
    if len(packed) > 1 and len(packed) == len(holding) and depth < _MAX_DEPTH:
        raise DataError(
            f"{folder}: holds several data sets ({', '.join(packed[:6])}); name one of the folders"
        )
    if len(holding) == 1 and not any(map(_is_image, files)) and depth < _MAX_DEPTH:
        splits, whole = _in_folder(folder / holding[0], depth=depth + 1)
        # The one folder of an image folder is its only class.
        has_images = _holds_data(folder / holding[0], tuple(EXTENSIONS))
        return splits, (str(folder),) if has_images else whole
    return {}, (str(folder),)


def _whole(folder: Path) -> tuple[str, ...]:
    """The sources that a folder is read as: its Parquet tables, those of its one folder, itself."""
    folders, files = _listing(folder)
    tables = [str(folder / name) for name in files if name.endswith(".parquet")]
    if tables and not any(map(_is_image, files)):
        return tuple(tables)
    packed = [name for name in folders if _holds_data(folder / name, (".tar", ".parquet"))]
    if len(packed) == 1 and not any(name.endswith(".tar") or _is_image(name) for name in files):
        return _whole(folder / packed[0])
    return (str(folder),)


def _by_name(paths: Sequence[str]) -> Splits:
    """Files by the beginning of their names, whatever numbers their parts."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(_NUMBER.sub("", Path(path).stem), []).append(path)
    return {} if "" in groups else {name: tuple(found) for name, found in groups.items()}


def _listing(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in a folder, sorted, without what is not data."""
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: the folder cannot be listed ({error.strerror})") from error
    kept = [
        entry
        for entry in found
        if not entry.name.startswith(".") and entry.name.casefold() not in _EXCLUDED
    ]
    folders = [entry.name for entry in kept if entry.is_dir()]
    return folders, [entry.name for entry in kept if entry.name not in set(folders)]


def _holds_data(
    folder: Path, endings: tuple[str, ...] = (*EXTENSIONS, *TABLE_SUFFIXES, ".tar")
) -> bool:
    """Whether a file with one of the endings lies in a folder or below it."""
    for _, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if any(name.lower().endswith(endings) and not name.startswith(".") for name in files):
            return True
    return False


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in EXTENSIONS
