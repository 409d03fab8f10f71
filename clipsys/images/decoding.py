"""From bytes to an upright RGB image: the one decoder of training, indexing, search and the app.

Order matters here. The size in the header is checked before anything is decoded (a file of 5 KB can
claim 4 gigapixels). Pixels are loaded *before* EXIF is read: on some corrupt PNGs a failed
``getexif()`` leaves the decoder in a state in which ``load()`` returns partial pixels silently.

Pillow reads the headers of all formats. The pixels of whole, ordinary JPEGs come from simplejpeg:
libjpeg-turbo as in Pillow, with the same result to the bit, without the copies around it. Whatever
it refuses is left to Pillow, so that one decoder decides what can be used.
"""

from __future__ import annotations

import functools
import io
import logging
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from clipsys.errors import ImageDecodeError
from clipsys.files.regular import NotRegularError, read_regular
from clipsys.images.native_messages import captured_messages

_logger = logging.getLogger(__name__)

DEFAULT_MAX_PIXELS = 178_000_000

#: Refused although Pillow knows them: EPS starts Ghostscript, the others are vector graphics,
#: documents or data containers that Pillow only has stubs for.
REFUSED_FORMATS = frozenset({"EPS", "WMF", "PDF", "MPEG", "BUFR", "GRIB", "HDF5", "IPTC"})

#: MPO is a JPEG with more of them behind it, as telephones write them.
_JPEG_FORMATS = ("JPEG", "MPO")

#: File name endings, in lower case, under which folders are searched for images.
EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"}
    | {".avif", ".avifs", ".heic", ".heif", ".hif", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm"}
    | {".tga", ".ico", ".pcx", ".qoi"}
)

