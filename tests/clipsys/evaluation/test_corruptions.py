"""Each corruption against the definition of ImageNet-C, written here a second time and naively."""

from __future__ import annotations

import colorsys
import io
import math

import numpy as np
import pytest
from PIL import Image

from clipsys.errors import ConfigError
from clipsys.evaluation.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    Corruption,
    Pixels,
    corruptions_of,
)

RANDOM = ("gaussian_noise", "shot_noise", "rotation")


def scene(height: int = 224, width: int = 224) -> Pixels:
    """A picture with an edge, a ramp and texture, so that every corruption shows."""
    rows, columns = np.mgrid[:height, :width]
    ramp = columns / max(width - 1, 1) * 180
    texture = 25 * np.random.default_rng(3).normal(size=(height, width))
    square = 60 * ((rows > height / 3) & (columns > width / 2))
    channels = [ramp + texture, ramp[:, ::-1] * 0.6 + square, texture + square + 60]
    return np.clip(np.stack(channels, axis=2), 0, 255).astype(np.uint8)


def distance(first: Pixels, second: Pixels) -> float:
    return float(np.abs(first.astype(float) - second).mean())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_higher_severity_takes_the_image_farther_away(name: str) -> None:
    image = scene()
    kept = image.copy()
    away = [distance(Corruption(name, severity)(image, 5), image) for severity in SEVERITIES]
    assert away == sorted(away)
    assert away[0] > 0.5
    assert np.array_equal(image, kept)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (7, 5), (64, 31)])
def test_every_shape_stays_as_it_is(name: str, shape: tuple[int, int]) -> None:
    for severity in SEVERITIES:
        made = Corruption(name, severity)(scene(*shape), 0)
        assert (made.shape, made.dtype) == ((*shape, 3), np.uint8)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_equal_seed_gives_equal_pixels_and_severity_zero_the_image(name: str) -> None:
    image = scene(48, 48)
    corruption = Corruption(name, 3)
    seeds = [corruption(image, seed) for seed in (1, 1, 2, 3, 4, 5)]
    assert np.array_equal(seeds[0], seeds[1])
    differs = any(not np.array_equal(seeds[0], other) for other in seeds[2:])
    assert differs == (name in RANDOM)
    assert np.array_equal(Corruption(name, 0)(image, 1), image)
    assert corruption(image, 2**64 - 1).shape == image.shape


@pytest.mark.parametrize(("severity", "spread"), list(enumerate((0.08, 0.12, 0.18, 0.26, 0.38), 1)))
def test_gaussian_noise_has_the_spread_of_the_definition(severity: int, spread: float) -> None:
    image = np.full((224, 224, 3), 128, np.uint8)
    noise = Corruption("gaussian_noise", severity)(image, 0) / 255
    # What clipping to 0..1 leaves of a normal distribution, by drawing from it.
    drawn = np.clip(128 / 255 + np.random.default_rng(9).normal(0, spread, 10**6), 0, 1)
    assert noise.mean() == pytest.approx(drawn.mean() - 0.5 / 255, abs=0.003)
    assert noise.std() == pytest.approx(drawn.std(), rel=0.01)


@pytest.mark.parametrize(("severity", "photons"), list(enumerate((60, 25, 12, 5, 3), 1)))
def test_shot_noise_has_the_spread_of_counted_photons(severity: int, photons: int) -> None:
    dark, bright = (
        Corruption("shot_noise", severity)(np.full((224, 224, 3), value, np.uint8), 0) / 255
        for value in (16, 64)
    )
    # Clipping hardly touches 16 / 255: the variance of a Poisson count is its mean.
    assert dark.std() == pytest.approx(math.sqrt(16 / 255 / photons), rel=0.02)
    assert bright.std() > dark.std()


@pytest.mark.parametrize(("severity", "sigma"), list(enumerate((1, 2, 3, 4, 6), 1)))
def test_a_blurred_point_is_the_gaussian_of_the_definition(severity: int, sigma: int) -> None:
    offsets = np.arange(-4 * sigma, 4 * sigma + 1)
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    weights /= weights.sum()
    edge = np.zeros((224, 224, 3), np.uint8)
    edge[:, 112:] = 255
    expected = np.cumsum(weights) * 255
    row = Corruption("gaussian_blur", severity)(edge, 0)[100, :, 0]
    found = row[112 - 4 * sigma : 112 + 4 * sigma + 1].astype(float)
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize(
    ("severity", "radius", "softness", "reach"),
    [(1, 3, 0.1, 1), (2, 4, 0.5, 1), (3, 6, 0.5, 1), (4, 8, 0.5, 1), (5, 10, 0.5, 2)],
)
def test_defocus_is_a_mean_over_the_disk_of_the_definition(
    severity: int, radius: int, softness: float, reach: int
) -> None:
    half = max(8, radius)
    size = 2 * half + 1
    disk = np.array(
        [
            [(row - half) ** 2 + (column - half) ** 2 <= radius**2 for column in range(size)]
            for row in range(size)
        ],
        float,
    )
    disk /= disk.sum()
    around = range(-reach, reach + 1)
    weights = {step: math.exp(-(step**2) / (2 * softness**2)) for step in around}
    total = sum(weights.values()) ** 2
    kernel = np.zeros_like(disk)
    mirrored = np.pad(disk, reach, mode="reflect")
    for down in around:
        for right in around:
            rows = slice(reach + down, reach + down + size)
            columns = slice(reach + right, reach + right + size)
            kernel += mirrored[rows, columns] * weights[down] * weights[right] / total
    image = scene()
    padded = np.pad(image / 255, ((half, half), (half, half), (0, 0)), mode="reflect")
    made = Corruption("defocus_blur", severity)(image, 0)
    for row, column in ((0, 0), (3, 200), (74, 112), (100, 50), (223, 223)):
        window = padded[row : row + size, column : column + size]
        expected = (window * kernel[:, :, None]).sum(axis=(0, 1)) * 255
        assert np.abs(made[row, column] - expected).max() <= 1


