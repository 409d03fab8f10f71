"""Barlow Twins and VICReg against naive forms, against lightly, and on several ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lightly.loss import BarlowTwinsLoss, VICRegLoss
from torch import nn

from clipsys.errors import ConfigError
from clipsys.training.distributed.collectives import sum_over_ranks
from clipsys.training.losses import barlow_twins, vicreg
from clipsys.training.model.batch_norm import GlobalBatchNorm
from tests.ranks import run_ranks


def naive_barlow_twins(first: torch.Tensor, second: torch.Tensor, off_diagonal: float) -> Any:
    """One pair of features after the other."""
    loss = first.new_zeros(())
    for i in range(first.shape[1]):
        for j in range(first.shape[1]):
            one, other = first[:, i] - first[:, i].mean(), second[:, j] - second[:, j].mean()
            norms = ((one**2).mean() + 1e-5).sqrt() * ((other**2).mean() + 1e-5).sqrt()
            correlation = (one * other).mean() / norms
            loss = loss + ((1 - correlation) ** 2 if i == j else off_diagonal * correlation**2)
    return loss


def naive_vicreg(first: torch.Tensor, second: torch.Tensor, *weights: float) -> Any:
    """Each term as the paper writes it."""
    invariance, variance, covariance = weights
    loss = invariance * ((first - second) ** 2).sum(dim=1).mean() / first.shape[1]
    for view in (first, second):
        for i in range(view.shape[1]):
            deviation = (view[:, i].var() + 1e-4).sqrt()
            loss = loss + variance / 2 * torch.relu(1 - deviation) / view.shape[1]
        matrix = torch.cov(view.T).reshape(view.shape[1], -1)
        for i, j in np.ndindex(*matrix.shape):
            if i != j:
                loss = loss + covariance * matrix[i, j] ** 2 / view.shape[1]
    return loss


def _views(rows: int = 12, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(width)
    first = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return first, 0.6 * first + 0.5 * torch.randn(rows, width, generator=generator).double()


def _with_gradients(loss: Any, *tensors: torch.Tensor) -> tuple[Any, list[Any]]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    value = loss(*leaves)
    value.backward()
    return value.detach(), [leaf.grad for leaf in leaves]


_LOSSES: dict[str, tuple[Any, Any, Any]] = {
    "barlow_twins": (
        lambda a, b: barlow_twins(a, b, 0.005),
        lambda a, b: naive_barlow_twins(a, b, 0.005),
        BarlowTwinsLoss(0.005),
    ),
    "vicreg": (vicreg, lambda a, b: naive_vicreg(a, b, 25, 25, 1), VICRegLoss()),
}


@pytest.mark.parametrize("name", _LOSSES)
@pytest.mark.parametrize("width", [1, 5])
def test_loss_and_gradients_are_those_of_the_naive_form_and_of_lightly(
    name: str, width: int
) -> None:
    ours, naive, theirs = _LOSSES[name]
    actual = _with_gradients(ours, *_views(width=width))
    expected = _with_gradients(naive, *_views(width=width))
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)
    of_lightly = _with_gradients(theirs, *_views(width=width))
    torch.testing.assert_close(actual, of_lightly, rtol=1e-9, atol=1e-11)


_CASES = {
    "all features equal": torch.ones(8, 5),
    "zeros": torch.zeros(8, 5),
    "unnormalised": 1e4 * torch.randn(8, 5),
    "two rows": torch.randn(2, 5),
}


@pytest.mark.parametrize("case", _CASES)
@pytest.mark.parametrize("name", _LOSSES)
def test_hard_inputs_stay_finite(name: str, case: str) -> None:
    view = _CASES[case]
    value, gradients = _with_gradients(_LOSSES[name][0], view, view.flip(0))
    assert bool(torch.isfinite(value))
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)


def _on_rank(rank: int, world_size: int) -> list[Any]:
    found = []
    for ours, _, _ in _LOSSES.values():
        rows = slice(rank * 12 // world_size, (rank + 1) * 12 // world_size)
        value, gradients = _with_gradients(ours, *(view[rows] for view in _views()))
        found.append((float(value), [gradient.numpy() for gradient in gradients]))
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_give_the_loss_and_the_gradient_of_one(world_size: int) -> None:
    """Lightly 1977 and 1980: an all-reduce outside of the graph gives 1/W of the gradient."""
    alone, shares = _on_rank(0, 1), run_ranks(_on_rank, world_size)
    for number, (value, gradients) in enumerate(alone):
        parts = [share[number] for share in shares]
        np.testing.assert_allclose(np.mean([part[0] for part in parts]), value, rtol=1e-12)
        for which, expected in enumerate(gradients):
            # Averaged over ranks by DDP.
            actual = np.concatenate([part[1][which] for part in parts]) / world_size
            np.testing.assert_allclose(actual, expected, atol=1e-12)


def _normalised(rank: int, world_size: int) -> Any:
    norm = GlobalBatchNorm(5).double()
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1.0, 6))
    rows = slice(rank * 12 // world_size, (rank + 1) * 12 // world_size)
    view, factor = _views()
    view = view[rows].requires_grad_()
    # A sum over all rows, of which this rank has its share.
    loss = world_size * (norm(view) * factor[rows]).sum() + 0 * sum_over_ranks(view.sum())
    loss.backward()
    assert view.grad is not None and norm.weight.grad is not None
    norm.eval()
    return (
        view.grad.numpy() / world_size,
        norm.weight.grad.numpy(),
        norm.running_mean.numpy(),  # type: ignore[union-attr]
        norm.running_var.numpy(),  # type: ignore[union-attr]
        norm(view).detach().numpy(),
    )


def test_batch_norm_over_ranks_is_that_of_one_process() -> None:
    plain = nn.BatchNorm1d(5).double()
    with torch.no_grad():
        plain.weight.copy_(torch.arange(1.0, 6))
    view, factor = _views()
    view.requires_grad_()
    (plain(view) * factor).sum().backward()
    assert view.grad is not None and plain.weight.grad is not None
    expected = [view.grad, plain.weight.grad, plain.running_mean, plain.running_var]
    expected.append(plain.eval()(view).detach())
    for world_size in (1, 3):
        shares = [_normalised(0, 1)] if world_size == 1 else run_ranks(_normalised, world_size)
        joined = [np.concatenate([one[0] for one in shares]), np.mean([s[1] for s in shares], 0)]
        joined += [shares[-1][2], shares[-1][3], np.concatenate([one[4] for one in shares])]
        for actual, wanted in zip(joined, expected, strict=True):
            assert wanted is not None
            np.testing.assert_allclose(actual, wanted.numpy(), rtol=1e-9, atol=1e-11)


def test_shapes_that_do_not_fit_and_single_rows_are_named() -> None:
    first, second = _views()
    with pytest.raises(ConfigError, match=r"barlow_twins: views \(12, 5\) and \(3, 5\)"):
        barlow_twins(first, second[:3])
    with pytest.raises(ConfigError, match="vicreg: one row has no statistics"):
        vicreg(first[:1], second[:1])
