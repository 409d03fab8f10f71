"""Augmentation of whole uint8 batches, on the device that trains.

Every random number comes from a generator seeded by (seed, step, rank), so that a resumed run
repeats exactly what the uninterrupted one would have done.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch.nn import functional as F  # noqa: N812

from clipsys.config import Settings
from clipsys.images.preprocessing import Preprocessing

#: What is drawn together: crop and flip; the turn; jitter and grey; blur; the grey rectangle.
Family = Literal["geometry", "rotation", "colour", "blur", "erasing"]


class AugmentationConfig(Settings):
    """What is done to training images; the defaults are open_clip's (a crop of 0.9 to 1)."""

    crop_scale: tuple[float, float] = Field((0.9, 1.0), description="share of the area kept")
    crop_ratio: tuple[float, float] = Field((0.75, 4 / 3), description="aspect ratio of the crop")
    flip: float = Field(0.0, ge=0, le=1, description="probability; captions may say left or right")
    rotation_degrees: float = Field(0.0, ge=0, le=180, description="largest turn either way")
    brightness: float = Field(0.0, ge=0, description="largest relative change")
    contrast: float = Field(0.0, ge=0, description="largest relative change")
    saturation: float = Field(0.0, ge=0, description="largest relative change")
    hue: float = Field(
        0.0, ge=0, le=0.5, description="largest turn about the grey axis; 0.5 is half a turn"
    )
    colour_jitter_share: float = Field(0.8, ge=0, le=1, description="images whose colours change")
    greyscale: float = Field(0.0, ge=0, le=1, description="probability")
    blur: float = Field(0.0, ge=0, le=1, description="probability of a Gaussian blur")
    blur_sigma: tuple[float, float] = Field(
        (0.1, 2.0), description="its standard deviation, in pixels of the model's input"
    )
    erasing: float = Field(0.0, ge=0, le=1, description="probability of a grey rectangle")

    @field_validator("crop_scale", "crop_ratio", "blur_sigma")
    @classmethod
    def _is_range(cls, value: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError("expected two numbers above 0, the smaller one first")
        if info.field_name == "crop_scale" and value[1] > 1:
            raise ValueError("expected shares of the area, at most 1")
        return value


def normalisation(
    preprocessing: Preprocessing, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation as (3, 1, 1) tensors."""
    mean = torch.tensor(preprocessing.mean, device=device).view(3, 1, 1)
    return mean, torch.tensor(preprocessing.std, device=device).view(3, 1, 1)


def to_input(
    pixels_BCHW: torch.Tensor, size: tuple[int, int], mean: torch.Tensor, std: torch.Tensor
) -> torch.Tensor:
    """Without augmentation: uint8 to float32, resized if needed, normalised."""
    image = pixels_BCHW.float() / 255
    if tuple(image.shape[-2:]) != size:
        image = _resized(image, size)
    return (image - mean) / std


def _resized(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(image, size=size, mode="bilinear", antialias=True, align_corners=False)


class Shared(NamedTuple):
    """What a view has in common with another one.

    Attributes:
        generator: as the other view's was before it was drawn.
        families: what is drawn from it.
    """

    generator: torch.Generator
    families: frozenset[Family]


def augment(
    pixels_BCHW: torch.Tensor,
    config: AugmentationConfig,
    size: tuple[int, int],
    mean: torch.Tensor,
    std: torch.Tensor,
    generator: torch.Generator | Sequence[torch.Generator],
    shared: Shared | None = None,
    drawn_for: tuple[int, int] | None = None,
) -> torch.Tensor:
    """A random view of each image, normalised.

    Args:
        pixels_BCHW: uint8 (B, 3, H0, W0).
        config: what to do.
        size: (H, W) of the result.
        mean: (3, 1, 1), of pixels in [0, 1].
        std: (3, 1, 1).
        generator: on the CPU, so that CPU and GPU runs draw the same numbers; or one for each
            image, which is then drawn as if it were alone.
        shared: what is drawn as for another view of the same ``config``.
        drawn_for: (H, W) of a view that this one shows in another size, of equal draws; None: it
            is no other's.

    Returns:
        float32 (B, 3, H, W).
    """
    draw = _Draws(len(pixels_BCHW), generator, pixels_BCHW.device, shared)
    image = pixels_BCHW.float() / 255
    image = _resample(
        image, config, size, draw.of("geometry"), draw.of("rotation"), drawn_for or size
    )
    image = _jitter(image, config, draw.of("colour"))
    image = _blur(image, config, draw.of("blur"))
    image = (image - mean) / std
    return _erase(image, config, draw.of("erasing"))


class _Draws:
    """Per-image random numbers, as columns that broadcast against (B, 3, H, W)."""

    def __init__(
        self,
        count: int,
        generator: torch.Generator | Sequence[torch.Generator],
        device: torch.device,
        shared: Shared | None = None,
        family: Family | None = None,
    ) -> None:
        self.count, self.generator, self.device = count, generator, device
        self.shared, self.family = shared, family

    def of(self, family: Family) -> _Draws:
        """The numbers of a family, from the same generators."""
        return _Draws(self.count, self.generator, self.device, self.shared, family)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        if isinstance(self.generator, torch.Generator):
            values = torch.rand(self.count, generator=self.generator)
        else:
            values = torch.cat([torch.rand(1, generator=one) for one in self.generator])
        if self.shared is not None:
            # Both advance together, so that each number is the other view's own counterpart.
            others = torch.rand(self.count, generator=self.shared.generator)
            values = others if self.family in self.shared.families else values
        return low + (high - low) * values.to(self.device)

    def happens(self, probability: float) -> torch.Tensor:
        return (self.uniform() < probability).view(-1, 1, 1, 1)

    def factor(self, strength: float) -> torch.Tensor:
        return self.uniform(max(0.0, 1 - strength), 1 + strength).view(-1, 1, 1, 1)


def _resample(
    image: torch.Tensor,
    config: AugmentationConfig,
    size: tuple[int, int],
    draw: _Draws,
    turn: _Draws,
    drawn_for: tuple[int, int],
) -> torch.Tensor:
    """Crop, flip, rotation and resize in one bilinear pass over a sampling grid."""
    height, width = image.shape[-2:]
    whole = config.crop_scale == (1.0, 1.0) and config.crop_ratio == (1.0, 1.0)
    untouched = whole and not config.flip and not config.rotation_degrees
    if untouched and drawn_for == (height, width):  # nothing is drawn
        return image if size == drawn_for else _resized(image, size)
    area = draw.uniform(*config.crop_scale)
    ratio = torch.exp(draw.uniform(*(math.log(bound) for bound in config.crop_ratio)))
    # The ratio is of pixels, the grid is of [-1, 1]: undo the image's own aspect ratio.
    relative = ratio * height / width
    scale_x = (area * relative).sqrt().clamp(max=1.0)
    scale_y = (area / relative).sqrt().clamp(max=1.0)
    shift_x = (1 - scale_x) * draw.uniform(-1, 1)
    shift_y = (1 - scale_y) * draw.uniform(-1, 1)
    mirrored = torch.where(draw.uniform() < config.flip, -1.0, 1.0)
    angle = turn.uniform(-1, 1) * math.radians(config.rotation_degrees)
    cos, sin = torch.cos(angle), torch.sin(angle)
    theta = torch.stack(
        [
            torch.stack([scale_x * cos * mirrored, -scale_y * sin, shift_x], dim=1),
            torch.stack([scale_x * sin * mirrored, scale_y * cos, shift_y], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(theta, [len(image), 3, *size], align_corners=False)
    # Repeating the border keeps white backgrounds white where a rotation looks past the edge.
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _jitter(image: torch.Tensor, config: AugmentationConfig, draw: _Draws) -> torch.Tensor:
    if config.brightness or config.contrast or config.saturation or config.hue:
        changed = image * draw.factor(config.brightness)
        middle = _grey(changed).mean(dim=(1, 2, 3), keepdim=True)
        changed = middle + (changed - middle) * draw.factor(config.contrast)
        grey = _grey(changed)
        changed = grey + (changed - grey) * draw.factor(config.saturation)
        if config.hue:
            changed = _turn_hue(changed, 2 * math.pi * draw.uniform(-config.hue, config.hue))
        changed = changed.clamp(0, 1)
        image = torch.where(draw.happens(config.colour_jitter_share), changed, image)
    if config.greyscale:
        image = torch.where(draw.happens(config.greyscale), _grey(image), image)
    return image


def _turn_hue(image: torch.Tensor, angle_B: torch.Tensor) -> torch.Tensor:
    """Turns each image's colours about the grey axis by an angle (Rodrigues' formula).

    One product with a 3 x 3 matrix per image; unlike a turn in HSV it keeps the mean of the three
    channels rather than their largest.
    """
    cos, sin = torch.cos(angle_B).view(-1, 1, 1), torch.sin(angle_B).view(-1, 1, 1)
    eye = torch.eye(3, device=image.device)
    cross = image.new_tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    turn_B33 = cos * eye + sin * cross + (1 - cos) / 3
    return torch.einsum("bij,bjhw->bihw", turn_B33, image)


def _blur(image: torch.Tensor, config: AugmentationConfig, draw: _Draws) -> torch.Tensor:
    """Gaussian blur, each image with its own width, borders mirrored: two depthwise passes."""
    if not config.blur:
        return image
    count, channels, height, width = image.shape
    radius = min(math.ceil(3 * config.blur_sigma[1]), height - 1, width - 1)
    sigma_B1 = draw.uniform(*config.blur_sigma).view(-1, 1)
    offset = torch.arange(-radius, radius + 1, device=image.device)
    kernel_BK = torch.exp(-0.5 * (offset / sigma_B1) ** 2)
    kernel_BK = kernel_BK / kernel_BK.sum(dim=1, keepdim=True)
    weight = kernel_BK.repeat_interleave(channels, dim=0)[:, None, None]  # (B·3, 1, 1, K)
    planes = F.pad(image.reshape(1, -1, height, width), (radius,) * 4, mode="reflect")
    planes = F.conv2d(planes, weight, groups=count * channels)
    planes = F.conv2d(planes, weight.transpose(2, 3), groups=count * channels)
    return torch.where(draw.happens(config.blur), planes.view_as(image), image)


def _grey(image: torch.Tensor) -> torch.Tensor:
    weights = image.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)  # ITU-R 601
    return (image * weights).sum(dim=1, keepdim=True)


def _erase(image: torch.Tensor, config: AugmentationConfig, draw: _Draws) -> torch.Tensor:
    """Random erasing (Zhong et al. 2017) with the mean colour: 2 to 20 % of the area."""
    if not config.erasing:
        return image
    height, width = image.shape[-2:]
    area, ratio = draw.uniform(0.02, 0.2), torch.exp(draw.uniform(-1.0, 1.0))
    half_h = ((area / ratio).sqrt() / 2).view(-1, 1, 1, 1)
    half_w = ((area * ratio).sqrt() / 2).view(-1, 1, 1, 1)
    centre_y, centre_x = (draw.uniform().view(-1, 1, 1, 1) for _ in range(2))
    y = torch.linspace(0, 1, height, device=image.device).view(1, 1, -1, 1)
    x = torch.linspace(0, 1, width, device=image.device).view(1, 1, 1, -1)
    inside = ((y - centre_y).abs() < half_h) & ((x - centre_x).abs() < half_w)
    return image.masked_fill(inside & draw.happens(config.erasing), 0.0)
