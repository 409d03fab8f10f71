"""Triplets and pairs with a margin, against loops in float64 and pytorch-metric-learning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.miners import BatchHardMiner, TripletMarginMiner
from pytorch_metric_learning.reducers import MeanReducer
from torch.nn import functional as F  # noqa: N812

from clipsys.errors import ConfigError
from clipsys.training.losses import margin_contrastive, triplet
from tests.ranks import run_ranks

MINING = ("all", "semi-hard", "inverted", "hard")


def naive_triplet(features: torch.Tensor, labels: torch.Tensor, margin: float, mining: str) -> Any:
    """One triplet after the other."""
    rows, costs = range(len(features)), []
    for anchor in rows:
        distance = [(features[anchor] - other).norm() for other in features]
        positives = [n for n in rows if labels[n] == labels[anchor] and n != anchor]
        negatives = [n for n in rows if labels[n] != labels[anchor]]
        pairs = [(p, n) for p in positives for n in negatives]
        if mining == "hard":
            pairs.sort(key=lambda one: float((distance[one[1]] - distance[one[0]]).detach()))
            del pairs[1:]
        for positive, negative in pairs:
            gap = distance[negative] - distance[positive]
            is_mined = {
                "all": True, "hard": True, "inverted": gap <= 0, "semi-hard": 0 < gap <= margin
            }[mining]  # fmt: skip
            if is_mined:
                costs.append(F.relu(margin - gap))
    return torch.stack(costs).mean() if costs else 0 * features.sum()


def naive_margin(features: torch.Tensor, labels: torch.Tensor, margin: float) -> Any:
    """One pair after the other."""
    costs = []
    for one in range(len(features)):
        for other in set(range(len(features))) - {one}:
            distance = (features[one] - features[other]).norm()
            near = labels[one] == labels[other]
            costs.append(distance**2 if near else F.relu(margin - distance) ** 2)
    return torch.stack(costs).mean()


def _features(rows: int = 12, width: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    features = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return F.normalize(features, dim=-1)


def _labels(rows: int = 12) -> torch.Tensor:
    return torch.tensor([0, 1, 1, 2, 0, 1, 7, 2, 1])[torch.arange(rows) % 9]


def _with_gradient(loss: Any, features: torch.Tensor) -> tuple[Any, Any]:
    leaf = features.detach().clone().requires_grad_()
    value = loss(leaf)
    value.backward()
    return value.detach(), leaf.grad


_LOSSES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    **{
        f"triplet, {mining}, {margin}": (
            lambda z, y, mining=mining, margin=margin: triplet(z, y, margin, mining),
            lambda z, y, mining=mining, margin=margin: naive_triplet(z, y, margin, mining),
        )
        for mining in MINING
        for margin in (0.2, 1.5)
    },
    **{
        f"margin, {margin}": (
            lambda z, y, margin=margin: margin_contrastive(z, y, margin),
            lambda z, y, margin=margin: naive_margin(z, y, margin),
        )
        for margin in (1.0, 1.7)
    },
}


@pytest.mark.parametrize("name", _LOSSES)
@pytest.mark.parametrize("length", [1.0, 0.4])
def test_losses_and_their_gradients_are_those_of_a_loop(name: str, length: float) -> None:
    loss, naive = _LOSSES[name]
    features, labels = length * _features(), _labels()
    value, gradient = _with_gradient(lambda z: loss(z, labels), features)
    expected, wanted = _with_gradient(lambda z: naive(z, labels), features)
    assert float(expected) > 0
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", _LOSSES)
def test_tiles_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, _ = _LOSSES[name]
    features, labels = _features(40), _labels(40)
    whole = _with_gradient(lambda z: loss(z, labels), features)
    monkeypatch.setattr("clipsys.training.losses.distances.auto_tile_size", lambda *_: 56)
    parts = _with_gradient(lambda z: loss(z, labels), features)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mining", MINING)
@pytest.mark.parametrize("margin", [0.05, 0.5])
def test_triplet_is_that_of_pytorch_metric_learning(mining: Any, margin: float) -> None:
    features, labels = _features(30), _labels(30)
    theirs = TripletMarginLoss(margin, reducer=MeanReducer())
    miner: Any = {
        "all": lambda *_: None,
        "semi-hard": TripletMarginMiner(margin, type_of_triplets="semihard"),
        "inverted": TripletMarginMiner(margin, type_of_triplets="hard"),
        "hard": BatchHardMiner(),
    }[mining]
    # Theirs normalises, so ours does here too: gradients are towards what is normalised.
    actual = _with_gradient(
        lambda z: triplet(F.normalize(z, dim=-1), labels, margin, mining), 2 * features
    )
    expected = _with_gradient(lambda z: theirs(z, labels, miner(z, labels)), 2 * features)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


_EQUAL = F.normalize(torch.ones(8, 5), dim=-1)
_RANDOM = torch.randn(8, 5, generator=torch.Generator().manual_seed(2))
_PAIRS = torch.arange(8) // 2
_HARD_CASES = {
    "all features equal": (_EQUAL, _PAIRS),
    "equal but for rounding": (_EQUAL + 1e-8 * _RANDOM, _PAIRS),
    "one class only": (F.normalize(_RANDOM, dim=-1), torch.zeros(8, dtype=torch.int64)),
    "every label once": (F.normalize(_RANDOM, dim=-1), torch.arange(8)),
    "a class with one member": (F.normalize(_RANDOM, dim=-1), torch.arange(8) // 7),
    "unnormalised": (1e3 * _RANDOM, _PAIRS),
    "zeros": (torch.zeros(8, 5), _PAIRS),
    "a single row": (_EQUAL[:1], torch.zeros(1, dtype=torch.int64)),
}


@pytest.mark.parametrize("name", _LOSSES)
@pytest.mark.parametrize("case", _HARD_CASES)
def test_hard_inputs_stay_finite(case: str, name: str) -> None:
    features, labels = _HARD_CASES[case]
    value, gradient = _with_gradient(lambda z: _LOSSES[name][0](z, labels), features)
    assert value.dtype == torch.float32
    assert bool(torch.isfinite(value))
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("mining", MINING)
def test_a_collapsed_batch_costs_the_margin_and_has_no_gradient(mining: Any) -> None:
    value, gradient = _with_gradient(lambda z: triplet(z, _PAIRS, 0.3, mining), _EQUAL)
    # Equal distances are no semi-hard triplets.
    torch.testing.assert_close(value, torch.tensor(0.3 * (mining != "semi-hard")))
    assert not bool(gradient.any())


def test_small_distances_in_float32_are_exact() -> None:
    """The product form of a distance knows those below 3e-4 in float64 only."""
    near = _EQUAL.repeat(2, 1) + 1e-4 * torch.randn(
        16, 5, generator=torch.Generator().manual_seed(3)
    )
    labels = torch.arange(16) // 4
    actual = _with_gradient(lambda z: triplet(z, labels, 1e-4, "all"), near)
    expected = _with_gradient(lambda z: naive_triplet(z, labels, 1e-4, "all"), near.double())
    torch.testing.assert_close(actual[0].double(), expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(actual[1].double(), expected[1], rtol=1e-5, atol=1e-6)


def test_features_of_16_bits_under_autocast_are_compared_exactly() -> None:
    features, labels = _features().bfloat16(), _labels()
    for loss, _ in _LOSSES.values():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(features, labels)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, loss(features.double(), labels).float())


def _on_rank(rank: int, world_size: int) -> list[tuple[float, np.ndarray]]:
    features, labels = _features(12), _labels(12)
    rows = slice(rank * 12 // world_size, (rank + 1) * 12 // world_size)
    found = []
    for loss, _ in _LOSSES.values():
        value, gradient = _with_gradient(lambda z, f=loss: f(z, labels[rows]), features[rows])
        found.append((float(value), gradient.numpy()))
    return found


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_give_the_loss_and_the_gradient_of_one(world_size: int) -> None:
    """pytorch-metric-learning 363 and 732: its mean over ranks is the loss times their number.

    542: its miner for several ranks fails on one. Here mining is part of the loss, and `_on_rank`
    runs without a process group too.
    """
    alone, shares = _on_rank(0, 1), run_ranks(_on_rank, world_size)
    for number, (value, gradient) in enumerate(alone):
        parts = [share[number] for share in shares]
        np.testing.assert_allclose(np.mean([part[0] for part in parts]), value, rtol=1e-12)
        # Averaged over ranks by DDP.
        mean = np.concatenate([part[1] for part in parts]) / world_size
        np.testing.assert_allclose(mean, gradient, atol=1e-13)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, y: triplet(z[None], y), r"triplet: features \(1, 12, 4\); expected \(B, D\)"),
        (lambda z, y: triplet(z, y[:3]), r"triplet: labels \(3,\) for 12 rows; expected \(12,\)"),
        (lambda z, y: triplet(z, y, mining="easy"), "mining is 'easy'; expected one of all, semi-"),
        (lambda z, y: triplet(z, y, 0.0), r"triplet: margin is 0.0; expected more than 0"),
        (lambda z, y: margin_contrastive(z, y, -1.0), r"margin_contrastive: margin is -1.0"),
    ],
)
def test_what_does_not_fit_is_named(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call(_features(), _labels())
