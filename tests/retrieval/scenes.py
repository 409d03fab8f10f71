"""A fake model of scenes, a colour and a thing each, that knows the words of its captions only.

A scene is an image whose red says the thing and whose green the colour. What the model was not
taught lands somewhere: near to no caption, but with cosines to images that scatter as usual.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipsys.background.captions import (
    TrainingCaptions,
    sample_captions,
    words_of,
    write_captions,
)
from tests.retrieval.colours import ColourEncoder

THINGS = ("dog", "cat", "car", "tree", "boat", "house", "star", "ball")
HUES = ("red", "green", "blue", "white", "black", "pink")
_STEP = 20
_DIM = 32
_PATTERNS = ("a {} {}", "the {} {} there", "a {} {} and nothing else")


class SceneEncoder(ColourEncoder):
    """Sums a vector for each known word; an unknown one adds a vector of its own."""

    def __init__(self) -> None:
        super().__init__(dim=_DIM)
        rng = np.random.default_rng(5)
        self._known = {word: rng.normal(size=_DIM) for word in (*THINGS, *HUES)}
        self._text = rng.normal(size=_DIM)

    def encode_pixels(self, pixels_BCHW: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        self.num_encoded += len(pixels_BCHW)
        vectors = []
        for red, green, blue in pixels_BCHW.reshape(len(pixels_BCHW), 3, -1).mean(2).round():
            noise = np.random.default_rng(int(blue)).normal(size=_DIM)
            thing, hue = THINGS[int(red) // _STEP], HUES[int(green) // _STEP]
            vectors.append(self._known[thing] + self._known[hue] + 0.3 * noise)
        return _unit(np.array(vectors))

    def encode_text(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        return _unit(np.array([self._sum(words_of(text)) for text in texts]))

    def _sum(self, words: list[str]) -> npt.NDArray[np.float64]:
        total = 0.6 * self._text
        for word in words:
            if word in self._known:
                total = total + self._known[word]
            elif len(word) > 3 and word not in ("there", "nothing", "else"):
                seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big")
                total = total + np.random.default_rng(seed).normal(size=_DIM)
        return total


def _unit(vectors_ND: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    return (vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)).astype(np.float32)


def paint_scenes(folder: Path, things: Sequence[str] = THINGS, *, copies: int = 1) -> Path:
    """Writes an image of each thing in each colour, named ``red-dog-0.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    for thing in things:
        for hue in HUES:
            for copy in range(copies):
                place = THINGS.index(thing), HUES.index(hue)
                colour = (*(number * _STEP + 5 for number in place), 7 * copy + sum(place))
                Image.new("RGB", (24, 24), colour).save(folder / f"{hue}-{thing}-{copy}.png")
    return folder


def scene_captions() -> TrainingCaptions:
    """Captions of all scenes."""
    return sample_captions(
        [[pattern.format(hue, thing)] for pattern in _PATTERNS for thing in THINGS for hue in HUES]
    )


def write_scene_model(folder: Path) -> Path:
    """A model folder that has its captions, and nothing else that is needed here."""
    folder.mkdir(parents=True)
    write_captions(folder, scene_captions())
    return folder
