"""What a sample of a shard is, and what makes one unusable.

Members of a tar that share a name up to the first dot, and lie side by side, are one sample::

    000041.jpg     the image, encoded (any format that clipsys.images.decoding decodes)
    000041.txt     a caption
    000041.json    {"captions": ["…", "…"], …}; what is not captions is metadata
    000041.cls     optional class label

Of several images the one whose name has no further dot is taken, ``000041.png`` before
``000041.depth.png``; of several such images (``.jpg`` and ``.jpeg``) the first in the tar. A single
``000041.seg.png`` is the image; several, and none without a further dot, make the sample unusable.

Every fault of a sample is a `SampleError` with a reason that can be counted. Whatever a sample
holds, it raises nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from clipsys.errors import SampleError
from clipsys.images.decoding import EXTENSIONS

_IMAGE_SUFFIXES = frozenset(ending.lstrip(".") for ending in EXTENSIONS)
#: As webdataset cuts a name (`base_plus_ext`): the folders and the name up to its first dot.
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)
#: Members that webdataset leaves out (`skip_meta` of its `tar_file_iterator`).
_META = re.compile(r"__[^/]*__($|/)")
#: Objects and lists inside one another; SQLite's limit is 1,000, Python's own lower in deep calls.
_MAX_DEPTH = 64
#: A text member of a sample that is larger than this is not read.
_MAX_TEXT_BYTES = 16 << 20
#: A tokenizer takes seconds for a word of this length.
MAX_TEXT_CHARACTERS = 20_000

#: Key of a raw sample: the reason why it cannot be used, found when its members were grouped.
FAULT = "__fault__"
#: Key of a raw sample: its key occurs in several places of the shard.
REPEATED = "__repeated__"
#: Key of a raw sample: its number within the shard.
NUMBER = "__number__"

NOT_ADJACENT = "members are not adjacent"
_NOT_ADJACENT_TEXT = (
    "members of this key lie in several places of the shard, and only adjacent members are one "
    "sample; sort the tar by name (tar --sort=name)"
)


@dataclass(frozen=True)
class Sample:
    """One image with its captions.

    Attributes:
        key: unique within its shard.
        image: the encoded image, as it lies in the tar.
        suffix: the image's file name ending, without the dot.
        captions: every caption, the ``.txt`` one first, without repetitions.
        label: class label, if there is one.
        metadata: the rest of the ``.json`` member.
    """

    key: str
    image: bytes
    suffix: str
    captions: tuple[str, ...]
    label: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def split_name(name: str) -> tuple[str, str] | None:
    """The key and the ending of a member, or None if it belongs to no sample."""
    match = _NAME.match(name)
    if match is None or _META.match(name):
        return None
    return match[1], match[2]


def is_image(suffix: str) -> bool:
    """Whether a member with this ending, which may have further dots, is an image."""
    return suffix.rpartition(".")[2].lower() in _IMAGE_SUFFIXES


def group_members(members: Iterable[tuple[str, bytes]], url: str) -> Iterator[dict[str, Any]]:
    """Groups adjacent members into raw samples: ``__key__``, ``__url__``, and bytes by ending.

    As webdataset groups them, with one difference: a fault in a sample is noted in it (`FAULT`,
    `REPEATED`) and does not end the shard.

    Args:
        members: names and contents, in the order of the tar.
        url: url of the shard.
    """
    current: dict[str, Any] | None = None
    last_key: str | None = None
    count = 0
    seen: set[str] = set()
    names: set[str] = set()
    for name, content in members:
        parts = split_name(name)
        if parts is None:
            continue
        key, suffix = parts
        if current is None or key != last_key:
            if current is not None:
                yield current
            current, last_key = {"__key__": key, "__url__": url, NUMBER: count}, key
            names.clear()
            if key in seen:
                current[REPEATED] = True
            seen.add(key)
            count += 1
        if "\0" in name or not _is_unicode(name):
            current["__key__"] = printable(key)
            current[FAULT] = "member name is not UTF-8"
        lower = suffix.lower()
        if lower.startswith("__"):  # would pass for what is noted of a sample
            continue
        if name in names or (lower in current and not is_image(lower)):
            current[FAULT] = f"two members have the same name ({lower})"
        names.add(name)
        current.setdefault(lower, content)
    if current is not None:
        yield current


def printable(text: str) -> str:
    """A text that can be written as UTF-8: what cannot be is escaped."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def parse_sample(raw: dict[str, Any], *, caption_key: str | None = None) -> Sample:
    """Turns a raw sample into a `Sample`.

    Args:
        raw: what `group_members` gives.
        caption_key: metadata key that holds the captions, in place of ``.txt`` and ``captions``;
            dots lead into objects and lists of objects (``sentences.raw``).

    Raises:
        SampleError: there is no image, or a text member is not what its ending says.
    """
    if FAULT in raw:
        reason = str(raw[FAULT])
        raise SampleError(f"{place_of(raw)}: {reason}", reason=reason.partition(" (")[0])
    suffix = _image_suffix(raw)
    try:
        metadata = parse_metadata(raw["json"]) if "json" in raw else {}
        label = _text(raw["cls"], "label").strip() if "cls" in raw else ""
        texts = [_text(raw["txt"], "caption").strip()] if "txt" in raw else []
        if caption_key is None:
            captions = with_captions_of(metadata, texts)
        else:
            captions = tuple(dict.fromkeys(_captions_at(metadata, caption_key)))
        for text in (*captions, label):
            _check_length(text)
    except SampleError as error:
        raise SampleError(f"{place_of(raw)}: {error}", reason=error.reason) from error
    key = str(raw["__key__"])
    return Sample(key, raw[suffix], suffix.rpartition(".")[2], captions, label or None, metadata)


