"""Losses over images alone, against loops in float64, on one rank and on two."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from clipsys.errors import ConfigError
from clipsys.training.losses import enqueued, moco, nt_xent
from tests.ranks import run_ranks
from tests.training.objectives.test_two_views_exact import naive_moco, naive_nt_xent


def _views(rows: int = 6, width: int = 5, dtype: torch.dtype = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(1)
    pair = torch.randn(2, rows, width, generator=generator, dtype=dtype)
    return F.normalize(pair, dim=-1).unbind()


def _with_gradients(loss: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    value = loss(*leaves)
    value.backward()
    return value.detach(), [leaf.grad for leaf in leaves]  # type: ignore[misc]


@pytest.mark.parametrize("rows", [1, 2, 7, 50])
def test_nt_xent_and_its_gradients_are_those_of_a_loop(rows: int) -> None:
    temperature = torch.tensor(0.3, dtype=torch.float64)
    inputs = (*_views(rows), temperature)
    value, gradients = _with_gradients(nt_xent, *inputs)
    expected, expected_gradients = _with_gradients(naive_nt_xent, *inputs)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-12)


def test_nt_xent_in_tiles_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _with_gradients(nt_xent, *_views(40))
    monkeypatch.setattr("clipsys.training.losses.two_views.auto_tile_size", lambda *_: 3)
    parts = _with_gradients(nt_xent, *_views(40))
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("temperature", [0.2, 0.01])
def test_moco_and_its_gradient_are_those_of_a_loop(temperature: float) -> None:
    query, key = _views(6)
    (queue, _) = _views(11)
    value, (gradient,) = _with_gradients(lambda q: moco(q, key, queue, temperature), query)
    expected, (wanted,) = _with_gradients(lambda q: naive_moco(q, key, queue, temperature), query)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12)


_EQUAL = F.normalize(torch.ones(8, 5), dim=-1)
_HARD_CASES = {
    "all features equal": (_EQUAL, _EQUAL),
    "one class only, nearly": (_EQUAL + 1e-6 * torch.randn(8, 5), _EQUAL),
    "unnormalised": (1e3 * torch.randn(8, 5), 1e3 * torch.randn(8, 5)),
    "the anchor's own self is all that is near": (torch.eye(8), -torch.eye(8)),
    "zeros": (torch.zeros(8, 5), torch.zeros(8, 5)),
}


@pytest.mark.parametrize("case", _HARD_CASES)
def test_hard_inputs_at_a_low_temperature_stay_finite(case: str) -> None:
    first, second = _HARD_CASES[case]
    queue = torch.cat([second, second])
    for loss in (
        lambda a, b: nt_xent(a, b, 0.01),
        lambda a, b: moco(a, b, queue, 0.01) + 0 * b.sum(),
    ):
        value, gradients = _with_gradients(loss, first, second)
        assert bool(torch.isfinite(value))
        assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)


@pytest.mark.parametrize(("size", "kept"), [(4, [8, 9, 10, 11]), (15, [112, 113, 114, *range(12)])])
def test_the_queue_keeps_the_newest_keys_whatever_its_size(size: int, kept: list[int]) -> None:
    queue = torch.arange(100, 100 + size)[:, None].float()
    before = queue.clone()
    for start in (0, 6):
        queue = enqueued(queue, torch.arange(start, start + 6)[:, None].float())
    assert queue[:, 0].tolist() == kept
    assert before[0, 0] == 100


def _on_rank(rank: int, world_size: int) -> Any:
    first, second = _views(8)
    rows = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    value, gradients = _with_gradients(nt_xent, first[rows], second[rows])
    queue = enqueued(torch.zeros(20, 5, dtype=torch.float64), first[rows])
    return value.numpy(), [gradient.numpy() for gradient in gradients], queue.numpy()


def test_two_ranks_give_the_loss_the_gradient_and_the_queue_of_one() -> None:
    value, gradients, queue = _on_rank(0, 1)
    shares = run_ranks(_on_rank, 2)
    np.testing.assert_allclose(np.mean([share[0] for share in shares]), value, rtol=1e-12)
    for number, expected in enumerate(gradients):
        # Averaged over ranks by DDP, hence twice as large here.
        actual = np.concatenate([share[1][number] for share in shares]) / 2
        np.testing.assert_allclose(actual, expected, atol=1e-14)
    for share in shares:
        np.testing.assert_array_equal(share[2], queue)


def test_shapes_that_do_not_fit_are_named() -> None:
    first, second = _views(4)
    with pytest.raises(ConfigError, match=r"nt_xent: views \(4, 5\) and \(3, 5\)"):
        nt_xent(first, second[:3])
    with pytest.raises(ConfigError, match=r"moco: queries \(4, 5\) and keys \(3, 5\)"):
        moco(first, second[:3], second)
    with pytest.raises(ConfigError, match=r"the queue has shape \(4, 3\); expected \(K, 5\)"):
        moco(first, second, second[:, :3])
