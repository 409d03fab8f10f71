"""SCL against a loop in float64, against cross-entropy, and on several ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from clipsys.errors import ConfigError
from clipsys.training.losses import scl, supcon
from tests.ranks import run_ranks
from tests.training.losses.test_supervised import naive_supcon


def naive_scl(
    logits: torch.Tensor, features: torch.Tensor, classes: torch.Tensor, weight: float, t: Any
) -> Any:
    """One sample after the other."""
    entropies = [
        torch.logsumexp(row, 0) - row[number]
        for row, number in zip(logits, classes.tolist(), strict=True)
    ]
    unit = torch.stack([row / row.norm() for row in features])
    contrast = naive_supcon(unit[:, None], classes, t, "out")
    return (1 - weight) * torch.stack(entropies).mean() + weight * contrast


def _batch(count: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    logits = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    features = 5 * torch.randn(count, 6, generator=generator, dtype=torch.float64)
    return logits, features, torch.tensor([0, 1, 1, 3, 0, 2, 1, 1])[torch.arange(count) % 8]


@pytest.mark.parametrize("weight", [0.0, 0.5, 0.9, 1.0])
def test_scl_and_its_gradients_are_those_of_a_loop(weight: float) -> None:
    logits, features, classes = _batch()
    results = []
    for loss in (scl, naive_scl):
        leaves = [one.clone().requires_grad_() for one in (logits, features)]
        temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        value = loss(*leaves, classes, weight, temperature)
        value.backward()
        results.append([value, *(0 * one if one.grad is None else one.grad
                                 for one in (*leaves, temperature))])  # fmt: skip
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_a_weight_of_zero_is_cross_entropy_to_the_last_bit() -> None:
    logits, features, classes = _batch()
    assert torch.equal(scl(logits, features, classes, 0.0), F.cross_entropy(logits, classes))


def test_the_norm_of_the_features_does_not_matter() -> None:
    logits, features, classes = _batch()
    torch.testing.assert_close(
        scl(logits, features * 100, classes), scl(logits, features, classes), rtol=1e-12, atol=0
    )


_EXTREMES = {
    "a class with one member": torch.tensor([0, 1, 2, 3]),
    "a batch of one class": torch.tensor([2, 2, 2, 2]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", _EXTREMES.values(), ids=_EXTREMES)
@pytest.mark.parametrize("features", [torch.ones(4, 6), torch.zeros(4, 6), 1e4 * torch.eye(4, 6)])
def test_it_is_finite_where_it_is_hard(
    features: torch.Tensor, classes: torch.Tensor, dtype: torch.dtype
) -> None:
    leaves = [one.to(dtype).clone().detach() for one in (torch.zeros(4, 4), features)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    value = scl(*leaves, classes, 0.9, 0.01)
    value.backward()  # type: ignore[no-untyped-call]
    assert value.dtype == torch.float32 and value.isfinite()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)


def _share(rank: int, world_size: int) -> tuple[float, Any, Any]:
    logits, features, classes = _batch()
    own = slice(rank * 12 // world_size, (rank + 1) * 12 // world_size)
    leaves = [one[own].clone().requires_grad_() for one in (logits, features)]
    value = scl(*leaves, classes[own], 0.9, 0.3)
    value.backward()
    return float(value.detach()), *(leaf.grad.numpy() for leaf in leaves if leaf.grad is not None)


@pytest.mark.parametrize("world_size", [2, 3])
def test_shares_of_ranks_average_to_the_loss_of_one_process(world_size: int) -> None:
    logits, features, classes = _batch()
    leaves = [one.clone().requires_grad_() for one in (logits, features)]
    expected = naive_scl(*leaves, classes, 0.9, 0.3)
    expected.backward()
    values, *gradients = zip(*run_ranks(_share, world_size), strict=True)
    assert np.mean(values) == pytest.approx(float(expected.detach()), rel=1e-10)
    for leaf, parts in zip(leaves, gradients, strict=True):
        actual = np.concatenate(parts) / world_size
        assert leaf.grad is not None
        np.testing.assert_allclose(actual, leaf.grad.numpy(), rtol=1e-9, atol=1e-12)


def test_its_second_term_is_supcon() -> None:
    logits, features, classes = _batch()
    expected = supcon(F.normalize(features, dim=1)[:, None], classes, 0.5)
    torch.testing.assert_close(scl(logits, features, classes, 1.0, 0.5), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2).long(), 1.5), "weight is 1.5"),
        ((torch.zeros(2, 3), torch.zeros(3, 4), torch.zeros(2).long()), r"logits \(2, 3\) and"),
        ((torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(3).long()), r"classes \(3,\) for 2"),
    ],
)
def test_shapes_and_weights_that_do_not_fit_are_named(arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scl(*arguments)