def require_captions(sample: Sample, raw: dict[str, Any]) -> None:
    """Checks that a sample has a caption.

    Raises:
        SampleError: it has none; the message says why, where that is known.
    """
    if sample.captions:
        return
    if raw.get(REPEATED):
        raise SampleError(f"{place_of(raw)}: {_NOT_ADJACENT_TEXT}", reason=NOT_ADJACENT)
    members = _member_names(raw)
    dotted = [name for name in members if name.endswith((".txt", ".json"))]
    if dotted:
        raise SampleError(
            f"{place_of(raw)}: the sample has no caption, but {', '.join(dotted)}: a key ends at "
            "the first dot of a name, so names must have no further dots",
            reason="no caption (dots in names)",
        )
    raise SampleError(
        f"{place_of(raw)}: the sample has no caption ({', '.join(members)})", reason="no caption"
    )


def check_texts(sample: Sample) -> None:
    """Checks that a sample from another source than a shard can be written into one.

    Raises:
        SampleError: a text of it is not Unicode, has a null byte or is too long, or its metadata
            is nested too deeply.
    """
    texts = [*sample.captions, sample.label or ""]
    _check_document({"texts": texts, "metadata": sample.metadata})
    for text in texts:
        _check_length(text)


def check_key(raw: dict[str, Any]) -> None:
    """Checks that a sample's key occurs in one place of its shard, so that it names the sample.

    Raises:
        SampleError: it occurs in several places.
    """
    if raw.get(REPEATED):
        raise SampleError(f"{place_of(raw)}: {_NOT_ADJACENT_TEXT}", reason=NOT_ADJACENT)


def place_of(raw: dict[str, Any]) -> str:
    """``SHARD#KEY``."""
    return f"{raw.get('__url__', 'shard')}#{raw.get('__key__', '?')}"


def with_captions_of(metadata: dict[str, Any], captions: Sequence[str]) -> tuple[str, ...]:
    """Captions from a text, then those of the metadata, which are taken out of it.

    Raises:
        SampleError: what the metadata calls captions are no texts.
    """
    found = [text for text in (*captions, *_texts(metadata.pop("captions", None))) if text]
    if not found and isinstance(metadata.get("caption"), str):  # img2dataset's name for it
        found = [metadata["caption"]]
    return tuple(dict.fromkeys(found))