#: What turns a stored image upright, by its EXIF orientation.
UPRIGHT_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What Pillow was seen to raise on 17,085 hard files, and what its decoders may raise besides.
_DECODER_ERRORS = (
    OSError, ValueError, SyntaxError, NotImplementedError, TypeError, RuntimeError, MemoryError,
    KeyError, IndexError, AttributeError, ArithmeticError, EOFError, struct.error, zlib.error,
    Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip


@dataclass(frozen=True)
class StoredImage:
    """A decoded image as its file stores it: not yet turned upright, maybe at a fraction.

    Attributes:
        content: 8-bit RGB; from simplejpeg an array, (height, width, 3).
        full_size: (width, height) in the file, in pixels.
        scale: ``content`` is 1/scale of that, its sides rounded up: its last row and column may
            stand for fewer than ``scale`` pixels.
        orientation: EXIF's number, 1 to 8; 1 is upright.
    """

    content: Image.Image | npt.NDArray[np.uint8]
    full_size: tuple[int, int]
    scale: int = 1
    orientation: int = 1

    @property
    def image(self) -> Image.Image:
        """As Pillow's image; may be a copy."""
        content = self.content
        return content if isinstance(content, Image.Image) else Image.fromarray(content)

    @property
    def pixels(self) -> npt.NDArray[np.uint8]:
        """As an array, (height, width, 3); may be a copy."""
        return np.array(self.content) if isinstance(self.content, Image.Image) else self.content

    def upright(self) -> Image.Image:
        """The image as it is meant to be seen."""
        turn = UPRIGHT_TURNS.get(self.orientation)
        return self.image if turn is None else _turned(self.image, turn)


def decode_image(
    source: str | Path | bytes | IO[bytes],
    *,
    uri: str | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    min_side: int | None = None,
) -> Image.Image:
    """Decodes one image to 8-bit RGB, upright by its EXIF orientation, transparency on white.

    Animated files give their first frame; 16-bit and float images are scaled to 8 bits; truncated
    files are refused, never padded.

    Args:
        source: a path, the file's bytes, or a binary file open for reading.
        uri: what error messages call it; the path if not given.
        max_pixels: the largest width x height accepted, checked in the header before decoding.
        min_side: decode JPEGs at a fraction (1/2, 1/4, 1/8) of their size, as long as no side falls
            below this many pixels. Much faster for photographs, slightly softer.

    Raises:
        ImageDecodeError: the image cannot be used; its ``reason`` is a countable category.
    """
    stored = decode_stored(source, uri=uri, max_pixels=max_pixels, min_side=min_side)
    return stored.upright()


def finish_opened(image: Image.Image, *, uri: str = "image") -> Image.Image:
    """What `decode_image` gives of the file, for an image that Pillow has opened or made.

    Args:
        image: stays as it is, except that its pixels are loaded.
        uri: what error messages call it.

    Raises:
        ImageDecodeError: its pixels cannot be loaded.
    """
    messages: list[str] = []
    try:
        _load(image, uri, messages)
        turn = UPRIGHT_TURNS.get(_orientation(image))
        rgb = _to_rgb(image)
        return rgb if turn is None else _turned(rgb, turn)
    except _DECODER_ERRORS as error:
        reason = "truncated" if "truncated" in str(error).lower() else "corrupt"
        what = "; ".join([_one_line(error), *dict.fromkeys(messages)])
        raise ImageDecodeError(
            f"{uri}: the image does not decode ({what})", uri=uri, reason=reason
        ) from error


def decode_stored(
    source: str | Path | bytes | IO[bytes],
    *,
    uri: str | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    min_side: int | None = None,
) -> StoredImage:
    """`decode_image` before the image is turned upright, for who turns a smaller one instead."""
    name = uri or (str(source) if isinstance(source, str | Path) else "image")
    data = _read(source, name)
    if not data:
        raise ImageDecodeError(f"{name}: the file is empty", uri=name, reason="empty")
    image = _open(data, name)
    width, height = image.size
    if width * height > max_pixels:
        raise ImageDecodeError(
            f"{name}: claims {width} x {height} pixels, more than the {max_pixels:,} allowed; "
            "raise max_image_pixels to accept it",
            uri=name,
            reason="too large",
        )
    messages: list[str] = []
    try:
        if image.format in _JPEG_FORMATS:
            scale = _fraction(min(width, height), min_side)
            pixels = _decode_jpeg(data, image, scale)
            if pixels is not None:
                return StoredImage(pixels, (width, height), scale, _orientation(image))
            image.draft("RGB", (width // scale, height // scale))
        _load(image, name, messages)
        # TIFF and HEIF turn themselves while they load; only JPEG comes at a fraction.
        full_size = (width, height) if image.format in _JPEG_FORMATS else image.size
        scale = round(full_size[0] / image.width)
        return StoredImage(_to_rgb(image), full_size, scale, _orientation(image))
    except _DECODER_ERRORS as error:
        reason = "truncated" if "truncated" in str(error).lower() else "corrupt"
        what = "; ".join([_one_line(error), *dict.fromkeys(messages)])
        raise ImageDecodeError(
            f"{name}: the image does not decode ({what})", uri=name, reason=reason
        ) from error


def _turned(image: Image.Image, turn: Image.Transpose) -> Image.Image:
    turned = image.transpose(turn)
    turned.info = {}  # Pillow copies the orientation; nothing may turn the image once more
    return turned


def _load(image: Image.Image, name: str, messages: list[str]) -> None:
    """Decodes the pixels; ``messages`` takes what libtiff says of them."""
    if image.format != "TIFF":
        image.load()
        return
    said: list[str] = []
    try:
        with captured_messages() as said:
            image.load()
    finally:
        messages += said
        if said:
            _logger.debug("%s: libtiff says: %s", name, "; ".join(said))


def _fraction(side: int, min_side: int | None) -> int:
    """The largest of libjpeg's fast fractions, 1/8, 1/4 and 1/2, that leaves ``min_side``."""
    if min_side is None:
        return 1
    return next((scale for scale in (8, 4, 2) if side >= scale * min_side), 1)


def _decode_jpeg(data: bytes, image: Image.Image, scale: int) -> npt.NDArray[np.uint8] | None:
    """The pixels at 1/scale, (height, width, 3), as Pillow would give them.

    None where simplejpeg does not give just these: CMYK, rare subsamplings, damage of any kind.
    """
    if image.mode not in ("RGB", "L"):
        return None
    import simplejpeg

    width, height = (math.ceil(side / scale) for side in image.size)
    try:
        pixels: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(
            data, "RGB", min_height=height, min_width=width, min_factor=scale
        )
    except _DECODER_ERRORS:
        return None
    return pixels if pixels.shape == (height, width, 3) else None


def _read(source: str | Path | bytes | IO[bytes], name: str) -> bytes:
    if isinstance(source, bytes):
        return source
    try:
        return read_regular(source) if isinstance(source, str | Path) else source.read()
    except NotRegularError as error:
        raise ImageDecodeError(
            f"{name}: is {error.strerror}", uri=name, reason="not a file"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or _one_line(error)
        raise ImageDecodeError(
            f"{name}: cannot be read ({reason})", uri=name, reason="unreadable"
        ) from error


def _open(data: bytes, name: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=known_formats())
    except Image.DecompressionBombError as error:
        raise ImageDecodeError(
            f"{name}: claims too many pixels ({_one_line(error)})", uri=name, reason="too large"
        ) from error
    except UnidentifiedImageError as error:
        raise ImageDecodeError(
            f"{name}: not an image in a known format", uri=name, reason="not an image"
        ) from error
    except _DECODER_ERRORS as error:
        raise ImageDecodeError(
            f"{name}: the image header is damaged ({_one_line(error)})", uri=name, reason="corrupt"
        ) from error


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DECODER_ERRORS:
        # The pixels are whole (load() passed); only the EXIF block is damaged, so there is no
        # orientation to apply.
        return 1
    return orientation if orientation in UPRIGHT_TURNS else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _scale_to_8_bits(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    values = np.nan_to_num(np.asarray(image).astype(np.float32))
    if image.mode == "F":  # float images have no nominal range: use what is there
        low, high = float(values.min()), float(values.max())
        scaled = (values - low) * (255.0 / (high - low)) if high > low else np.zeros_like(values)
    else:  # "I" holds 16-bit greyscale in 32-bit integers
        scaled = values * (255.0 / 65535.0)
    return Image.fromarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8))


@functools.cache
def known_formats() -> tuple[str, ...]:
    """The formats that `decode_image` accepts, by Pillow's names."""
    import pillow_heif

    pillow_heif.register_heif_opener()
    Image.init()
    return tuple(name for name in Image.ID if name not in REFUSED_FORMATS)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.replace("<_io.BytesIO object", "<bytes").removesuffix(".")
