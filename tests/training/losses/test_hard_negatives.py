"""Losses that weight or add negatives, against loops in float64, on one rank and on several."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from clipsys.errors import ConfigError
from clipsys.training.losses import hard_info_nce, hard_nt_xent, info_nce, neg_clip, nt_xent
from tests.ranks import run_ranks

Tensors = tuple[torch.Tensor, ...]
_SCALE = torch.tensor(6.0, dtype=torch.float64)


def _unit(*shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def _pairs(rows: int = 7, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    image = _unit(rows, width)
    return image, F.normalize(image + _unit(rows, width, seed=2), dim=-1)


def _with_gradients(loss: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    value = loss(*leaves)
    value.backward()
    return value.detach(), [leaf.grad for leaf in leaves]  # type: ignore[misc]


def _assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-12, atol=1e-12)
    for one, other in zip(actual[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def naive_row(
    positives: list[torch.Tensor],
    negatives: list[torch.Tensor],
    scale: torch.Tensor | float,
    hardness: float,
    prior: float,
) -> torch.Tensor:
    """The loss of one query, by the formula, with no logarithm before the last."""
    mean = torch.stack(positives).mean()
    total = torch.stack([p.exp() for p in positives]).sum()
    if not negatives:
        return total.log() - mean
    weights = [(hardness * n).exp() for n in negatives]
    average = torch.stack(weights).mean()
    added = torch.stack([w * n.exp() / average for w, n in zip(weights, negatives, strict=True)])
    count = len(negatives)
    rest = added.sum()
    if prior:
        rest = (rest - prior * count * total / len(positives)) / (1 - prior)
        rest = torch.maximum(rest, count * torch.exp(-torch.as_tensor(scale)))
    return (total + rest).log() - mean


def naive_hard_info_nce(
    image: torch.Tensor,
    text: torch.Tensor,
    scale: torch.Tensor,
    hardness: float,
    prior: float,
    groups: list[int] | None = None,
    *,
    ignore: bool = False,
) -> torch.Tensor:
    """Both directions, row by row."""
    groups = groups or list(range(len(image)))
    losses = []
    for query, key in ((image, text), (text, image)):
        for i in range(len(query)):
            same = [j for j in range(len(key)) if groups[j] == groups[i]]
            positives = [i] if ignore else same
            rest = [j for j in range(len(key)) if j not in same]
            logits = scale * (query[i] * key).sum(dim=1)
            losses.append(naive_row([*logits[positives]], [*logits[rest]], scale, hardness, prior))
    return torch.stack(losses).mean()


def naive_hard_nt_xent(
    first: torch.Tensor, second: torch.Tensor, temperature: Any, hardness: float, prior: float
) -> torch.Tensor:
    """Each view is an anchor once."""
    both, rows = torch.cat([first, second]), len(first)
    losses = []
    for i in range(2 * rows):
        own = (i + rows) % (2 * rows)
        logits = (both[i] * both).sum(dim=1) / temperature
        rest = [j for j in range(2 * rows) if j not in (i, own)]
        losses.append(naive_row([logits[own]], [*logits[rest]], 1 / temperature, hardness, prior))
    return torch.stack(losses).mean()


def authors_criterion(
    first: torch.Tensor, second: torch.Tensor, temperature: float, hardness: float, prior: float
) -> torch.Tensor:
    """What image/main.py of joshr17/HCL computes for its estimator ``hard``, in other words.

    Its weights, ``imp``, are part of the graph.
    """
    rows = len(first)
    both = torch.cat([first, second])
    exponentials = (both @ both.T / temperature).exp()
    others = ~torch.eye(rows, dtype=torch.bool).repeat(2, 2)
    negatives = exponentials[others].view(2 * rows, -1)
    positive = ((first * second).sum(dim=1) / temperature).exp().repeat(2)
    weights = negatives**hardness
    count = 2 * rows - 2
    reweighted = (weights * negatives).sum(dim=1) / weights.mean(dim=1)
    rest = (reweighted - prior * count * positive) / (1 - prior)
    rest = rest.clamp(min=count * math.exp(-1 / temperature))
    return -(positive / (positive + rest)).log().mean()


def naive_neg_clip(
    image: torch.Tensor,
    text: torch.Tensor,
    negative: torch.Tensor,
    scale: torch.Tensor,
    groups: list[int] | None = None,
    present: torch.Tensor | None = None,
    negative_groups: torch.Tensor | None = None,
    *,
    ignore: bool = False,
) -> torch.Tensor:
    """Both directions, row by row; further texts are candidates of images alone."""
    groups = groups or list(range(len(image)))
    further = [
        (negative[i, t], None if negative_groups is None else int(negative_groups[i, t]))
        for i in range(negative.shape[0])
        for t in range(negative.shape[1])
        if present is None or present[i, t]
    ]
    losses = []
    for query, key, extra in ((image, text, further), (text, image, [])):
        for i in range(len(query)):
            same = [j for j in range(len(key)) if groups[j] == groups[i]]
            positives = [i] if ignore else same
            met = [j for j in range(len(key)) if j in positives or j not in same]
            logits = [scale * query[i] @ key[j] for j in met]
            logits += [scale * query[i] @ row for row, other in extra if other != groups[i]]
            mean = torch.stack([scale * query[i] @ key[j] for j in positives]).mean()
            losses.append(torch.stack(logits).logsumexp(0) - mean)
    return torch.stack(losses).mean()


_WEIGHTS = [(0.5, 0.0), (1.0, 0.1), (0.0, 0.1), (0.3, 0.6)]
_GROUPS = [4, 4, 9, -2, 4, 9, 1]


@pytest.mark.parametrize(("hardness", "prior"), _WEIGHTS)
@pytest.mark.parametrize("tile_size", [None, 2])
def test_hard_info_nce_is_that_of_a_loop(
    hardness: float, prior: float, tile_size: int | None
) -> None:
    options: Any = {"hardness": hardness, "prior": prior}
    for groups, ignore in ((None, False), (_GROUPS, False), (_GROUPS, True)):
        ids = None if groups is None else torch.tensor(groups)

        def loss(i: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
            return hard_info_nce(i, t, s, tile_size, ids, **options, ignore_groups=ignore)  # noqa: B023

        def naive(i: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
            return naive_hard_info_nce(i, t, s, **options, groups=groups, ignore=ignore)  # noqa: B023

        _assert_same(_with_gradients(loss, *_pairs(), _SCALE),
                     _with_gradients(naive, *_pairs(), _SCALE))  # fmt: skip


@pytest.mark.parametrize(("hardness", "prior"), _WEIGHTS)
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_hard_nt_xent_is_that_of_a_loop(hardness: float, prior: float, rows: int) -> None:
    temperature = torch.tensor(0.4, dtype=torch.float64)
    options: Any = {"hardness": hardness, "prior": prior}
    _assert_same(
        _with_gradients(
            lambda a, b, t: hard_nt_xent(a, b, t, **options), *_pairs(rows), temperature
        ),
        _with_gradients(
            lambda a, b, t: naive_hard_nt_xent(a, b, t, **options), *_pairs(rows), temperature
        ),
    )


@pytest.mark.parametrize(("hardness", "prior"), _WEIGHTS)
def test_hard_nt_xent_and_its_gradient_are_those_of_the_authors_code(
    hardness: float, prior: float
) -> None:
    _assert_same(
        _with_gradients(
            lambda a, b: hard_nt_xent(a, b, 0.5, hardness=hardness, prior=prior), *_pairs()
        ),
        _with_gradients(lambda a, b: authors_criterion(a, b, 0.5, hardness, prior), *_pairs()),
    )


def test_without_hardness_and_prior_they_are_the_plain_losses() -> None:
    groups = torch.tensor(_GROUPS)
    none: Any = {"hardness": 0.0, "prior": 0.0}
    _assert_same(
        _with_gradients(lambda *a: hard_info_nce(*a, None, groups, **none), *_pairs(), _SCALE),
        _with_gradients(lambda *a: info_nce(*a, None, groups), *_pairs(), _SCALE),
    )
    _assert_same(
        _with_gradients(lambda *a: hard_nt_xent(*a, 0.3, **none), *_pairs()),
        _with_gradients(lambda *a: nt_xent(*a, 0.3), *_pairs()),
    )


def test_the_bound_holds_where_more_false_negatives_are_expected_than_there_is() -> None:
    both = torch.eye(4, dtype=torch.float64)
    value, gradients = _with_gradients(
        lambda i, t, s: hard_info_nce(i, t, s, hardness=0.0, prior=0.9), both, both, _SCALE
    )
    # Each image is equal to its text and orthogonal to the others: the sum would be negative.
    expected = math.log1p(3 * math.exp(-6) / math.exp(6))
    assert float(value) == pytest.approx(expected, rel=1e-9)
    assert float(gradients[2]) == pytest.approx(-2 * expected, rel=1e-4)


@pytest.mark.parametrize("tile_size", [None, 2])
def test_neg_clip_is_that_of_a_loop(tile_size: int | None) -> None:
    negative = _unit(7, 2, 5, seed=3)
    present = torch.rand(7, 2, generator=torch.Generator().manual_seed(1)) < 0.6
    # Of groups that are there, and of others.
    others = torch.tensor([[9, 5], [4, 1], [9, 9], [1, -2], [7, 4], [5, 5], [4, 9]])
    cases: list[dict[str, Any]] = [
        {},
        {"present": present},
        {"groups": _GROUPS, "present": present},
        {"groups": _GROUPS, "present": present, "negative_groups": others},
        {"groups": _GROUPS, "negative_groups": others, "ignore": True},
    ]
    for case in cases:

        def loss(*tensors: torch.Tensor, case: dict[str, Any] = case) -> torch.Tensor:
            groups = torch.tensor(case["groups"]) if "groups" in case else None
            rest = {n: v for n, v in case.items() if n not in ("groups", "ignore")}
            return neg_clip(
                *tensors, tile_size, groups, **rest, ignore_groups=case.get("ignore", False)
            )

        def naive(*tensors: torch.Tensor, case: dict[str, Any] = case) -> torch.Tensor:
            return naive_neg_clip(*tensors, **case)

        inputs = (*_pairs(), negative, _SCALE)
        _assert_same(_with_gradients(loss, *inputs), _with_gradients(naive, *inputs))


def test_neg_clip_without_further_texts_is_info_nce() -> None:
    absent = torch.zeros(7, 2, dtype=torch.bool)
    value = neg_clip(*_pairs(), _unit(7, 2, 5), _SCALE, present=absent)
    torch.testing.assert_close(value, info_nce(*_pairs(), _SCALE), rtol=1e-12, atol=1e-12)


_EQUAL = F.normalize(torch.ones(8, 5), dim=-1)
_HARD_CASES = {
    "all features equal": (_EQUAL, _EQUAL),
    "one class only, nearly": (_EQUAL + 1e-6 * torch.randn(8, 5), _EQUAL),
    "unnormalised": (1e3 * torch.randn(8, 5), 1e3 * torch.randn(8, 5)),
    "pairs that are all that is near": (torch.eye(8), torch.eye(8)),
    "pairs far apart": (torch.eye(8), -torch.eye(8)),
    "zeros": (torch.zeros(8, 5), torch.zeros(8, 5)),
    "one pair": (_EQUAL[:1], _EQUAL[:1]),
}


@pytest.mark.parametrize("case", _HARD_CASES)
def test_hard_inputs_at_a_low_temperature_stay_finite(case: str) -> None:
    first, second = _HARD_CASES[case]
    scale = torch.tensor(100.0)
    one_class = torch.zeros(len(first), dtype=torch.int64)
    losses: list[Callable[..., torch.Tensor]] = [
        lambda a, b, s: neg_clip(a, b, b[:, None] + a[:, None], s),
        lambda a, b, s: neg_clip(
            a, b, b[:, None], s, groups=one_class, negative_groups=one_class[:, None]
        ),
    ]
    for hardness, prior in ((0.5, 0.0), (1.0, 0.1), (0.0, 0.9), (4.0, 0.3)):
        options: Any = {"hardness": hardness, "prior": prior}
        losses += [
            lambda a, b, s, o=options: hard_nt_xent(a, b, 1 / s, **o),
            lambda a, b, s, o=options: hard_info_nce(a, b, s, **o),
            lambda a, b, s, o=options: hard_info_nce(a, b, s, groups=one_class, **o),
            lambda a, b, s, o=options: hard_info_nce(
                a, b, s, groups=one_class, ignore_groups=True, **o
            ),
        ]
    for loss in losses:
        value, gradients = _with_gradients(loss, first, second, scale)
        assert bool(torch.isfinite(value))
        assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)


def test_hard_negatives_count_for_more() -> None:
    image, text = _pairs()
    soft = hard_info_nce(image, text, _SCALE, hardness=0.1)
    hard = hard_info_nce(image, text, _SCALE, hardness=2.0)
    assert float(hard) > float(soft) > float(info_nce(image, text, _SCALE))


def _on_rank(rank: int, world_size: int) -> Any:
    image, text = _pairs(12)
    negative = _unit(12, 2, 5, seed=3)
    ids = torch.arange(12) // 2
    present = torch.rand(12, 2, generator=torch.Generator().manual_seed(1)) < 0.6
    others = torch.randint(0, 9, (12, 2), generator=torch.Generator().manual_seed(2))
    own = slice(rank * 12 // world_size, (rank + 1) * 12 // world_size)
    losses: list[Callable[..., torch.Tensor]] = [
        lambda i, t, n, s: hard_info_nce(i, t, s, 3, ids[own], hardness=0.7, prior=0.2),
        lambda i, t, n, s: hard_nt_xent(i, t, 1 / s, hardness=1.0, prior=0.1),
        lambda i, t, n, s: neg_clip(
            i, t, n, s, 3, ids[own], present=present[own], negative_groups=others[own]
        ),
    ]
    results = []
    for loss in losses:
        leaves = [
            one.clone().requires_grad_() for one in (image[own], text[own], negative[own], _SCALE)
        ]
        value = loss(*leaves)
        value.backward()  # type: ignore[no-untyped-call]
        gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
        results.append((float(value.detach()), [gradient.numpy() for gradient in gradients]))
    return results


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_give_the_loss_and_the_gradients_of_one(world_size: int) -> None:
    whole, shares = _on_rank(0, 1), run_ranks(_on_rank, world_size)
    for number, (value, gradients) in enumerate(whole):
        found = [share[number] for share in shares]
        np.testing.assert_allclose(np.mean([one[0] for one in found]), value, rtol=1e-12)
        for place, expected in enumerate(gradients):
            parts = [one[1][place] for one in found]
            # Averaged over ranks by DDP, hence so many times as large here.
            actual = np.mean(parts, axis=0) if place == 3 else np.concatenate(parts) / world_size
            np.testing.assert_allclose(actual, expected, atol=1e-13)


def test_what_does_not_fit_is_named() -> None:
    image, text = _pairs(4)
    with pytest.raises(ConfigError, match="hard_info_nce: hardness is -1; expected a number of 0"):
        hard_info_nce(image, text, _SCALE, hardness=-1)
    with pytest.raises(ConfigError, match=r"hard_nt_xent: prior is 1.0; expected a share"):
        hard_nt_xent(image, text, prior=1.0)
    with pytest.raises(ConfigError, match=r"hard_nt_xent: views \(4, 5\) and \(3, 5\)"):
        hard_nt_xent(image, text[:3])
    with pytest.raises(ConfigError, match=r"further texts \(4, 5\) for images \(4, 5\); expected"):
        neg_clip(image, text, text, _SCALE)
    with pytest.raises(ConfigError, match=r"present has shape \(4, 2\); expected \(4, 1\)"):
        neg_clip(image, text, text[:, None], _SCALE, present=torch.ones(4, 2))
    with pytest.raises(ConfigError, match="negative_groups means nothing without groups"):
        neg_clip(image, text, text[:, None], _SCALE, negative_groups=torch.ones(4, 1))
