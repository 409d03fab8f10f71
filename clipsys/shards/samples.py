"""What a sample of a shard is, and what makes one unusable.

Members of a tar that share a name up to the first dot, and lie side by side, are one sample::

    000041.jpg     the image, encoded (any format that clipsys.images.decoding decodes)
    000041.txt     a caption
    000041.json    {"captions": ["…", "…"], …}; what is not captions is metadata
    000041.cls     optional class label

A sample may be a text alone, for objectives that look at no image.

Of several images the one whose name has no further dot is taken, ``000041.png`` before
``000041.depth.png``; of several such images (``.jpg`` and ``.jpeg``) the first in the tar. A single
``000041.seg.png`` is the image; several, and none without a further dot, make the sample unusable.

Every fault of a sample is a `SampleError` with a reason that can be counted. Whatever a sample
holds, it raises nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from clipsys.errors import SampleError
from clipsys.images.decoding import EXTENSIONS
from clipsys.shards.sample_texts import (
    captions_at,
    check_document,
    check_length,
    decoded_text,
    is_unicode,
    parse_metadata,
    with_captions_of,
)

_IMAGE_SUFFIXES = frozenset(ending.lstrip(".") for ending in EXTENSIONS)
#: As webdataset cuts a name (`base_plus_ext`): the folders and the name up to its first dot.
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)
#: Members that webdataset leaves out (`skip_meta` of its `tar_file_iterator`).
_META = re.compile(r"__[^/]*__($|/)")
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
    """One image with its captions, or a text alone.

    Attributes:
        key: unique within its shard.
        image: the encoded image, as it lies in the tar; empty where there is none.
        suffix: the image's file name ending, without the dot; empty where there is none.
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


def has_image(raw: dict[str, Any]) -> bool:
    """Whether a raw sample has a member that is an image."""
    return any(is_image(name) for name in raw if not name.startswith("__"))


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
        if "\0" in name or not is_unicode(name):
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


def parse_sample(
    raw: dict[str, Any], *, caption_key: str | None = None, needs_image: bool = True
) -> Sample:
    """Turns a raw sample into a `Sample`.

    Args:
        raw: what `group_members` gives.
        caption_key: metadata key that holds the captions, in place of ``.txt`` and ``captions``;
            dots lead into objects and lists of objects (``sentences.raw``).
        needs_image: whether a sample without an image is refused; else images are not looked for.

    Raises:
        SampleError: there is no image, or a text member is not what its ending says.
    """
    if FAULT in raw:
        reason = str(raw[FAULT])
        raise SampleError(f"{place_of(raw)}: {reason}", reason=reason.partition(" (")[0])
    suffix = _image_suffix(raw) if needs_image else ""
    try:
        metadata = parse_metadata(raw["json"]) if "json" in raw else {}
        label = decoded_text(raw["cls"], "label").strip() if "cls" in raw else ""
        texts = [decoded_text(raw["txt"], "caption").strip()] if "txt" in raw else []
        if caption_key is None:
            captions = with_captions_of(metadata, texts)
        else:
            captions = tuple(dict.fromkeys(captions_at(metadata, caption_key)))
        for text in (*captions, label):
            check_length(text)
    except SampleError as error:
        raise SampleError(f"{place_of(raw)}: {error}", reason=error.reason) from error
    key = str(raw["__key__"])
    image = raw[suffix] if suffix else b""
    return Sample(key, image, suffix.rpartition(".")[2], captions, label or None, metadata)


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
    check_document({"texts": texts, "metadata": sample.metadata})
    for text in texts:
        check_length(text)


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
