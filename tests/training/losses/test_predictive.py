"""Contrastive predictive coding's loss against a loop in float64, on hard inputs, on two ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from clipsys.errors import ConfigError
from clipsys.training.losses import cpc
from tests.ranks import run_ranks


def _naive(predicted: torch.Tensor, future: torch.Tensor) -> torch.Tensor:
    losses = []
    for step in range(predicted.shape[1]):
        for row in range(len(predicted)):
            scores = torch.stack([predicted[row, step] @ one[step] for one in future])
            losses.append(torch.logsumexp(scores, 0) - scores[row])
    return torch.stack(losses).mean()


def _case(rows: int = 6, steps: int = 3) -> Any:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, rows, steps, 5, generator=generator, dtype=torch.float64).unbind()


def _with_gradients(loss: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    value = loss(*leaves)
    value.backward()
    return value.detach(), [leaf.grad for leaf in leaves]  # type: ignore[misc]


@pytest.mark.parametrize(("rows", "steps"), [(1, 1), (2, 3), (9, 2)])
def test_the_loss_and_its_gradients_are_those_of_a_loop(rows: int, steps: int) -> None:
    value, gradients = _with_gradients(cpc, *_case(rows, steps))
    expected, wanted = _with_gradients(_naive, *_case(rows, steps))
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e3])
def test_equal_rows_of_any_length_stay_finite(scale: float) -> None:
    rows = scale * torch.ones(4, 2, 5)
    value, gradients = _with_gradients(cpc, rows, rows)
    torch.testing.assert_close(value, torch.tensor(4.0).log(), rtol=1e-3, atol=0.3 * (scale > 1))
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)


def _on_rank(rank: int, world_size: int) -> Any:
    predicted, future = _case(8)
    rows = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    value, gradients = _with_gradients(cpc, predicted[rows], future[rows])
    return value.numpy(), [gradient.numpy() for gradient in gradients]


def test_two_ranks_give_the_loss_and_the_gradients_of_one() -> None:
    value, gradients = _on_rank(0, 1)
    shares = run_ranks(_on_rank, 2)
    np.testing.assert_allclose(np.mean([share[0] for share in shares]), value, rtol=1e-12)
    for number, expected in enumerate(gradients):
        # Averaged over ranks by DDP, hence twice as large here.
        actual = np.concatenate([share[1][number] for share in shares]) / 2
        np.testing.assert_allclose(actual, expected, atol=1e-14)


def test_shapes_that_do_not_fit_are_named() -> None:
    predicted, future = _case()
    with pytest.raises(ConfigError, match=r"cpc: predictions \(6, 3, 5\) and futures \(6, 2, 5\)"):
        cpc(predicted, future[:, :2])
