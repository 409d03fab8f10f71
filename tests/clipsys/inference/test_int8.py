from __future__ import annotations

import pytest
import torch

from clipsys.inference import int8
from clipsys.inference.int8 import Int8Linear

pytestmark = pytest.mark.skipif(not int8.is_fast(), reason="this processor has no VNNI")


def _numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _naive(inputs_NI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor) -> torch.Tensor:
    """Both sides rounded to 255 steps a row, multiplied exactly."""

    def rounded(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        step = (rows.abs().amax(1, keepdim=True) / 127).clamp_min(1e-12)
        return (rows * step.reciprocal()).round().double(), step.double()

    inputs, input_step = rounded(inputs_NI)
    weight, weight_step = rounded(weight_OI)
    return (inputs @ weight.T) * input_step * weight_step.T + bias_O


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 32, 16), (7, 64, 48), (33, 100, 20), (130, 768, 256)]
)
def test_product_is_that_of_the_rounded_numbers(rows: int, inputs: int, outputs: int) -> None:
    inputs_NI, weight_OI = _numbers(rows, inputs, seed=1) * 3, _numbers(outputs, inputs, seed=2)
    bias_O = _numbers(outputs, seed=3)
    actual = Int8Linear(weight_OI, bias_O)(inputs_NI)
    assert actual.dtype == torch.float32
    # A number that falls between two steps may go to either one: rounding before division.
    expected = _naive(inputs_NI, weight_OI, bias_O).float()
    torch.testing.assert_close(actual, expected, atol=1e-4 * inputs, rtol=1e-5)
    exact = inputs_NI @ weight_OI.T + bias_O
    assert torch.nn.functional.cosine_similarity(actual, exact).min() > 0.999


def test_leading_dimensions_stay_and_a_missing_bias_is_zero() -> None:
    inputs, weight_OI = _numbers(2, 5, 64), _numbers(48, 64)
    product = Int8Linear(weight_OI, None)
    assert product(inputs).shape == (2, 5, 48)
    torch.testing.assert_close(product(inputs)[1, 3], product(inputs[1, 3:4])[0], atol=0, rtol=0)


def test_a_row_does_not_depend_on_the_others() -> None:
    product = Int8Linear(_numbers(64, 128), _numbers(64))
    rows = _numbers(50, 128)
    huge = rows.clone()
    huge[0] *= 1e4
    torch.testing.assert_close(product(rows)[1:], product(huge)[1:], atol=0, rtol=0)
    torch.testing.assert_close(product(rows)[1:], product(rows[1:]), atol=0, rtol=0)


def test_zeros_give_the_bias_and_nan_gives_nan() -> None:
    bias_O = _numbers(32)
    product = Int8Linear(_numbers(32, 64), bias_O)
    torch.testing.assert_close(product(torch.zeros(3, 64)), bias_O.expand(3, -1), atol=0, rtol=0)
    assert product(torch.full((2, 64), torch.nan)).isnan().all()
