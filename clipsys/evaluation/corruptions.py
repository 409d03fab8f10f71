"""Corruptions of images as ImageNet-C defines them, for measuring how robust a model is.

    decoded image --resize, crop of the model--> pixels_HWC uint8 --Corruption--> pixels_HWC uint8

Constants and definitions are those of Hendrycks & Dietterich 2019, "Benchmarking Neural Network
Robustness to Common Corruptions and Perturbations" (github.com/hendrycks/robustness,
``ImageNet-C/create_c/make_imagenet_c.py``), which corrupts 224 x 224 crops. Results are truncated
to whole numbers, as there. What differs:

- The published ImageNet-C is stored as JPEG of quality 85; here nothing is compressed afterwards.
- Lengths (widths of blurs) are pixels of a 224-pixel crop and are scaled by side / 224, so that a
  severity takes away the same share of the scene at every input size. The authors, too, blur their
  64-pixel version less (sigma 1.5 instead of 6; scaled: 1.7). Noise, contrast, brightness and JPEG
  quality are properties of single pixels or blocks, and are not scaled. Below about 64 pixels the
  lowest severities of the blurs change hardly anything.
- ImageNet-C has no rotation. Here it turns by 5, 10, 20, 30 or 45 degrees, left or right by the
  seed, about the centre; the corners show the image mirrored at its edge.

Legend of shapes: H height, W width, C channels, K width of a kernel.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipsys.errors import ConfigError

Pixels = npt.NDArray[np.uint8]
Doubles = npt.NDArray[np.float64]

SEVERITIES = (1, 2, 3, 4, 5)
#: Side of the images that the constants are defined on.
REFERENCE_SIDE = 224
#: Part of every key; raise it when a corruption makes other pixels than before.
_VERSION = 1


@dataclass(frozen=True)
class Corruption:
    """One corruption at one severity; equal pixels and an equal seed give equal pixels.

    Attributes:
        name: a key of `CORRUPTIONS`.
        severity: 1 to 5; 0 leaves every image as it is.

    Raises:
        ConfigError: there is no such corruption or severity.
    """

    name: str
    severity: int

    def __post_init__(self) -> None:
        if self.name not in CORRUPTIONS:
            raise ConfigError(
                f"{self.name!r} is not a corruption; choose from {', '.join(CORRUPTIONS)}"
            )
        if self.severity not in (0, *SEVERITIES):
            raise ConfigError(f"severity {self.severity} is not defined; choose from 1 to 5")

    @property
    def key(self) -> str:
        """Names what is done to the pixels, for caches."""
        return f"{self.name}-{self.severity}-v{_VERSION}"

    def __call__(self, pixels_HWC: Pixels, seed: int) -> Pixels:
        """The image corrupted, of the same shape.

        Args:
            pixels_HWC: uint8 RGB, after the model's resize and crop.
            seed: of the noise and of the direction of a rotation.
        """
        assert pixels_HWC.dtype == np.uint8 and pixels_HWC.shape[2:] == (3,), pixels_HWC.shape
        if self.severity == 0:
            return pixels_HWC.copy()
        random = np.random.default_rng(seed)
        return CORRUPTIONS[self.name](pixels_HWC, self.severity - 1, random)


def corruptions_of(names: Iterable[str], severities: Iterable[int]) -> list[Corruption]:
    """Every named corruption at every severity, names first.

    Raises:
        ConfigError: a name or a severity is not defined, or none is given.
    """
    levels = list(dict.fromkeys(severities))
    found = [Corruption(name, level) for name in dict.fromkeys(names) for level in levels]
    if not found:
        raise ConfigError(
            f"no corruption is chosen; name some of {', '.join(CORRUPTIONS)} and severities 1 to 5"
        )
    return found


def gaussian_noise(pixels_HWC: Pixels, level: int, random: np.random.Generator) -> Pixels:
    """Adds noise of one spread to every value."""
    spread = (0.08, 0.12, 0.18, 0.26, 0.38)[level]
    return _whole(pixels_HWC / 255 + random.normal(0, spread, pixels_HWC.shape))


def shot_noise(pixels_HWC: Pixels, level: int, random: np.random.Generator) -> Pixels:
    """Draws every value anew as a count of photons."""
    photons = (60, 25, 12, 5, 3)[level]
    return _whole(random.poisson(pixels_HWC / 255 * photons) / photons)


def gaussian_blur(pixels_HWC: Pixels, level: int, _: np.random.Generator) -> Pixels:
    """Blurs with a Gaussian, cut at four sigmas; the edge is repeated."""
    from scipy.ndimage import gaussian_filter

    sigma = (1, 2, 3, 4, 6)[level] * _scale(pixels_HWC)
    image = pixels_HWC.astype(np.float32) / np.float32(255)
    return _whole(gaussian_filter(image, sigma, mode="nearest", truncate=4.0, axes=(0, 1)))


def defocus_blur(pixels_HWC: Pixels, level: int, _: np.random.Generator) -> Pixels:
    """Spreads every point over a disk, as a lens out of focus does; the edge is mirrored."""
    from scipy.signal import oaconvolve

    radius, softness = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[level]
    kernel_KK = _resampled(_disk(radius, softness), _scale(pixels_HWC))
    half = len(kernel_KK) // 2
    padded = np.pad(pixels_HWC / 255, ((half, half), (half, half), (0, 0)), mode="reflect")
    blurred = oaconvolve(padded, kernel_KK[:, :, None], mode="valid", axes=(0, 1))
    # The transform is exact to 1e-15, which must not turn a whole number into the one below.
    return _whole(blurred + 1e-9)


def jpeg(pixels_HWC: Pixels, level: int, _: np.random.Generator) -> Pixels:
    """Compresses as JPEG and decodes again."""
    quality = (25, 18, 15, 10, 7)[level]
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "JPEG", quality=quality)
    return np.array(Image.open(buffer))


def contrast(pixels_HWC: Pixels, level: int, _: np.random.Generator) -> Pixels:
    """Draws every channel towards its mean."""
    share = (0.4, 0.3, 0.2, 0.1, 0.05)[level]
    image = pixels_HWC / 255
    mean_C = image.mean(axis=(0, 1), keepdims=True)
    return _whole((image - mean_C) * share + mean_C)


def brightness(pixels_HWC: Pixels, level: int, _: np.random.Generator) -> Pixels:
    """Raises the value of hue, saturation and value.

    With hue and saturation unchanged, all channels grow by the factor by which their maximum, the
    value, grows; black has no saturation and becomes grey.
    """
    added = (0.1, 0.2, 0.3, 0.4, 0.5)[level]
    image = pixels_HWC / 255
    value_HW1 = image.max(axis=2, keepdims=True)
    raised_HW1 = np.minimum(value_HW1 + added, 1)
    factor_HW1 = raised_HW1 / np.where(value_HW1 > 0, value_HW1, 1)
    # Products of floats fall just below the whole numbers that they stand for.
    return _whole(np.where(value_HW1 > 0, image * factor_HW1, raised_HW1) + 1e-9)


def rotation(pixels_HWC: Pixels, level: int, random: np.random.Generator) -> Pixels:
    """Turns the image about its centre, to a side by chance; not part of ImageNet-C."""
    degrees = (5, 10, 20, 30, 45)[level] * random.choice((-1, 1))
    height, width = pixels_HWC.shape[:2]
    # Half the diagonal is the farthest that a corner reaches.
    pad = int(np.ceil(np.hypot(height, width) / 2)) + 1
    padded = np.pad(pixels_HWC, ((pad, pad), (pad, pad), (0, 0)), mode="symmetric")
    turned = Image.fromarray(padded).rotate(float(degrees), Image.Resampling.BILINEAR)
    return np.array(turned)[pad : pad + height, pad : pad + width]


def pixelate(pixels_HWC: Pixels, level: int, _: np.random.Generator) -> Pixels:
    """Makes the image smaller and large again, by means over boxes."""
    share = (0.6, 0.5, 0.4, 0.3, 0.25)[level]
    image = Image.fromarray(pixels_HWC)
    small = (max(1, int(image.width * share)), max(1, int(image.height * share)))
    box = Image.Resampling.BOX
    return np.array(image.resize(small, box).resize(image.size, box))


#: Name -> what it does to pixels at a level (severity - 1).
CORRUPTIONS: dict[str, Callable[[Pixels, int, np.random.Generator], Pixels]] = {
    "gaussian_noise": gaussian_noise,
    "shot_noise": shot_noise,
    "gaussian_blur": gaussian_blur,
    "defocus_blur": defocus_blur,
    "jpeg": jpeg,
    "contrast": contrast,
    "brightness": brightness,
    "rotation": rotation,
    "pixelate": pixelate,
}


def _whole(image_HWC: npt.NDArray[np.floating[Any]]) -> Pixels:
    """Values of 0 to 1 as uint8, truncated as ImageNet-C's are."""
    pixels_HWC: Pixels = (np.clip(image_HWC, 0, 1) * 255).astype(np.uint8)
    return pixels_HWC


