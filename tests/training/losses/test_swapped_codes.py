"""SwAV against loops in float64, against lightly, and on several ranks."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from lightly.loss import SwaVLoss

from clipsys.errors import ConfigError
from clipsys.training.losses import swav
from clipsys.training.losses.swapped_codes import sinkhorn
from tests.ranks import run_ranks


def naive_codes(scores: torch.Tensor, epsilon: float, iterations: int) -> torch.Tensor:
    """The algorithm of the paper's appendix, on (samples, prototypes)."""
    shares = (scores / epsilon).exp()
    shares = shares / shares.sum()
    num_samples, num_prototypes = shares.shape
    for _ in range(iterations):
        for k in range(num_prototypes):
            shares[:, k] = shares[:, k] / shares[:, k].sum() / num_prototypes
        for b in range(num_samples):
            shares[b] = shares[b] / shares[b].sum() / num_samples
    return shares * num_samples


def naive_swav(
    scores: torch.Tensor,
    *,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
    num_codes: int = 2,
    queued: torch.Tensor | None = None,
) -> torch.Tensor:
    """One code, one view and one sample after the other."""
    num_samples, num_views, _ = scores.shape
    losses = []
    for c in range(num_codes):
        coded = scores[:, c].detach()
        if queued is not None:
            coded = torch.cat([coded, queued[:, c].detach()])
        codes = naive_codes(coded, epsilon, iterations)
        for v in range(num_views):
            for b in range(num_samples):
                logit = scores[b, v] / temperature
                if v != c:
                    losses.append(-(codes[b] * (logit - torch.logsumexp(logit, 0))).sum())
    return torch.stack(losses).mean()


def _scores(samples: int = 6, views: int = 4, prototypes: int = 5, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (samples, views, prototypes)
    return torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1


def _with_gradient(loss: Any, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = scores.detach().clone().requires_grad_()
    value = loss(leaf)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


_OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "one code": {"num_codes": 1},
    "every view has a code": {"num_codes": 4},
    "other settings": {"temperature": 0.3, "epsilon": 0.02, "iterations": 1},
}


@pytest.mark.parametrize("options", _OPTIONS.values(), ids=_OPTIONS)
@pytest.mark.parametrize("num_queued", [0, 7])
def test_swav_and_its_gradient_are_those_of_a_loop(
    options: dict[str, Any], num_queued: int
) -> None:
    num_codes = options.get("num_codes", 2)
    queued = _scores(num_queued, num_codes, seed=1) if num_queued else None
    actual = _with_gradient(lambda z: swav(z, **options, queued_QCK=queued), _scores())
    expected = _with_gradient(lambda z: naive_swav(z, **options, queued=queued), _scores())
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("num_queued", [0, 7])
def test_swav_is_that_of_lightly(num_queued: int) -> None:
    queued = _scores(num_queued, 2, seed=1) if num_queued else None
    theirs = SwaVLoss(0.1, 3, 0.05)
    actual = _with_gradient(lambda z: swav(z, queued_QCK=queued), _scores())
    expected = _with_gradient(
        lambda z: theirs(
            list(z[:, :2].unbind(1)),
            list(z[:, 2:].unbind(1)),
            None if queued is None else list(queued.unbind(1)),
        ).squeeze(),
        _scores(),
    )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def test_codes_add_up_to_one_and_prototypes_get_as_much_each() -> None:
    codes = sinkhorn(_scores(8, 2), iterations=300)
    torch.testing.assert_close(codes.sum(2), torch.ones(8, 2, dtype=torch.float64))
    torch.testing.assert_close(codes.sum(0), torch.full((2, 5), 8 / 5, dtype=torch.float64))


def test_equal_scores_stay_at_the_logarithm_of_the_number_of_prototypes() -> None:
    """What lightly 736 saw as a loss of 6.24 with 512 prototypes: nothing is left to tell apart."""
    value, gradient = _with_gradient(swav, torch.ones(6, 3, 512))
    torch.testing.assert_close(value, torch.tensor(512.0).log())
    assert float(gradient.abs().max()) < 1e-8


_HARD_CASES = {
    "all cosines are 1": torch.ones(6, 2, 5),
    "unnormalised": 1e4 * _scores().float(),
    "zeros": torch.zeros(6, 2, 5),
    "one sample": _scores(1).float(),
    "one prototype": torch.ones(6, 2, 1),
    "more prototypes than samples": _scores(2, 2, 40).float(),
    "one prototype is the nearest of all": torch.eye(5)[torch.zeros(6, 2, dtype=torch.int64)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", _HARD_CASES)
def test_hard_scores_at_a_low_temperature_stay_finite(case: str, dtype: torch.dtype) -> None:
    """Swav 67: without logarithms, exp overflows on features that are not of unit norm."""
    scores = _HARD_CASES[case].to(dtype)
    value, gradient = _with_gradient(lambda z: swav(z, 0.01, 0.005), scores)
    assert value.dtype == torch.float32
    assert bool(torch.isfinite(value))
    assert bool(torch.isfinite(gradient).all())
    if case in ("all cosines are 1", "unnormalised") and dtype == torch.float16:
        assert not bool(torch.isfinite(naive_codes(scores[:, 0], 0.05, 3)).all())


def _on_rank(rank: int, world_size: int) -> list[tuple[float, np.ndarray]]:
    scores, queued = _scores(12), _scores(5, 2, seed=1)
    own = slice(rank * 12 // world_size, (rank + 1) * 12 // world_size)
    share = queued.tensor_split(world_size)[rank]  # not the same number on each rank
    found = []
    for queued_QCK in (None, share, share[:0] if rank else queued):
        value, gradient = _with_gradient(
            lambda z, queued_QCK=queued_QCK: swav(z, queued_QCK=queued_QCK), scores[own]
        )
        found.append((float(value), gradient.numpy()))
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_give_the_loss_and_the_gradient_of_one(world_size: int) -> None:
    alone, shares = _on_rank(0, 1), run_ranks(_on_rank, world_size)
    for number, (value, of_scores) in enumerate(alone):
        parts = [share[number] for share in shares]
        np.testing.assert_allclose(np.mean([part[0] for part in parts]), value, rtol=1e-12)
        # Averaged over ranks by DDP.
        gradient = np.concatenate([part[1] for part in parts]) / world_size
        np.testing.assert_allclose(gradient, of_scores, atol=1e-13)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((6, 5), {}, "swav: scores (6, 5); expected (B, V, K)"),
        ((6, 1, 5), {}, "swav: scores (6, 1, 5); expected (B, V, K)"),
        ((6, 2, 5), {"num_codes": 3}, "swav: num_codes is 3; expected 1 to 2, the views"),
        (
            (6, 4, 5),
            {"queued_QCK": torch.zeros(7, 4, 5)},
            "swav: queued scores (7, 4, 5); expected (Q, 2, 5)",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_named(
    shape: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        swav(torch.zeros(shape), **options)
