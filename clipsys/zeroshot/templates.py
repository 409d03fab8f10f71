"""Prompt templates: a sentence with ``{}`` for the class, and named sets of them.

A class vector averaged over many sentences is better than that of one (Radford et al. 2021,
"Learning Transferable Visual Models From Natural Language Supervision", section 3.1.4). The sets
cover what theirs and SigLIP's (Zhai et al. 2023) cover, in sentences of our own.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from clipsys.errors import ConfigError

#: Photographs of any quality, light, distance and number; other media; toys; groups.
_PHOTO_QUALITIES = (
    "an out-of-focus", "a sharp", "a grainy", "a dimly lit", "a brightly lit", "an overexposed",
    "a monochrome", "a faded", "a poor-quality", "a high-quality", "a heavily compressed",
    "a colourful", "a badly lit", "a beautiful", "a candid",
)  # fmt: skip
_VIEWS = (
    "seen from above", "seen from the side", "seen from far away", "seen from close by",
    "partly hidden", "in the foreground", "in the background", "cut off at the edge",
    "on a plain background", "in a cluttered scene", "at night", "in daylight", "indoors",
    "outdoors",
)  # fmt: skip
_KINDS = (
    "a crayon drawing", "a pencil sketch", "a line drawing", "an oil painting", "a watercolour",
    "an etching", "a cartoon", "a comic panel", "an icon", "a logo", "a sticker", "a pictogram",
    "a mosaic", "an inked tattoo", "a spray-painted mural", "an embroidery", "a carved statue",
    "a paper cut-out", "a wooden carving", "a plastic model", "a plush toy",
    "a computer rendering", "a screenshot from a video game", "a stamp", "a poster",
)  # fmt: skip
_OTHERS = (
    "a photo of a {}.", "this photo shows the {}.", "a single {} in a photo.",
    "several of the same {} in a photo.", "a photo that I took of my {}.",
    "a photo of a little {}.", "a photo of a big {}.", "a photo of an old {}.",
    "a photo of a new {}.", "a photo of a spotless {}.", "a photo of a muddy {}.",
    "a photo of a strange {}.", "a photo of a typical {}.", "a close-up of a {}.",
    "a photo that shows part of a {}.", "a wide shot of a {}.", "a snapshot of a {}.",
    "a portrait of a {}.", "a stock photo of a {}.", "a picture of a {}.", "an image of a {}.",
    "there is a {} in this photo.", "this is a {}.", "a {}, photographed.", "a {} on display.",
    "a real {}.",
)  # fmt: skip

#: Named sets of templates.
TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "simple": ("a photo of a {}.",),
    "plain": ("{}",),
    "siglip": (
        "{}",
        "a photo of a {}.",
        "a photo of the {}.",
        "a picture of a {}",
        "this is a {}.",
    ),
    "clip": tuple(
        itertools.chain(
            _OTHERS,
            (f"{one} photo of a {{}}." for one in _PHOTO_QUALITIES),
            (f"a photo of a {{}}, {one}." for one in _VIEWS),
            (f"{one} of a {{}}." for one in _KINDS),
        )
    ),
}
DEFAULT_TEMPLATES = TEMPLATES["simple"]


def find_templates(given: str | Sequence[str]) -> list[str]:
    """The templates of a named set, a single template, or several of both.

    Args:
        given: the name of a set (``simple``, ``clip``, ``siglip``, or ``plain``, which takes the
            texts of the classes as they are), or templates with one ``{}`` each.

    Raises:
        ConfigError: one is neither, or there is none.
    """
    names = [given] if isinstance(given, str) else list(given)
    found: list[str] = []
    for name in names or [""]:
        if name in TEMPLATES:
            found += TEMPLATES[name]
        elif name.count("{}") == 1:
            found.append(name)
        else:
            raise ConfigError(
                f"template {name!r}: expected one {{}} for the class name, or the name of a set: "
                f"{', '.join(TEMPLATES)}"
            )
    return list(dict.fromkeys(found))
