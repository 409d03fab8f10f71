from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image

from clipsys.training.data import augmentation
from clipsys.training.data.augmentation import (
    AugmentationConfig,
    Family,
    Shared,
    augment,
    to_input,
)
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


def _drawn(seed: int, count: int, index: int) -> list[float]:
    """What the ``index``-th of the per-image draws gave, for each image."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(index):
        torch.rand(count, generator=generator)
    return [float(value) for value in torch.rand(count, generator=generator)]


def _naive_grey(image: np.ndarray) -> np.ndarray:
    return 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]


def test_colours_change_as_a_loop_over_images_and_pixels_would_change_them() -> None:
    config = AugmentationConfig(
        **_NOTHING, brightness=0.4, contrast=0.5, saturation=0.6, hue=0.2, colour_jitter_share=0.7
    )
    pixels = _pixels(6, (9, 7))
    actual = _augment(config, pixels, 5).numpy()
    # _resample draws nothing here: brightness, contrast, saturation, hue, share.
    draws = [_drawn(5, 6, index) for index in range(5)]
    for number, image in enumerate(pixels.numpy()):
        expected = image.astype(np.float64) / 255
        if draws[4][number] < 0.7:
            brightness = 0.6 + 0.8 * draws[0][number]
            contrast = 0.5 + 1.0 * draws[1][number]
            saturation = 0.4 + 1.2 * draws[2][number]
            angle = 2 * np.pi * (-0.2 + 0.4 * draws[3][number])
            expected = expected * brightness
            middle = _naive_grey(expected).mean()
            expected = middle + (expected - middle) * contrast
            grey = _naive_grey(expected)
            expected = grey + (expected - grey) * saturation
            axis = np.ones(3) / np.sqrt(3)
            for y in range(9):
                for x in range(7):
                    colour = expected[:, y, x]
                    expected[:, y, x] = (
                        colour * np.cos(angle)
                        + np.cross(axis, colour) * np.sin(angle)
                        + axis * (axis @ colour) * (1 - np.cos(angle))
                    )
            expected = expected.clip(0, 1)
        np.testing.assert_allclose(actual[number], expected, atol=1e-5)


def test_a_third_of_a_turn_of_hue_moves_red_to_green_and_leaves_grey() -> None:
    from clipsys.training.data.augmentation import _turn_hue

    image = torch.tensor([[1.0, 0.0, 0.0], [0.4, 0.4, 0.4]]).view(2, 3, 1, 1)
    turned = _turn_hue(image, torch.full((2,), 2 * np.pi / 3)).flatten(1)
    torch.testing.assert_close(turned, torch.tensor([[0.0, 1.0, 0.0], [0.4, 0.4, 0.4]]))


def test_blur_equals_weighted_sums_over_neighbours() -> None:
    config = AugmentationConfig(**_NOTHING, blur=0.6, blur_sigma=(0.5, 1.5))
    pixels = _pixels(5, (12, 10))
    actual = _augment(config, pixels, 9).numpy()
    sigmas, chances = _drawn(9, 5, 0), _drawn(9, 5, 1)
    radius = 5  # three times the largest sigma
    for number, image in enumerate(pixels.numpy().astype(np.float64) / 255):
        sigma = 0.5 + sigmas[number]
        weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
        weights /= weights.sum()
        padded = np.pad(image, ((0, 0), (radius, radius), (radius, radius)), mode="reflect")
        expected = np.zeros_like(image)
        for dy, weight_y in enumerate(weights):
            for dx, weight_x in enumerate(weights):
                expected += weight_y * weight_x * padded[:, dy : dy + 12, dx : dx + 10]
        if chances[number] >= 0.6:
            expected = image
        np.testing.assert_allclose(actual[number], expected, atol=1e-5)


def test_crop_flip_and_rotation_equal_bilinear_lookups_one_by_one() -> None:
    config = AugmentationConfig(
        crop_scale=(0.3, 0.9), crop_ratio=(0.7, 1.5), flip=0.5, rotation_degrees=25
    )
    pixels = _pixels(6, (14, 18))
    size = (8, 8)
    actual = augment(pixels, config, size, _ZERO, _ONE, torch.Generator().manual_seed(2)).numpy()
    area, ratio, shift_x, shift_y, flip, angle = (_drawn(2, 6, index) for index in range(6))
    for number, image in enumerate(pixels.numpy().astype(np.float64) / 255):
        share = 0.3 + 0.6 * area[number]
        aspect = np.exp(np.log(0.7) + (np.log(1.5) - np.log(0.7)) * ratio[number])
        width = min(18.0, np.sqrt(share * 14 * 18 * aspect))
        height = min(14.0, np.sqrt(share * 14 * 18 / aspect))
        centre_x = 9 + (18 - width) / 2 * (2 * shift_x[number] - 1)
        centre_y = 7 + (14 - height) / 2 * (2 * shift_y[number] - 1)
        turn = np.radians(25) * (2 * angle[number] - 1)
        for row in range(8):
            for column in range(8):
                u, v = (column + 0.5) / 4 - 1, (row + 0.5) / 4 - 1
                u = -u if flip[number] < 0.5 else u
                # In the unit square of the crop first, as the grid does it.
                x = (width / 18 * np.cos(turn) * u - height / 14 * np.sin(turn) * v) * 9 + centre_x
                y = (width / 18 * np.sin(turn) * u + height / 14 * np.cos(turn) * v) * 7 + centre_y
                expected = _bilinear(image, x - 0.5, y - 0.5)
                np.testing.assert_allclose(actual[number, :, row, column], expected, atol=2e-4)


def _bilinear(image: np.ndarray, x: float, y: float) -> np.ndarray:
    height, width = image.shape[1:]
    x, y = min(max(x, 0), width - 1), min(max(y, 0), height - 1)
    left, top = min(int(x), width - 2), min(int(y), height - 2)
    right, down = x - left, y - top
    corners = image[:, top : top + 2, left : left + 2]
    rows = corners[:, 0] * (1 - down) + corners[:, 1] * down
    return np.asarray(rows[:, 0] * (1 - right) + rows[:, 1] * right)


def test_erasing_equals_a_rectangle_drawn_by_hand() -> None:
    config = AugmentationConfig(**_NOTHING, erasing=0.5)
    pixels = torch.full((8, 3, 20, 30), 255, dtype=torch.uint8)
    actual = _augment(config, pixels, 4).numpy()
    area, ratio, centre_y, centre_x, chance = (_drawn(4, 8, index) for index in range(5))
    for number in range(8):
        share, aspect = 0.02 + 0.18 * area[number], np.exp(2 * ratio[number] - 1)
        for row in range(20):
            for column in range(30):
                inside = (
                    abs(row / 19 - centre_y[number]) < np.sqrt(share / aspect) / 2
                    and abs(column / 29 - centre_x[number]) < np.sqrt(share * aspect) / 2
                )
                expected = 0.0 if inside and chance[number] < 0.5 else 1.0
                assert (actual[number, :, row, column] == expected).all()


_EVERYTHING = AugmentationConfig(
    crop_scale=(0.3, 1), flip=0.5, rotation_degrees=20, brightness=0.3, contrast=0.3,
    saturation=0.3, hue=0.1, greyscale=0.3, blur=0.5, erasing=0.5,
)  # fmt: skip


@pytest.mark.parametrize("family", get_args(Family))
def test_views_share_the_draws_of_a_family_and_no_others(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str | None, torch.Tensor]] = []

    class _Noted(augmentation._Draws):
        def uniform(self, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
            values = super().uniform(low, high)
            drawn.append((self.family, values))
            return values

    monkeypatch.setattr(augmentation, "_Draws", _Noted)
    pixels = _pixels()
    _augment(_EVERYTHING, pixels, 1)
    first, drawn = drawn, []
    shared = Shared(torch.Generator().manual_seed(1), frozenset({family}))
    generator = torch.Generator().manual_seed(2)
    augment(pixels, _EVERYTHING, (32, 32), _ZERO, _ONE, generator, shared)
    assert {one for one, _ in first} == set(get_args(Family))
    for (name, values), (other_name, others) in zip(first, drawn, strict=True):
        assert name == other_name
        assert torch.equal(values, others) == (name == family)


def test_a_view_that_shares_everything_is_the_same_view() -> None:
    pixels, generator = _pixels(), torch.Generator().manual_seed(2)
    shared = Shared(torch.Generator().manual_seed(1), frozenset(get_args(Family)))
    view = augment(pixels, _EVERYTHING, (32, 32), _ZERO, _ONE, generator, shared)
    assert torch.equal(view, _augment(_EVERYTHING, pixels, 1))


_ONLY: dict[str, dict[str, Any]] = {
    "geometry": {"crop_scale": (0.3, 0.9)},
    "rotation": {"rotation_degrees": 30},
    "colour": {"brightness": 0.5, "hue": 0.3, "colour_jitter_share": 1.0},
    "blur": {"blur": 1.0},
    "erasing": {"erasing": 1.0},
}


@pytest.mark.parametrize("family", get_args(Family))
def test_what_only_one_family_changes_is_the_same_for_views_that_share_it(family: Family) -> None:
    config = AugmentationConfig(**{**_NOTHING, **_ONLY[family]})
    pixels = _pixels()
    query = _augment(config, pixels, 1)
    for shares in get_args(Family):
        shared = Shared(torch.Generator().manual_seed(1), frozenset({shares}))
        generator = torch.Generator().manual_seed(2)
        key = augment(pixels, config, (32, 32), _ZERO, _ONE, generator, shared)
        is_same = [torch.equal(*pair) for pair in zip(query, key, strict=True)]
        assert is_same == [shares == family] * len(pixels)


_CHANGES: dict[str, Any] = {
    "crop_scale": (0.3, 0.8), "flip": 0.5, "rotation_degrees": 20.0, "brightness": 0.4,
    "contrast": 0.4, "colour_jitter_share": 0.8, "greyscale": 0.3, "erasing": 0.5,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes", [_CHANGES, {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0,
                              "brightness": 0.5, "erasing": 0.5}]
)  # fmt: skip
def test_a_view_is_drawn_the_same_in_another_size(changes: dict[str, Any]) -> None:
    """Also where the first view has the images' own size, so that no crop is drawn for it."""
    pixels = torch.full((6, 3, 16, 16), 200, dtype=torch.uint8)
    pixels[:, :, :, 8:] = 60  # halves, so that crops, turns and flips can be told apart
    config = AugmentationConfig(**changes)
    mean, std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)

    def view(size: tuple[int, int]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(4)
        return augment(pixels, config, size, mean, std, generator, drawn_for=(16, 16))

    plain = augment(pixels, config, (16, 16), mean, std, torch.Generator().manual_seed(4))
    assert torch.equal(view((16, 16)), plain)
    larger = torch.nn.functional.interpolate(view((64, 64)), (16, 16), mode="area")
    assert float((larger - plain).abs().mean()) < 0.02
    other = augment(pixels, config, (16, 16), mean, std, torch.Generator().manual_seed(5))
    assert float((other - plain).abs().mean()) > 0.05