def _scale(pixels_HWC: Pixels) -> float:
    """Factor of lengths: 1 at 224 pixels."""
    height, width, _ = pixels_HWC.shape
    return min(int(height), int(width)) / REFERENCE_SIDE


def _disk(radius: int, softness: float) -> Doubles:
    """A disk, softened by a Gaussian of 3 x 3 pixels, or 5 x 5 above a radius of 8.

    The Gaussian mirrors at the edge of the grid, as in the original. Disks that reach the edge
    (radius 8 and 10) therefore have a sum of about 1.01, and brighten the image as much.
    """
    from scipy.ndimage import correlate1d

    half = max(radius, 8)
    offset_K = np.arange(-half, half + 1)
    disk_KK: Doubles = (offset_K[:, None] ** 2 + offset_K**2 <= radius**2).astype(np.float64)
    disk_KK /= disk_KK.sum()
    reach = np.arange(-1, 2) if radius <= 8 else np.arange(-2, 3)
    weights = np.exp(-(reach**2) / (2 * softness**2))
    weights /= weights.sum()
    for axis in (0, 1):
        disk_KK = correlate1d(disk_KK, weights, axis=axis, mode="mirror")
    return disk_KK


def _resampled(kernel_KK: Doubles, scale: float) -> Doubles:
    """A kernel on pixels 1 / ``scale`` times as wide: its weight in each of them."""
    if scale == 1:
        return kernel_KK
    edges = (np.arange(len(kernel_KK) + 1) - len(kernel_KK) / 2) * scale
    half = int(np.ceil(edges[-1] - 0.5))
    wide = np.arange(-half, half + 1)
    overlap = np.minimum(edges[1:], wide[:, None] + 0.5) - np.maximum(
        edges[:-1], wide[:, None] - 0.5
    )
    share = np.clip(overlap, 0, None) / scale
    resampled: Doubles = share @ kernel_KK @ share.T
    return resampled
