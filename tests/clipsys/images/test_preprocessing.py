from __future__ import annotations

import io
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageDraw

from clipsys.errors import ModelError
from clipsys.images.decoding import decode_image, decode_stored
from clipsys.images.preprocessing import Preprocessing
from tests.conftest import noise_image


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(40, 48), (100, 37), (33, 250), (32, 32), (5, 9)])
def test_pixels_equal_open_clips_transform_to_the_bit(
    mode: str, interpolation: str, shape: tuple[int, int]
) -> None:
    from open_clip.transform import image_transform

    preprocessing = Preprocessing((32, 32), resize_mode=mode, interpolation=interpolation)
    image = noise_image(1, shape)
    reference = image_transform(
        32, is_train=False, mean=preprocessing.mean, std=preprocessing.std,
        resize_mode=mode, interpolation=interpolation,
    )(image)  # fmt: skip
    mean = torch.tensor(preprocessing.mean).view(3, 1, 1)
    std = torch.tensor(preprocessing.std).view(3, 1, 1)
    ours = (torch.from_numpy(preprocessing.pixels(image)).float() / 255 - mean) / std
    assert torch.equal(ours, reference)


def test_settings_survive_the_way_through_open_clips_format() -> None:
    preprocessing = Preprocessing((48, 64), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", "squash")
    assert Preprocessing.from_open_clip(preprocessing.to_open_clip()) == preprocessing


def test_a_size_that_is_not_square_is_honoured() -> None:
    pixels = Preprocessing((20, 30)).pixels(noise_image(0))
    assert pixels.shape == (3, 20, 30)
    assert pixels.dtype == np.uint8


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ModelError, match="interpolation is 'cubic'"):
        Preprocessing.from_open_clip({"interpolation": "cubic"})
    with pytest.raises(ModelError, match="resize_mode is 'crop'"):
        Preprocessing.from_open_clip({"resize_mode": "crop"})


def _psnr(first: np.ndarray, second: np.ndarray) -> float:
    error = float(((first.astype(float) - second.astype(float)) ** 2).mean())
    return 10 * np.log10(255**2 / max(error, 1e-9))


def _jpeg(shape: tuple[int, int], orientation: int = 1, *, seed: int = 0) -> bytes:
    """A photograph-like JPEG of a (height, width): soft shapes, hard edges, fine grain."""
    rng = np.random.default_rng(seed)
    image = noise_image(seed, shape)
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = rng.integers(0, shape[1]), rng.integers(0, shape[0])
        radius = int(rng.integers(3, max(4, min(shape) // 5)))
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    grain = rng.normal(0, 5, (*shape, 3))
    pixels = np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize(
    ("shape", "orientations"),
    [((501, 333), range(1, 9)), ((375, 500), [1]), ((1201, 907), [6]), ((61, 47), [3]),
     ((160, 30), [5])],
)  # fmt: skip
def test_fast_pixels_are_within_40_db_of_the_reference(
    mode: str, shape: tuple[int, int], orientations: Sequence[int]
) -> None:
    for orientation, size in itertools.product(orientations, ((64, 64), (48, 80))):
        data = _jpeg(shape, orientation)
        preprocessing = Preprocessing(size, resize_mode=mode)
        reference = preprocessing.pixels(decode_image(data))
        stored = decode_stored(data, min_side=preprocessing.fast_min_side)
        assert _psnr(preprocessing.fast_pixels(stored), reference) > 40


def test_large_photographs_are_decoded_at_a_fraction() -> None:
    data = _jpeg((1500, 2003))
    preprocessing = Preprocessing((96, 96))
    stored = decode_stored(data, min_side=preprocessing.fast_min_side)
    assert (stored.scale, stored.image.size) == (8, (251, 188))
    reference = preprocessing.pixels(decode_image(data))
    assert _psnr(preprocessing.fast_pixels(stored), reference) > 40


def test_a_fraction_that_would_show_is_not_used() -> None:
    side = Preprocessing((96, 96)).fast_min_side
    assert decode_stored(_jpeg((2 * side - 1, 400)), min_side=side).scale == 1
    assert decode_stored(_jpeg((2 * side, 400)), min_side=side).scale == 2