def _image_suffix(raw: dict[str, Any]) -> str:
    found = [name for name in raw if not name.startswith("__") and is_image(name)]
    plain = [name for name in found if "." not in name]
    if plain:
        return plain[0]
    if len(found) == 1:
        return found[0]
    if found:
        shown = ", ".join(sorted(found)[:4]) + (", …" if len(found) > 4 else "")
        raise SampleError(
            f"{place_of(raw)}: the sample has {len(found)} images ({shown}), and none is named "
            "KEY.ENDING; a key ends at the first dot of a name, so names must have no further dots",
            reason="several images (dots in names)",
        )
    if raw.get(REPEATED):
        raise SampleError(f"{place_of(raw)}: {_NOT_ADJACENT_TEXT}", reason=NOT_ADJACENT)
    raise SampleError(
        f"{place_of(raw)}: no image among the members of the sample "
        f"({', '.join(_member_names(raw))})",
        reason="no image",
    )


def _member_names(raw: dict[str, Any]) -> list[str]:
    return sorted(name for name in raw if not name.startswith("__"))


def _text(content: bytes, what: str) -> str:
    if len(content) > _MAX_TEXT_BYTES:
        raise SampleError(f"the {what} has {len(content):,} bytes", reason="text is too long")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SampleError(
            f"the {what} cannot be read ({error})", reason="text is not UTF-8"
        ) from error
    if "\0" in text:
        raise SampleError(f"the {what} has a null byte", reason="null byte in a text")
    return text


def parse_metadata(content: bytes) -> dict[str, Any]:
    """What a .json member, or a .json file beside an image, holds.

    NaN and infinite numbers, which JSON has no word for, are read as null.

    Raises:
        SampleError: it is not a JSON object, or holds what is not Unicode.
    """
    if len(content) > _MAX_TEXT_BYTES:
        raise SampleError(
            f"the .json member has {len(content):,} bytes", reason="metadata is too large"
        )
    try:
        text = content.decode(json.detect_encoding(content))
        document = json.loads(text, parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError) as error:  # no JSON, no text, or made to do harm
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise SampleError(
            f"the .json member cannot be read ({reason})", reason="metadata is not JSON"
        ) from error
    if not isinstance(document, dict):
        raise SampleError(
            "the .json member is not an object", reason="metadata is not a JSON object"
        )
    # Only escapes can hide what is no Unicode, and only brackets nest.
    if "\\u" in text or text.count("[") + text.count("{") > _MAX_DEPTH:
        _check_document(document)
    return document


def _no_number(_: str) -> None:
    """NaN and Infinity are no JSON: null, as pandas reads and writes what is missing."""


def _finite(text: str) -> float | None:
    number = float(text)
    return number if abs(number) != float("inf") else None


def _check_document(document: dict[str, Any]) -> None:
    """Checks every text and the depth, without recursion."""
    level: list[Any] = [document]
    for _ in range(_MAX_DEPTH):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += [*value.keys(), *value.values()]
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, str) and "\0" in value:
                raise SampleError("a text has a null byte", reason="null byte in a text")
            elif isinstance(value, str) and not _is_unicode(value):
                raise SampleError(
                    "a text has half of a surrogate pair",
                    reason="text is not valid Unicode",
                )
        if not inner:
            return
        level = inner
    raise SampleError(
        f"the metadata is nested more than {_MAX_DEPTH} deep", reason="metadata is not JSON"
    )


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _texts(value: object) -> list[str]:
    """The captions that a metadata value holds: one or a list; numbers count, null is none."""
    found = []
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, str):
            found.append(one)
        elif isinstance(one, int | float) and not isinstance(one, bool):
            found.append(str(one) if one else "")
        elif one is not None:
            shown = repr(one)
            raise SampleError(
                f"a caption is {shown[:60]}{'…' if len(shown) > 60 else ''}, not a text; name the "
                "metadata key that holds the texts (data.caption_key)",
                reason="caption is not a text",
            )
    return found


def _captions_at(metadata: dict[str, Any], path: str) -> list[str]:
    """The texts at a key of the metadata; dots lead into objects, and into each of a list."""
    if path in metadata:
        return [text for text in _texts(metadata[path]) if text]
    values: list[Any] = [metadata]
    for part in path.split("."):
        objects = [
            one for value in values for one in (value if isinstance(value, list) else [value])
        ]
        values = [one[part] for one in objects if isinstance(one, dict) and part in one]
    return [text for value in values for text in _texts(value) if text]


def _check_length(text: str) -> None:
    if len(text) > MAX_TEXT_CHARACTERS:
        raise SampleError(
            f"a text has {len(text):,} characters, more than {MAX_TEXT_CHARACTERS:,}",
            reason="text is too long",
        )
