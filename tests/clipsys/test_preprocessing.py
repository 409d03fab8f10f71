from __future__ import annotations

import numpy as np
import pytest
import torch

from clipsys.errors import ModelError
from clipsys.preprocessing import Preprocessing
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
