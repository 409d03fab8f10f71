"""Contact sheets: pictures with the words that belong to them, in rows."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image

from clipsys.errors import DataError
from clipsys.images.decoding import decode_image

#: Longer side of a picture, in pixels of the report.
SIDE = 160
_GREY = (200, 200, 200)


@dataclass(frozen=True)
class Tile:
    """One picture, or the words that stand in for one.

    Attributes:
        lines: what stands below it; a text query is a tile of lines alone.
        uri: of the image; empty where there is none.
        mark: ``right``, ``wrong`` or empty, for its border.
        image: the picture itself, where it is no file.
    """

    lines: tuple[str, ...]
    uri: str = ""
    mark: str = ""
    image: Image.Image | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Sheet:
    """Rows of tiles.

    Attributes:
        title: what they show.
        note: how to read them.
        rows: tiles, row by row.
        read: gives an image's bytes by its uri.
    """

    title: str
    note: str
    rows: Sequence[Sequence[Tile]]
    read: Callable[[str], bytes] = field(repr=False, compare=False)

    def thumbnails(self) -> Mapping[str, bytes]:
        """The pictures of the sheet as JPEGs, by uri; grey where one cannot be read."""
        uris = {tile.uri for row in self.rows for tile in row if tile.uri}
        return {uri: _thumbnail(uri, self.read) for uri in sorted(uris)}


def as_jpeg(image: Image.Image) -> bytes:
    """A picture for a report, no larger than a tile."""
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    if max(small.size) < SIDE // 2:  # tiny pictures are shown larger, their pixels as squares
        factor = SIDE // max(small.size)
        small = small.resize(
            (small.width * factor, small.height * factor), Image.Resampling.NEAREST
        )
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _thumbnail(uri: str, read: Callable[[str], bytes]) -> bytes:
    try:
        return as_jpeg(decode_image(read(uri), uri=uri, min_side=SIDE))
    except (DataError, OSError):
        return as_jpeg(Image.new("RGB", (SIDE, SIDE), _GREY))
