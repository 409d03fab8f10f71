"""LooC's loss against a loop in float64, on hard inputs, and its queues on two ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from clipsys.errors import ConfigError
from clipsys.training.losses import enqueued, looc, moco
from tests.ranks import run_ranks


def naive_looc(
    query: torch.Tensor, keys: torch.Tensor, queue: torch.Tensor, temperature: Any
) -> torch.Tensor:
    """One image and one head after the other; equation 2 with its n + 1 terms."""
    heads = query.shape[1]
    losses = []
    for row in range(len(query)):
        for head in range(heads):
            own = keys[row, head, :1] if head == 0 else keys[row, head]
            candidates = [*own, *queue[:, head]]
            logits = torch.stack([query[row, head] @ one for one in candidates]) / temperature
            losses.append(torch.logsumexp(logits, 0) - logits[head])
    return torch.stack(losses).mean()


def _case(
    rows: int = 6, heads: int = 3, queue: int = 7, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((rows, heads, 5), (rows, heads, heads, 5), (queue, heads, 5))
    drawn = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    query, keys, others = (F.normalize(one, dim=-1) for one in drawn)
    return query, keys, others


def _with_gradients(loss: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    value = loss(*leaves)
    value.backward()
    return value.detach(), [leaf.grad for leaf in leaves]  # type: ignore[misc]


@pytest.mark.parametrize(("rows", "heads"), [(1, 1), (1, 3), (6, 2), (5, 4)])
def test_the_loss_and_its_gradients_are_those_of_a_loop(rows: int, heads: int) -> None:
    query, keys, queue = _case(rows, heads)
    temperature = torch.tensor(0.3, dtype=torch.float64)
    value, gradients = _with_gradients(lambda q, t: looc(q, keys, queue, t), query, temperature)
    expected, wanted = _with_gradients(
        lambda q, t: naive_looc(q, keys, queue, t), query, temperature
    )
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    for actual, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-10, atol=1e-12)


def test_with_one_head_it_is_moco() -> None:
    query, keys, queue = _case(heads=1)
    expected = moco(query[:, 0], keys[:, 0, 0], queue[:, 0], 0.2)
    torch.testing.assert_close(looc(query, keys, queue, 0.2), expected, rtol=1e-12, atol=1e-12)


def test_other_keys_of_an_image_are_negatives_in_all_heads_but_the_first() -> None:
    query, keys, queue = _case()

    def change(head: int, view: int) -> float:
        moved = keys.clone()
        moved[:, head, view] = query[:, head]  # as near as can be
        return float(looc(query, moved, queue, 0.2) - looc(query, keys, queue, 0.2))

    assert [change(0, view) == 0 for view in (1, 2)] == [True, True]
    assert all(change(head, view) > 0 for head in (1, 2) for view in range(3) if view != head)
    assert all(change(head, head) < 0 for head in range(3))


_EQUAL = torch.ones(4, 3, 5)
_HARD_CASES = {
    "all features equal": (F.normalize(_EQUAL, dim=-1), F.normalize(_EQUAL, dim=-1)),
    "unnormalised": (1e3 * _EQUAL, -1e3 * _EQUAL),
    "zeros": (0 * _EQUAL, 0 * _EQUAL),
    "one row": (_EQUAL[:1], -_EQUAL[:1]),
}


@pytest.mark.parametrize("case", _HARD_CASES)
def test_hard_inputs_at_a_low_temperature_stay_finite(case: str) -> None:
    query, key = _HARD_CASES[case]
    keys = key[:, :, None].expand(-1, -1, 3, -1)
    value, (gradient,) = _with_gradients(lambda q: looc(q, keys, key, 0.01), query)
    assert bool(torch.isfinite(value)) and bool(torch.isfinite(gradient).all())


def test_16_bit_features_are_multiplied_in_float32() -> None:
    query, keys, queue = (one.bfloat16() for one in _case())
    expected = looc(query.float(), keys.float(), queue.float(), 0.2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = looc(query, keys, queue, 0.2)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def _on_rank(rank: int, world_size: int) -> Any:
    query, keys, queue = _case(8)
    rows = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    value, (gradient,) = _with_gradients(lambda q: looc(q, keys[rows], queue, 0.2), query[rows])
    return value.numpy(), gradient.numpy(), enqueued(queue, query[rows]).numpy()


def test_two_ranks_give_the_loss_the_gradient_and_the_queues_of_one() -> None:
    value, gradient, queue = _on_rank(0, 1)
    shares = run_ranks(_on_rank, 2)
    np.testing.assert_allclose(np.mean([share[0] for share in shares]), value, rtol=1e-12)
    # Averaged over ranks by DDP, hence twice as large here.
    actual = np.concatenate([share[1] for share in shares]) / 2
    np.testing.assert_allclose(actual, gradient, atol=1e-14)
    assert queue.shape == (7, 3, 5)
    for share in shares:
        np.testing.assert_array_equal(share[2], queue)


def test_shapes_that_do_not_fit_are_named() -> None:
    query, keys, queue = _case()
    with pytest.raises(ConfigError, match=r"looc: queries \(6, 5\); expected \(B, H, D\)"):
        looc(query[:, 0], keys, queue)
    with pytest.raises(ConfigError, match=r"looc: keys \(6, 3, 2, 5\); .* \(6, 3, 3, 5\)"):
        looc(query, keys[:, :, :2], queue)
    with pytest.raises(ConfigError, match=r"the queue has shape \(7, 2, 5\); expected \(K, 3, 5\)"):
        looc(query, keys, queue[:, :2])
