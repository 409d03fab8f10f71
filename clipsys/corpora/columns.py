"""What the columns of a table mean: recognised by their names, or named by the caller.

Names are compared without capitals, spaces, underscores and hyphens: "Image Name", "image_name" and
"ImageName" are one name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipsys.errors import ConfigError, DataError

#: Column names that are taken for the path of the image, the first one found.
PATH_COLUMNS = (
    "path", "filepath", "file", "filename", "image_path", "img_path", "image", "img", "uri",
    "image_file", "image_filename", "image_filepath", "image_uri", "file_uri", "image_name",
    "img_name",
)  # fmt: skip
#: Column names that are taken for captions; so are ``caption_1``, ``caption_2`` and so on.
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "description", "sentence")
_NUMBERED_CAPTION = re.compile(r"caption\d+")
#: Column names that are taken for the class label.
LABEL_COLUMNS = ("label", "class", "cls")
#: Column names that are looked at first for the encoded image itself.
BYTES_COLUMNS = ("image_bytes", "bytes", "image", "jpg")
#: Column names of addresses, which are not fetched: they only serve to explain an error.
URL_COLUMNS = ("url", "image_url", "img_url", "urls", "link")

#: How tables of addresses become a source.
FETCH_FIRST = (
    "URLs are not fetched; download the images first, as `img2dataset --url_list TABLE "
    "--output_format webdataset --output_folder SHARDS` does, and name SHARDS as the source"
)


@dataclass(frozen=True)
class Columns:
    """Which columns of a table mean what, and how its text is encoded; empty: recognised.

    Attributes:
        path: column with the image's path, or a Parquet column of encoded images.
        captions: columns with captions, the most important first.
        label: column with the class label.
        encoding: of a CSV, TSV or JSON Lines file; UTF-8, or what a byte order mark says, if empty.
        without_images: each row is a text, and columns that might name a file are metadata.
    """

    path: str = ""
    captions: tuple[str, ...] = ()
    label: str = ""
    encoding: str = ""
    without_images: bool = False

    @property
    def options(self) -> list[str]:
        """The options of the command line that are set."""
        given = {
            "--path-column": self.path,
            "--caption-column": self.captions,
            "--label-column": self.label,
            "--encoding": self.encoding,
            "--no-images": self.without_images,
        }
        return [name for name, value in given.items() if value]

    def check_used(self, kinds: Collection[str]) -> None:
        """Refuses settings that would be ignored, since none of the sources is a table.

        Args:
            kinds: kinds of the sources; see `clipsys.corpora.sources.source_kind`.

        Raises:
            ConfigError: there is a setting, and no table.
        """
        if self.options and "table" not in kinds:
            raise ConfigError(
                f"{', '.join(self.options)}: for tables only, and no source is a table "
                "(.csv .tsv .jsonl .parquet); leave it out"
            )


@dataclass(frozen=True)
class Roles:
    """The columns of one table by what they mean; None or empty where there is none.

    Attributes:
        path: column of paths.
        image: column of encoded images.
        captions: columns of captions.
        label: column of class labels.
    """

    path: str | None = None
    image: str | None = None
    captions: tuple[str, ...] = ()
    label: str | None = None

    @property
    def used(self) -> set[str | None]:
        """Columns that are not metadata."""
        return {self.path, self.image, self.label, *self.captions}


def plain_name(name: str) -> str:
    """A column's name as it is compared."""
    return re.sub(r"[\s_-]+", "", name).casefold()


def is_caption_name(name: str) -> bool:
    """Whether a column is taken for captions."""
    plain = plain_name(name)
    return plain in _plain(CAPTION_COLUMNS) or bool(_NUMBERED_CAPTION.fullmatch(plain))


def is_path_name(name: str) -> bool:
    """Whether a column is taken for paths or images."""
    return plain_name(name) in _plain((*PATH_COLUMNS, *BYTES_COLUMNS))


def is_known_name(name: str) -> bool:
    """Whether a column's name says what it means."""
    known = _plain((*PATH_COLUMNS, *LABEL_COLUMNS, *BYTES_COLUMNS, *URL_COLUMNS))
    return plain_name(name) in known or is_caption_name(name)


