"""The captions that a model was trained with: a sample of them, and how often each word occurs.

A model's scores mean something for queries like those that it was trained with. So a run leaves a
sample of its captions in the model folder, as ``background.json``::

    {"format": "clipsys-background/1",
     "captions": ["a dog runs on the beach", ...],     one of each sampled image
     "words": {"a": 31210, "dog": 2180, ...}}          counts in all captions of these images

It holds texts alone, so it stays right when the weights are exported, averaged or quantised.
open_clip does not read it. Without it, everything goes on as before.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipsys.errors import ModelError

FILE_NAME = "background.json"
_FORMAT = "clipsys-background/1"
#: Captions in the sample: what a query is near to is known from so many to a few percent.
MAX_CAPTIONS = 800
#: Words that are kept; the rarest beyond these count as unknown.
_MAX_WORDS = 50_000
#: Longer ones are cut, so that a document among the captions does not fill the file.
_MAX_CHARACTERS = 1_000
_WORD = re.compile(r"\w+")

#: What a picture may show, for models whose training captions are unknown.
_THINGS = """
    dog cat horse bird fish cow sheep elephant bear flower tree forest mountain lake river beach
    island desert cloud sunset street bridge house church castle tower station market kitchen
    bedroom office garden park playground stadium car bus train bicycle motorcycle boat ship plane
    man woman child baby family crowd wedding concert party football tennis skateboard kite book
    newspaper map letter sign phone computer camera clock lamp chair table sofa bed mirror window
    door bread cake pizza fruit vegetable coffee bottle cup plate knife shirt dress shoe hat bag
    umbrella glasses ring painting statue drawing diagram chart toy guitar piano drum logo
"""
_SCENES = (
    "a photo of a {}",
    "a {} outdoors",
    "a close-up of a {}",
    "two people with a {}",
    "a small red {}",
    "a drawing of a {} on a white background",
    "a black and white picture of a {} at night",
    "{}",
)


@dataclass(frozen=True)
class TrainingCaptions:
    """What is known of the captions that a model was trained with.

    Attributes:
        captions: a sample.
        words: how often each word occurs in a larger sample; empty where that is unknown.
    """

    captions: tuple[str, ...]
    words: Mapping[str, int] = field(default_factory=dict)


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return _WORD.findall(text.casefold())


def sample_captions(images: Iterable[Sequence[str]]) -> TrainingCaptions:
    """Makes a sample of the captions of images, in whose order nothing may lie.

    Args:
        images: the captions of each.
    """
    captions, counts = [], Counter[str]()
    for number, texts in enumerate(images):
        used = [text[:_MAX_CHARACTERS] for text in texts if text.strip()]
        for text in used:
            counts.update(words_of(text))
        if used:
            captions.append(used[number % len(used)])
    kept = dict(sorted(counts.most_common(_MAX_WORDS)))
    return TrainingCaptions(tuple(_spread(captions, MAX_CAPTIONS)), kept)


def _spread(texts: Sequence[str], count: int) -> list[str]:
    """So many different texts, evenly over a list."""
    different = list(dict.fromkeys(texts))
    step = max(len(different) / count, 1.0)
    return [different[int(place * step)] for place in range(min(count, len(different)))]


def generic_captions() -> TrainingCaptions:
    """Captions as people write them, for a model whose own are unknown; no words are known."""
    return TrainingCaptions(
        tuple(scene.format(thing) for thing in _THINGS.split() for scene in _SCENES)
    )


def write_captions(folder: Path, captions: TrainingCaptions) -> None:
    """Writes ``background.json`` into a model folder, replacing one that is there."""
    document = {
        "format": _FORMAT,
        "captions": list(captions.captions),
        "words": dict(captions.words),
    }
    partial = folder / f"{FILE_NAME}.partial"
    partial.write_text(json.dumps(document, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(folder / FILE_NAME)


def read_captions(folder: Path) -> TrainingCaptions | None:
    """Reads ``background.json`` of a model folder; None where it has none.

    Raises:
        ModelError: the file is damaged.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        return _parse(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{path}: damaged ({error}); export the model again, or delete the file"
        ) from error


def captions_of(model: str | Path) -> TrainingCaptions | None:
    """The captions that lie in the folder of a model or of a run; None where there are none.

    Args:
        model: what `clipsys.load` takes.

    Raises:
        ModelError: the file is damaged.
    """
    folder = Path(str(model).removeprefix("local-dir:")).expanduser()
    return read_captions(folder) or read_captions(folder / "model")


def copy_captions(out: Path, *models: str | Path) -> None:
    """Puts the captions of the first of these models that has some into a model folder.

    Raises:
        ModelError: a file with captions is damaged.
    """
    for model in models:
        captions = captions_of(model) if str(model) else None
        if captions is not None:
            write_captions(out, captions)
            return


def _parse(document: dict[str, Any]) -> TrainingCaptions:
    if document["format"] != _FORMAT:
        raise ValueError(f"its format is {document['format']!r}, not {_FORMAT!r}")
    captions = TrainingCaptions(
        tuple(str(text) for text in document["captions"]),
        {str(word): int(count) for word, count in document["words"].items()},
    )
    return captions