@pytest.mark.parametrize(("severity", "quality"), list(enumerate((25, 18, 15, 10, 7), 1)))
def test_jpeg_has_the_quality_of_the_definition(severity: int, quality: int) -> None:
    buffer = io.BytesIO()
    Image.fromarray(scene()).save(buffer, "JPEG", quality=quality)
    assert np.array_equal(Corruption("jpeg", severity)(scene(), 0), np.array(Image.open(buffer)))


@pytest.mark.parametrize(("severity", "share"), list(enumerate((0.4, 0.3, 0.2, 0.1, 0.05), 1)))
def test_contrast_keeps_the_means_and_shrinks_the_spread(severity: int, share: float) -> None:
    image = scene()
    made = Corruption("contrast", severity)(image, 0)
    mean = image.mean(axis=(0, 1))
    assert made.mean(axis=(0, 1)) == pytest.approx(mean - 0.5, abs=0.5)
    spread = image.std(axis=(0, 1)) * share
    assert made.std(axis=(0, 1)) == pytest.approx(spread, abs=0.3)


@pytest.mark.parametrize(("severity", "added"), list(enumerate((0.1, 0.2, 0.3, 0.4, 0.5), 1)))
def test_brightness_raises_the_value_of_hsv(severity: int, added: float) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    colours[0, :4] = [[0, 0, 0], [255, 255, 255], [255, 0, 0], [9, 9, 9]]
    made = Corruption("brightness", severity)(colours, 0)
    for before, after in zip(colours.reshape(-1, 3), made.reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(before / 255))
        expected = colorsys.hsv_to_rgb(hue, saturation, min(value + added, 1))
        assert np.abs(after - np.array(expected) * 255).max() <= 1 + 1e-6


@pytest.mark.parametrize(("severity", "share"), list(enumerate((0.6, 0.5, 0.4, 0.3, 0.25), 1)))
def test_pixelation_keeps_the_mean_and_leaves_as_many_blocks_as_defined(
    severity: int, share: float
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3)).astype(np.uint8)
    made = Corruption("pixelate", severity)(noise, 0)
    assert made.mean() == pytest.approx(noise.mean(), abs=1)
    changes = (np.diff(made.astype(int), axis=1) != 0).any(axis=(0, 2)).sum()
    side = int(224 * share)
    # Where blocks are not whole pixels wide, the pixel at their border is a mixture of both.
    assert side - 1 <= changes <= 2 * side


def test_a_rotation_turns_by_its_degrees_and_mirrors_at_the_edge() -> None:
    bar = np.zeros((224, 224, 3), np.uint8)
    bar[:, 110:114] = 255
    for severity, degrees in zip(SEVERITIES, (5, 10, 20, 30, 45), strict=True):
        made = Corruption("rotation", severity)(bar, 1)[62:162, 62:162, 0]
        rows, columns = np.nonzero(made > 128)
        slope = np.polyfit(rows, columns, 1)[0]
        assert abs(math.degrees(math.atan(slope))) == pytest.approx(degrees, abs=1)
    white = np.full((50, 80, 3), 255, np.uint8)
    assert Corruption("rotation", 5)(white, 0).min() == 255


def test_lengths_scale_with_the_side_of_the_image() -> None:
    large = np.zeros((448, 448, 3), np.uint8)
    large[:, 224:] = 255
    for name in ("gaussian_blur", "defocus_blur"):
        wide = Corruption(name, 4)(large, 0)
        small = Corruption(name, 4)(large[::2, ::2], 0)
        assert distance(wide.reshape(224, 2, 224, 2, 3).mean(axis=(1, 3)), small) < 0.6


def test_channels_that_stand_first_are_refused_by_every_corruption() -> None:
    for name in CORRUPTIONS:
        with pytest.raises(AssertionError, match=r"\(3, 8, 8\)"):
            Corruption(name, 1)(np.zeros((3, 8, 8), np.uint8), 0)


def test_what_is_not_defined_is_named() -> None:
    with pytest.raises(ConfigError, match="'fog' is not a corruption; choose from gaussian_noise"):
        Corruption("fog", 1)
    with pytest.raises(ConfigError, match="severity 6 is not defined; choose from 1 to 5"):
        corruptions_of(["jpeg"], [1, 6])
    with pytest.raises(ConfigError, match="no corruption is chosen"):
        corruptions_of([], [1])
    keys = {one.key for one in corruptions_of(CORRUPTIONS, SEVERITIES)}
    assert len(keys) == 5 * len(CORRUPTIONS)
