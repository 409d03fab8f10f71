"""Captions, labels and metadata of samples: read from their members and checked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from clipsys.errors import SampleError

#: Objects and lists inside one another; SQLite's limit is 1,000, Python's own lower in deep calls.
_MAX_DEPTH = 64
#: A text member of a sample that is larger than this is not read.
_MAX_TEXT_BYTES = 16 << 20
#: A tokenizer takes seconds for a word of this length.
MAX_TEXT_CHARACTERS = 20_000


def with_captions_of(metadata: dict[str, Any], captions: Sequence[str]) -> tuple[str, ...]:
    """Captions from a text, then those of the metadata, which are taken out of it.

    Raises:
        SampleError: what the metadata calls captions are no texts.
    """
    found = [text for text in (*captions, *_texts(metadata.pop("captions", None))) if text]
    if not found and isinstance(metadata.get("caption"), str):  # img2dataset's name for it
        found = [metadata["caption"]]
    return tuple(dict.fromkeys(found))


def decoded_text(content: bytes, what: str) -> str:
    """A text member as a string; ``what`` names it in messages.

    Raises:
        SampleError: it is too long, not UTF-8 or has a null byte.
    """
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
        check_document(document)
    return document


def _no_number(_: str) -> None:
    """NaN and Infinity are no JSON: null, as pandas reads and writes what is missing."""


def _finite(text: str) -> float | None:
    number = float(text)
    return number if abs(number) != float("inf") else None


def check_document(document: dict[str, Any]) -> None:
    """Checks every text and the depth, without recursion.

    Raises:
        SampleError: a text is not Unicode or has a null byte, or the nesting is too deep.
    """
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
            elif isinstance(value, str) and not is_unicode(value):
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


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _texts(value: object, setting: str = "data.caption_key") -> list[str]:
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
                f"metadata key that holds the texts ({setting})",
                reason="caption is not a text",
            )
    return found


def captions_at(
    metadata: dict[str, Any], path: str, setting: str = "data.caption_key"
) -> list[str]:
    """The texts at a key of the metadata; dots lead into objects, and into each of a list.

    Args:
        metadata: of a sample.
        path: the key.
        setting: that names it, for messages.

    Raises:
        SampleError: what is there is no text.
    """
    if path in metadata:
        return [text for text in _texts(metadata[path], setting) if text]
    values: list[Any] = [metadata]
    for part in path.split("."):
        objects = [
            one for value in values for one in (value if isinstance(value, list) else [value])
        ]
        values = [one[part] for one in objects if isinstance(one, dict) and part in one]
    return [text for value in values for text in _texts(value, setting) if text]


def check_length(text: str) -> None:
    """Refuses a text that a tokenizer would take seconds for.

    Raises:
        SampleError: it is too long.
    """
    if len(text) > MAX_TEXT_CHARACTERS:
        raise SampleError(
            f"a text has {len(text):,} characters, more than {MAX_TEXT_CHARACTERS:,}",
            reason="text is too long",
        )