def find_roles(
    table: Path,
    names: Sequence[str],
    columns: Columns,
    *,
    images: Sequence[str] = (),
    paths: Sequence[str] | None = None,
) -> Roles:
    """Decides what each column means.

    Args:
        table: for the messages.
        names: names of all columns.
        columns: what the caller says about them.
        images: names of the columns that hold encoded images.
        paths: names of the columns that may hold paths; None: all others.

    Raises:
        DataError: a named column is missing, or no column names the image.
    """
    captions = tuple(_named(table, names, name) for name in columns.captions)
    label = _named(table, names, columns.label) if columns.label else None
    if columns.without_images:
        return _roles_of_texts(table, names, columns, captions, label)
    if columns.path:
        named = _named(table, names, columns.path)
        path, image = (None, named) if named in images else (named, None)
    else:
        candidates = names if paths is None else paths
        path = _first_known(candidates, PATH_COLUMNS, but=[*images, *captions, label])
        image = _first_known(images, BYTES_COLUMNS)
        if image is None and path is None:
            image = next(iter(images), None)
    if path is None and image is None:
        raise DataError(_no_image(table, names))
    others = [name for name in names if name not in (path, image)]
    return Roles(
        path,
        image,
        captions or tuple(name for name in others if is_caption_name(name)),
        label or _first_known(others, LABEL_COLUMNS),
    )


def _roles_of_texts(
    table: Path,
    names: Sequence[str],
    columns: Columns,
    captions: tuple[str, ...],
    label: str | None,
) -> Roles:
    """The roles in a table whose rows are texts.

    Raises:
        ConfigError: a column of images is named.
        DataError: no column is the text.
    """
    if columns.path:
        raise ConfigError(
            f"--path-column {columns.path} names images, which --no-images leaves out; give one of "
            "the two"
        )
    captions = captions or tuple(name for name in names if is_caption_name(name))
    if not captions:
        raise DataError(
            f"{table}: no column is the text; the columns are {', '.join(names)}; expected one of "
            f"{', '.join(CAPTION_COLUMNS)}, or name it with --caption-column"
        )
    others = [name for name in names if name not in captions]
    return Roles(None, None, captions, label or _first_known(others, LABEL_COLUMNS))


def check_unique(table: Path, names: Sequence[str], columns: Columns) -> None:
    """Two columns of one name must be captions, of which an image may have several.

    Raises:
        DataError: others share a name, so that one of them would be lost.
    """
    asked = {plain_name(name) for name in columns.captions}
    for name in names:
        is_caption = plain_name(name) in asked or (not asked and is_caption_name(name))
        if names.count(name) > 1 and not is_caption:
            places = [str(place) for place, other in enumerate(names, 1) if other == name]
            raise DataError(
                f"{table}: columns {' and '.join(places)} are both called {name!r}; rename one "
                "(only captions may share a name)"
            )


def _plain(names: Sequence[str]) -> set[str]:
    return {plain_name(name) for name in names}


def _named(table: Path, names: Sequence[str], asked: str) -> str:
    if asked in names:
        return asked
    same = [name for name in names if plain_name(name) == plain_name(asked)]
    if len(same) != 1:
        raise DataError(f"{table}: no column {asked!r}; the columns are {', '.join(names)}")
    return same[0]


def _first_known(
    names: Sequence[str], known: Sequence[str], but: Sequence[str | None] = ()
) -> str | None:
    by_plain: dict[str, str] = {}
    for name in names:
        if name not in but:
            by_plain.setdefault(plain_name(name), name)
    return next((by_plain[one] for one in map(plain_name, known) if one in by_plain), None)


def _no_image(table: Path, names: Sequence[str]) -> str:
    address = _first_known(names, URL_COLUMNS)
    if address is not None:
        return f"{table}: column {address!r} holds URLs and no column holds files; {FETCH_FIRST}"
    return (
        f"{table}: no column names the image file; the columns are {', '.join(names)}; expected "
        f"one of {', '.join(PATH_COLUMNS)}, or name it with --path-column (`clipsys shards "
        "--no-images` packs texts alone)"
    )
