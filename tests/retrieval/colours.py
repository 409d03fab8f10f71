"""A fake encoder that sees colours, and images to show it.

A text is encoded as a plain image of the colour that it names, so texts and images share a space
and a nearest neighbour can be worked out by hand. No model, no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipsys.images.decoding import decode_image

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 170, 60),
    "blue": (40, 70, 220),
    "yellow": (245, 215, 50),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
SIDE = 4


class ColourEncoder:
    """Unit vectors from 4 x 4 pixels by a fixed random projection."""

    def __init__(self, dim: int = 24, seed: int = 0) -> None:
        self.name = f"colours-{seed}"
        self.spec = self.name
        self.dim = dim
        self.fingerprint = hashlib.sha256(f"{dim}/{seed}".encode()).hexdigest()
        self.num_encoded = 0
        self.logit_scale = 20.0
        self.logit_bias: float | None = None
        generator = np.random.default_rng(seed)
        self._projection = generator.normal(size=(3 * SIDE * SIDE, dim))

    def preprocess(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
        return np.ascontiguousarray(np.asarray(small).transpose(2, 0, 1))

    def read_pixels(
        self, source: str | Path | bytes, *, uri: str | None = None
    ) -> npt.NDArray[np.uint8]:
        return self.preprocess(decode_image(source, uri=uri))

    def encode_pixels(self, pixels_BCHW: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        self.num_encoded += len(pixels_BCHW)
        centred = pixels_BCHW.reshape(len(pixels_BCHW), -1).astype(np.float64) / 127.5 - 1
        vectors = centred @ self._projection + 0.01
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    def encode_image(self, images: Sequence[Image.Image]) -> npt.NDArray[np.float32]:
        return self.encode_pixels(np.stack([self.preprocess(image) for image in images]))

    def encode_text(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        plain = [Image.new("RGB", (SIDE, SIDE), self._colour(text)) for text in texts]
        vectors = self.encode_image(plain)
        self.num_encoded -= len(texts)
        return vectors

    @staticmethod
    def _colour(text: str) -> tuple[int, int, int]:
        for name, colour in COLOURS.items():
            if name in text.lower():
                return colour
        red, green, blue = hashlib.sha256(text.encode()).digest()[:3]
        return (red, green, blue)


def paint(path: Path, colour: str | tuple[int, int, int], *, mark: int = 0) -> Path:
    """Writes a 24 x 24 PNG of one colour; a mark makes it a different image of that colour."""
    rgb = COLOURS[colour] if isinstance(colour, str) else colour
    image = Image.new("RGB", (24, 24), rgb)
    generator = np.random.default_rng(mark)
    for x, y in generator.integers(0, 24, (mark % 97, 2)):
        image.putpixel((int(x), int(y)), tuple(255 - value for value in rgb))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def paint_folder(folder: Path, *, num_images: int, seed: int = 0) -> Path:
    """Writes images of random colours, each different."""
    generator = np.random.default_rng(seed)
    for number in range(num_images):
        red, green, blue = (int(value) for value in generator.integers(0, 256, 3))
        paint(folder / f"{number:04d}.png", (red, green, blue), mark=number)
    return folder
