from __future__ import annotations

import logging

import pytest
import torch

from clipsys.inference.checking import MIN_AGREEMENT, CheckedEncoder
from clipsys.inference.threads import EncodeImage


def _numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _twice(image_BCHW: torch.Tensor) -> torch.Tensor:
    return image_BCHW.flatten(1) * 2


def _turned(image_BCHW: torch.Tensor, cosine: float) -> torch.Tensor:
    """Features at this cosine from those of `_twice`, each of another length."""
    exact = _twice(image_BCHW)
    other = torch.randn(exact.shape, generator=torch.Generator().manual_seed(9))
    other -= exact * (other * exact).sum(1, keepdim=True) / (exact * exact).sum(1, keepdim=True)
    unit = torch.nn.functional.normalize
    return 3 * (cosine * unit(exact) + (1 - cosine**2) ** 0.5 * unit(other))


def _checked(**cosines: float | None) -> tuple[CheckedEncoder, list[str]]:
    """Approximations at these cosines; None: the tower has no such form. And what was chosen."""
    chosen: list[str] = []

    def make(cosine: float | None) -> EncodeImage | None:
        return None if cosine is None else lambda images: _turned(images, cosine)

    forms = {name: lambda cosine=cosine: make(cosine) for name, cosine in cosines.items()}
    return CheckedEncoder(_twice, forms, chosen.append), chosen


@pytest.mark.parametrize("name", ["int8", "bf16"])
def test_an_approximation_stays_where_the_first_images_agree(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    encode, chosen = _checked(**{name: 0.995})
    images = _numbers(40, 3, 4, 4)
    with caplog.at_level(logging.INFO):
        torch.testing.assert_close(encode(images), _turned(images, 0.995))
    assert f"{name} (the first 16 images agree with fp32 to a cosine of 0.9950)" in caplog.text
    torch.testing.assert_close(encode(images[:1]), _turned(images[:1], 0.995))
    assert chosen == [name]


@pytest.mark.parametrize("cosine", [MIN_AGREEMENT - 0.001, -1.0, float("nan")])
def test_it_is_given_up_where_they_do_not(cosine: float, caplog: pytest.LogCaptureFixture) -> None:
    encode, chosen = _checked(int8=cosine)
    images = _numbers(10, 3, 4, 4)
    torch.testing.assert_close(encode(images), _twice(images), atol=0, rtol=0)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "not int8 (the first 10 images" in caplog.text
    torch.testing.assert_close(encode(images[:2]), _twice(images[:2]), atol=0, rtol=0)
    assert chosen == ["fp32"]


@pytest.mark.parametrize("refused", [0.5, None])
def test_the_next_one_takes_the_place_of_what_is_given_up(refused: float | None) -> None:
    encode, chosen = _checked(int8=refused, bf16=0.9999)
    images = _numbers(16, 3, 4, 4)
    torch.testing.assert_close(encode(images), _turned(images, 0.9999))
    assert chosen == ["bf16"]


def test_one_image_that_does_not_agree_is_enough() -> None:
    def wrong_for_one(images: torch.Tensor) -> torch.Tensor:
        features = _twice(images)
        features[3] *= -1
        return features

    images = _numbers(16, 3, 4, 4)
    encode = CheckedEncoder(_twice, {"bf16": lambda: wrong_for_one})
    torch.testing.assert_close(encode(images), _twice(images), atol=0, rtol=0)


def test_few_images_are_encoded_exactly_until_enough_have_come() -> None:
    made: list[bool] = []

    def make() -> EncodeImage:
        made.append(True)
        return lambda images: _turned(images, 0.999)

    encode = CheckedEncoder(_twice, {"int8": make})
    images = _numbers(10, 3, 4, 4)
    torch.testing.assert_close(encode(images[:5]), _twice(images[:5]), atol=0, rtol=0)
    torch.testing.assert_close(encode(images[5:7]), _twice(images[5:7]), atol=0, rtol=0)
    assert not made, "a single query waits for nothing"
    torch.testing.assert_close(encode(images[7:]), _turned(images[7:], 0.999), atol=0, rtol=0)
    assert made == [True]
