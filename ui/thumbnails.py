"""Small copies of a collection's images, the only image files that the app gives out.

The photographs themselves are never served and their folders never opened to the browser: the
server may read this cache folder and nothing else. A thumbnail is named by the hash of its image's
content, which says nothing about where the image lies, and stays right for as long as it exists.
"""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image, ImageDraw

from clipsys.corpora.sources import read_uri
from clipsys.errors import DataError
from clipsys.images.decoding import decode_image
from clipsys.retrieval import Item

#: Longest side in pixels: sharp in a grid on a dense display, and large enough to look at.
THUMBNAIL_SIDE = 640
_QUALITY = 82
_PLACEHOLDER = "unavailable"

_logger = logging.getLogger(__name__)


class ThumbnailCache:
    """Makes thumbnails when they are first asked for. Thread-safe, also between processes."""

    def __init__(self, folder: Path) -> None:
        """Uses a folder, or a temporary one if it cannot be written to."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            writable = os.access(folder, os.W_OK)
        except OSError:
            writable = False
        self.folder = folder if writable else Path(tempfile.mkdtemp(prefix="clipsys-thumbnails-"))
        if not writable:
            _logger.info("%s: cannot be written to; thumbnails go to %s", folder, self.folder)
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "clipsys-thumbnails")

    def paths(self, items: Sequence[Item]) -> list[Path]:
        """A thumbnail of each item; a grey picture that says so where the image is gone."""
        return list(self._pool.map(self._path, items))

    def _path(self, item: Item) -> Path:
        path = self.folder / f"{item.content_hash}.webp"
        if not path.exists():
            try:
                image = decode_image(read_uri(item.uri), uri=item.uri, min_side=THUMBNAIL_SIDE)
            except DataError as error:
                _logger.warning("no thumbnail: %s", error)
                return self._placeholder()
            image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
            _save(image, path)
        return path

    def _placeholder(self) -> Path:
        path = self.folder / f"{_PLACEHOLDER}.webp"
        if not path.exists():
            image = Image.new("RGB", (320, 320), (128, 132, 140))
            text = "the image is\nno longer there"
            draw = ImageDraw.Draw(image)
            draw.text((160, 160), text, fill=(255, 255, 255), anchor="mm", font_size=26)
            _save(image, path)
        return path


def _save(image: Image.Image, path: Path) -> None:
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        image.save(beside, "WEBP", quality=_QUALITY)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
