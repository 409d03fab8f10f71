"""InfoNCE, NCE and logistic losses between views, against loops in float64 and on several ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from clipsys.errors import ConfigError
from clipsys.training.losses import info_nce, info_nce_views, logistic, nce
from tests.ranks import run_ranks


def naive_info_nce_views(
    queries: torch.Tensor, keys: torch.Tensor, temperature: Any, groups: Any = None
) -> Any:
    """One query after the other."""
    of_row = list(range(len(keys))) if groups is None else groups.tolist()
    losses = []
    for row, query in enumerate(queries):
        probabilities = (keys @ query / temperature).log_softmax(0)
        positives = [n for n in range(len(keys)) if of_row[n] == of_row[row]]
        losses.append(-torch.stack([probabilities[n] for n in positives]).mean())
    return torch.stack(losses).mean()


def naive_nce(
    anchors: torch.Tensor,
    positives: torch.Tensor,
    temperature: Any,
    log_normalizer: Any,
    num_outcomes: int | None = None,
    groups: Any = None,
) -> Any:
    """One key after the other, with h = p / (p + k·p_n), as Gutmann and Hyvärinen write it."""
    of_row = list(range(len(anchors))) if groups is None else groups.tolist()
    k = len(anchors) - 1
    noise = k / (num_outcomes or k)
    losses = []
    for row, anchor in enumerate(anchors):
        for number, key in enumerate(positives):
            density = (anchor @ key / temperature - log_normalizer).exp()
            of_data = density / (density + noise)
            losses.append(-(of_data if of_row[number] == of_row[row] else 1 - of_data).log())
    return torch.stack(losses).sum() / len(anchors)


def naive_logistic(
    anchors: torch.Tensor, positives: torch.Tensor, temperature: Any, groups: Any = None
) -> Any:
    """One key after the other."""
    of_row = list(range(len(anchors))) if groups is None else groups.tolist()
    losses = []
    for row, anchor in enumerate(anchors):
        for number, key in enumerate(positives):
            sign = 1 if of_row[number] == of_row[row] else -1
            losses.append(-F.logsigmoid(sign * (anchor @ key) / temperature))
    return torch.stack(losses).sum() / len(anchors)


_GROUPS = torch.tensor([0, 1, 1, 2, 0, 1, 7, 2, 1, 3, 4, 0])
#: By name: loss and loop of (anchors, positives, temperature, log Z, groups).
_LOSSES: dict[str, tuple[Any, Any]] = {
    "info_nce_views": (
        lambda a, p, t, z, g: info_nce_views(a, p, t, groups_B=g) + 0 * z,
        lambda a, p, t, z, g: naive_info_nce_views(a, p, t, g) + 0 * z,
    ),
    "nce": (
        lambda a, p, t, z, g: nce(a, p, t, z, groups_B=g),
        lambda a, p, t, z, g: naive_nce(a, p, t, z, None, g),
    ),
    "nce, 1,000 outcomes": (
        lambda a, p, t, z, g: nce(a, p, t, z, 1000, groups_B=g),
        lambda a, p, t, z, g: naive_nce(a, p, t, z, 1000, g),
    ),
    "logistic": (
        lambda a, p, t, z, g: logistic(a, p, t, groups_B=g) + 0 * z,
        lambda a, p, t, z, g: naive_logistic(a, p, t, g) + 0 * z,
    ),
}


def _inputs(rows: int = 12) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    pair = torch.randn(2, rows, 5, generator=generator, dtype=torch.float64)
    scalars = torch.tensor([0.3, 1.7], dtype=torch.float64).unbind()
    return [*F.normalize(pair, dim=-1).unbind(), *scalars]


def _with_gradients(loss: Any, tensors: list[torch.Tensor], groups: Any) -> Any:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    value = loss(*leaves, groups)
    value.backward()
    return value.detach(), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("name", _LOSSES)
@pytest.mark.parametrize("rows", [2, 12])
@pytest.mark.parametrize("grouped", [False, True])
def test_losses_and_their_gradients_are_those_of_a_loop(
    name: str, rows: int, grouped: bool
) -> None:
    loss, naive = _LOSSES[name]
    groups = _GROUPS[:rows] if grouped else None
    actual = _with_gradients(loss, _inputs(rows), groups)
    expected = _with_gradients(naive, _inputs(rows), groups)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)


def test_both_directions_of_info_nce_are_that_of_two_modalities() -> None:
    first, second, temperature, _ = _inputs()
    there = info_nce_views(first, second, temperature, groups_B=_GROUPS)
    back = info_nce_views(second, first, temperature, groups_B=_GROUPS)
    both = info_nce(first, second, 1 / temperature, groups=_GROUPS)
    torch.testing.assert_close((there + back) / 2, both, rtol=1e-12, atol=0)


_EQUAL = F.normalize(torch.ones(8, 5), dim=-1)
_HARD_CASES = {
    "all features equal": (_EQUAL, _EQUAL),
    "opposite": (_EQUAL, -_EQUAL),
    "unnormalised": tuple(1e3 * torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(1))),
    "zeros": (torch.zeros(8, 5), torch.zeros(8, 5)),
}


@pytest.mark.parametrize("case", _HARD_CASES)
@pytest.mark.parametrize("name", _LOSSES)
@pytest.mark.parametrize("groups", [None, torch.zeros(8, dtype=torch.int64)])
def test_hard_inputs_at_a_low_temperature_stay_finite(case: str, name: str, groups: Any) -> None:
    tensors = [*_HARD_CASES[case], torch.tensor(0.01), torch.tensor(2.0)]
    value, gradients = _with_gradients(_LOSSES[name][0], tensors, groups)
    assert value.dtype == torch.float32
    assert bool(torch.isfinite(value))
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)


def _on_rank(rank: int, world_size: int) -> list[Any]:
    first, second, *scalars = _inputs()
    rows = slice(rank * 12 // world_size, (rank + 1) * 12 // world_size)
    found = []
    for loss, _ in _LOSSES.values():
        for groups in (None, _GROUPS[rows]):
            value, gradients = _with_gradients(loss, [first[rows], second[rows], *scalars], groups)
            found.append((float(value), [gradient.numpy() for gradient in gradients]))
    return found


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_give_the_loss_and_the_gradients_of_one(world_size: int) -> None:
    """stable-pretraining 409: targets that count this rank's rows only give another loss."""
    alone, shares = _on_rank(0, 1), run_ranks(_on_rank, world_size)
    for number, (value, gradients) in enumerate(alone):
        parts = [share[number] for share in shares]
        np.testing.assert_allclose(np.mean([part[0] for part in parts]), value, rtol=1e-12)
        for place, gradient in enumerate(gradients):
            # Averaged over ranks by DDP.
            of_ranks = [part[1][place] for part in parts]
            mean = np.concatenate(of_ranks) / world_size if place < 2 else np.mean(of_ranks)
            np.testing.assert_allclose(mean, gradient, rtol=1e-10, atol=1e-13)


def test_what_does_not_fit_is_named() -> None:
    first, second, *_ = _inputs()
    for loss in (info_nce_views, nce, logistic):
        with pytest.raises(ConfigError, match=r"views \(12, 5\) and \(3, 5\); expected the same"):
            loss(first, second[:3])
        with pytest.raises(ConfigError, match=r"groups \(3,\) for 12 rows; expected \(12,\)"):
            loss(first, second, groups_B=_GROUPS[:3])
    with pytest.raises(ConfigError, match="one row over all ranks, which leaves no noise"):
        nce(first[:1], second[:1])
    with pytest.raises(ConfigError, match="num_outcomes is 0; expected 1 or more"):
        nce(first, second, num_outcomes=0)
