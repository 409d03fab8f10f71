from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from clipsys.training.augmentation import AugmentationConfig, augment, to_input
from tests.conftest import noise_image

_ZERO, _ONE = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
_NOTHING = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}


def _pixels(count: int = 4, size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    images = [np.asarray(noise_image(seed, size)) for seed in range(count)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def _augment(config: AugmentationConfig, pixels: torch.Tensor, seed: int = 0) -> torch.Tensor:
    size = (pixels.shape[2], pixels.shape[3])
    return augment(pixels, config, size, _ZERO, _ONE, torch.Generator().manual_seed(seed))


def test_without_any_change_the_pixels_stay() -> None:
    pixels = _pixels()
    actual = _augment(AugmentationConfig(**_NOTHING), pixels)
    torch.testing.assert_close(actual, pixels.float() / 255, atol=1e-5, rtol=0)


def test_the_same_seed_gives_the_same_views_and_another_others() -> None:
    config = AugmentationConfig(
        crop_scale=(0.4, 1), flip=0.5, rotation_degrees=20, brightness=0.3, contrast=0.3,
        saturation=0.3, greyscale=0.3, erasing=0.5,
    )  # fmt: skip
    pixels = _pixels()
    assert torch.equal(_augment(config, pixels, 1), _augment(config, pixels, 1))
    assert not torch.equal(_augment(config, pixels, 1), _augment(config, pixels, 2))


def test_a_certain_flip_mirrors() -> None:
    pixels = _pixels()
    actual = _augment(AugmentationConfig(**_NOTHING, flip=1.0), pixels)
    torch.testing.assert_close(actual, pixels.flip(3).float() / 255, atol=1e-5, rtol=0)


@pytest.mark.parametrize("degrees", [90.0])
def test_rotation_turns_by_at_most_what_is_asked(degrees: float) -> None:
    # A white centre row in black: after a turn by a, its ends stand at angle a.
    pixels = torch.zeros(64, 3, 33, 33, dtype=torch.uint8)
    pixels[:, :, 16, 16:] = 255
    turned = _augment(AugmentationConfig(**_NOTHING, rotation_degrees=degrees), pixels)[:, 0]
    right_half = turned[:, :, 14:].amax(dim=(1, 2))
    assert bool((right_half > 0.3).all())  # never pointing to the left
    assert turned.var(dim=0).max() > 0.01


def test_crops_keep_the_asked_share_of_the_area() -> None:
    # Pixel values are coordinates, so the span of a view says what was kept.
    ramp = torch.linspace(0, 255, 64).to(torch.uint8)
    pixels = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), ramp.expand(64, 64)])
    config = AugmentationConfig(crop_scale=(0.25, 0.5), crop_ratio=(1.0, 1.0))
    views = _augment(config, pixels.expand(100, 3, 64, 64).contiguous())
    spans = views.amax(dim=(2, 3)) - views.amin(dim=(2, 3))
    area = spans[:, 0] * spans[:, 1]
    assert bool(((area > 0.2) & (area < 0.55)).all())


def test_greyscale_has_equal_channels() -> None:
    grey = _augment(AugmentationConfig(**_NOTHING, greyscale=1.0), _pixels())
    torch.testing.assert_close(grey[:, 0], grey[:, 2])


def test_erasing_fills_two_to_twenty_percent_with_the_mean() -> None:
    pixels = torch.full((200, 3, 64, 64), 255, dtype=torch.uint8)
    erased = _augment(AugmentationConfig(**_NOTHING, erasing=1.0), pixels)
    share = (erased[:, 0] == 0).float().mean(dim=(1, 2))
    assert float(share.max()) < 0.25  # less where the rectangle reaches past the edge
    assert float(share.mean()) > 0.04


def test_colours_stay_in_range() -> None:
    config = AugmentationConfig(**_NOTHING, brightness=1, contrast=1, saturation=1)
    views = _augment(config, _pixels(32))
    assert float(views.min()) >= 0 and float(views.max()) <= 1


def test_evaluation_input_is_normalised_and_resized_like_pillow() -> None:
    pixels = _pixels(1, (64, 64))
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.full((3, 1, 1), 0.5)
    small = to_input(pixels, (32, 32), mean, std) * std + mean
    image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).resize(
        (32, 32), Image.Resampling.BILINEAR
    )
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    torch.testing.assert_close(small[0], expected, atol=2 / 255, rtol=0)
