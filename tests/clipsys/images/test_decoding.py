from __future__ import annotations

import io
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipsys.errors import ImageDecodeError
from clipsys.images.decoding import EXTENSIONS, decode_image, decode_stored
from tests.conftest import noise_image


def _bytes(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "HEIF", "PPM"]
)
def test_every_common_format_decodes_to_rgb(kind: str) -> None:
    decode_image(_bytes(noise_image(0), "PNG"))  # registers HEIF, so that Pillow can write it
    image = decode_image(_bytes(noise_image(0), kind))
    assert image.mode == "RGB"
    assert image.size == (48, 40)
    difference = np.abs(np.asarray(image, float) - np.asarray(noise_image(0), float)).mean()
    assert difference < 12


def test_path_bytes_and_open_file_give_the_same_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    noise_image(1).save(path)
    with path.open("rb") as file:
        images = [decode_image(path), decode_image(path.read_bytes()), decode_image(file)]
    assert len({image.tobytes() for image in images}) == 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = Image.new("RGB", (8, 4), "white")
    upright.putpixel((0, 0), (255, 0, 0))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert decode_image(_bytes(stored, "PNG", exif=exif)).tobytes() == upright.tobytes()


def test_nonsense_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 0
    assert decode_image(_bytes(noise_image(2), "PNG", exif=exif)).size == (48, 40)


def test_transparency_is_put_on_white() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert decode_image(_bytes(clear, "PNG")).getpixel((0, 0)) == (255, 255, 255)


def test_palette_with_transparency_is_put_on_white() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 1), 1)
    decoded = decode_image(_bytes(image, "PNG", transparency=0))
    assert decoded.getpixel((0, 0)) == (255, 255, 255)
    assert decoded.getpixel((1, 1)) == (0, 255, 0)


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, 16).astype(np.uint16).reshape(4, 4)
    decoded = np.asarray(decode_image(_bytes(Image.fromarray(values), "PNG")))
    assert np.array_equal(decoded[..., 0], np.rint(values / 257.0).astype(np.uint8))


def test_cmyk_jpeg_comes_out_in_its_colours() -> None:
    decoded = decode_image(
        _bytes(Image.new("RGB", (16, 16), (200, 30, 30)).convert("CMYK"), "JPEG")
    )
    assert np.abs(np.asarray(decoded, int)[8, 8] - [200, 30, 30]).max() < 20


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = _bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(data).getpixel((0, 0)) == (255, 0, 0)


def _pillows(data: bytes, scale: int = 1) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (image.width // scale, image.height // scale))
        return image.convert("RGB")


@pytest.mark.parametrize("shape", [(1, 1), (64, 48), (203, 101), (77, 160)])
@pytest.mark.parametrize("options", [
    {"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"quality": 3},
    {"progressive": True}, {"restart_marker_blocks": 3},
])  # fmt: skip
def test_jpegs_have_pillows_pixels_to_the_bit(
    shape: tuple[int, int], options: dict[str, Any]
) -> None:
    for mode in ("RGB", "L", "CMYK"):
        data = _bytes(noise_image(2, shape).convert(mode), "JPEG", **options)
        for scale in (1, 2, 4, 8):
            stored = decode_stored(data, min_side=min(shape) // scale or None)
            assert stored.full_size == shape[::-1]
            assert stored.image.tobytes() == _pillows(data, stored.scale).tobytes()


def test_pillow_decides_which_damaged_jpegs_are_used() -> None:
    rng = np.random.default_rng(1)
    used = 0
    for number in range(120):
        options = {"progressive": number % 3 == 0}
        damaged = bytearray(_bytes(noise_image(6, (96, 96)), "JPEG", **options))
        if number % 2:
            del damaged[rng.integers(len(damaged) // 2, len(damaged)) :]
        for at in rng.integers(len(damaged) // 2, len(damaged), number % 4):
            damaged[at] = rng.integers(256)
        try:
            expected = _pillows(bytes(damaged))
        except OSError:
            with pytest.raises(ImageDecodeError):
                decode_image(bytes(damaged))
        else:
            assert decode_image(bytes(damaged)).tobytes() == expected.tobytes()
            used += 1
    assert 20 < used < 100


def test_of_several_pictures_in_a_jpeg_the_first_is_taken_also_at_a_fraction() -> None:
    first, second = noise_image(7, (160, 160)), noise_image(8, (160, 160))
    data = _bytes(first, "MPO", save_all=True, append_images=[second])
    assert decode_image(data).tobytes() == _pillows(_bytes(first, "JPEG")).tobytes()
    assert decode_image(data, min_side=40).size == (40, 40)


def test_min_side_decodes_large_jpegs_at_a_fraction() -> None:
    data = _bytes(noise_image(3, (800, 1200)), "JPEG")
    small = decode_image(data, min_side=150)
    assert min(small.size) >= 150
    assert small.width < 1200


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"not an image at all", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "not an image"),
        (_png_header(60_000, 60_000), "too large"),
    ],
)
def test_what_cannot_be_used_says_why(data: bytes, reason: str) -> None:
    with pytest.raises(ImageDecodeError) as caught:
        decode_image(data, uri="photo.png")
    assert caught.value.reason == reason
    assert str(caught.value).startswith("photo.png: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_a_truncated_image_is_refused_not_padded(kind: str) -> None:
    data = _bytes(noise_image(4, (200, 200)), kind)
    with pytest.raises(ImageDecodeError):
        decode_image(data[: len(data) * 2 // 3])


def test_the_pixel_limit_counts_the_header_before_decoding() -> None:
    data = _bytes(noise_image(5), "PNG")
    assert decode_image(data, max_pixels=48 * 40)
    with pytest.raises(ImageDecodeError, match=r"48 x 40 pixels, more than the 1,919 allowed"):
        decode_image(data, max_pixels=48 * 40 - 1)


def test_missing_file_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(ImageDecodeError, match=r"gone\.png: cannot be read \(No such file"):
        decode_image(tmp_path / "gone.png")


def test_the_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ImageDecodeError("a: b", uri="a", reason="corrupt")))
    assert (str(error), error.uri, error.reason) == ("a: b", "a", "corrupt")


def test_random_damage_never_escapes_the_error_tree() -> None:
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        original = bytearray(_bytes(noise_image(6), kind))
        for _ in range(40):
            damaged = bytearray(original)
            for position in rng.integers(0, len(damaged), 8):
                damaged[position] = int(rng.integers(0, 256))
            try:
                assert decode_image(bytes(damaged)).mode == "RGB"
            except ImageDecodeError as error:
                assert error.reason in {"corrupt", "truncated", "not an image", "too large"}


def test_extensions_are_lower_case_with_a_dot() -> None:
    assert all(ending.startswith(".") and ending == ending.lower() for ending in EXTENSIONS)
