"""N-pair against a loop in float64, against pytorch-metric-learning, and on several ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import DotProductSimilarity
from pytorch_metric_learning.losses import NPairsLoss

from clipsys.errors import ConfigError
from clipsys.training.losses import n_pair
from tests.ranks import run_ranks


def naive_n_pair(
    anchors: torch.Tensor, positives: torch.Tensor, l2: float = 0.0, labels: Any = None
) -> Any:
    """One anchor after the other."""
    numbers = list(range(len(anchors)))
    of_row = numbers if labels is None else labels.tolist()
    losses = []
    for row in numbers:
        # From the next row on, around the end; itself last.
        following = numbers[row + 1 :] + numbers[: row + 1]
        own = positives[next(n for n in following if of_row[n] == of_row[row])]
        others = [positives[n] for n in numbers if of_row[n] != of_row[row]]
        rest = [(anchors[row] @ other - anchors[row] @ own).exp() for other in others]
        losses.append(torch.log1p(sum(rest, 0 * own.sum())))
    lengths = torch.cat([anchors, positives]).square().sum(dim=1)
    return torch.stack(losses).mean() + l2 * lengths.mean()


def _pairs(rows: int = 12, width: int = 5) -> Any:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(2, rows, width, generator=generator, dtype=torch.float64).unbind()


def _labels(rows: int = 12) -> torch.Tensor:
    return torch.tensor([0, 1, 1, 2, 0, 1, 7, 2, 1])[torch.arange(rows) % 9]


def _with_gradients(loss: Any, *tensors: torch.Tensor) -> tuple[Any, list[Any]]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    value = loss(*leaves)
    value.backward()
    return value.detach(), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("rows", [1, 2, 12])
@pytest.mark.parametrize("labelled", [False, True])
def test_n_pair_and_its_gradients_are_those_of_a_loop(rows: int, labelled: bool) -> None:
    labels = _labels(rows) if labelled else None
    actual = _with_gradients(lambda a, p: n_pair(a, p, 0.3, labels_B=labels), *_pairs(rows))
    expected = _with_gradients(lambda a, p: naive_n_pair(a, p, 0.3, labels), *_pairs(rows))
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)


def test_n_pair_is_that_of_pytorch_metric_learning() -> None:
    """With a distance that does not normalise; its default is not the paper's loss."""
    theirs = NPairsLoss(distance=DotProductSimilarity(normalize_embeddings=False))
    labels = torch.arange(12).repeat(2)
    actual = _with_gradients(n_pair, *_pairs())
    expected = _with_gradients(lambda a, p: theirs(torch.cat([a, p]), labels), *_pairs())
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)
    normalising = NPairsLoss()(torch.cat(_pairs()), labels)
    assert abs(float(normalising) - float(actual[0])) > 0.1


_HARD_CASES = {
    "all features equal": torch.ones(8, 5),
    "of length 1,000": 1e3 * torch.randn(8, 5, generator=torch.Generator().manual_seed(2)),
    "zeros": torch.zeros(8, 5),
    "a single row": torch.ones(1, 5),
}
_HARD_LABELS = {"none": None, "one class only": 0 * torch.arange(8), "once": torch.arange(8) // 7}


@pytest.mark.parametrize("case", _HARD_CASES)
@pytest.mark.parametrize("label", _HARD_LABELS)
def test_hard_inputs_stay_finite(case: str, label: str) -> None:
    rows, labels = _HARD_CASES[case], _HARD_LABELS[label]
    labels = None if labels is None else labels[: len(rows)]
    value, gradients = _with_gradients(lambda a, p: n_pair(a, p, 0.1, labels_B=labels), rows, rows)
    assert value.dtype == torch.float32
    assert bool(torch.isfinite(value))
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)


def test_features_of_16_bits_under_autocast_are_compared_in_float32() -> None:
    anchors, positives = (one.bfloat16() for one in _pairs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = n_pair(anchors, positives, 0.1)
    torch.testing.assert_close(value, n_pair(anchors.double(), positives.double(), 0.1).float())


def _on_rank(rank: int, world_size: int) -> list[Any]:
    anchors, positives = _pairs()
    rows = slice(rank * 12 // world_size, (rank + 1) * 12 // world_size)
    found = []
    for labels in (None, _labels()[rows]):
        value, gradients = _with_gradients(
            lambda a, p, y=labels: n_pair(a, p, 0.3, labels_B=y), anchors[rows], positives[rows]
        )
        found.append((float(value), [gradient.numpy() for gradient in gradients]))
    return found


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_give_the_loss_and_the_gradients_of_one(world_size: int) -> None:
    """The wrapper of pytorch-metric-learning gives another value and a gradient 53 % off."""
    alone, shares = _on_rank(0, 1), run_ranks(_on_rank, world_size)
    for number, (value, gradients) in enumerate(alone):
        parts = [share[number] for share in shares]
        np.testing.assert_allclose(np.mean([part[0] for part in parts]), value, rtol=1e-12)
        for side, gradient in enumerate(gradients):
            # Averaged over ranks by DDP.
            mean = np.concatenate([part[1][side] for part in parts]) / world_size
            np.testing.assert_allclose(mean, gradient, atol=1e-13)


def test_shapes_that_do_not_fit_are_named() -> None:
    anchors, positives = _pairs()
    with pytest.raises(ConfigError, match=r"n_pair: anchors \(12, 5\) and positives \(3, 5\)"):
        n_pair(anchors, positives[:3])
    with pytest.raises(ConfigError, match=r"n_pair: labels \(3,\) for 12 rows; expected \(12,\)"):
        n_pair(anchors, positives, labels_B=_labels()[:3])
