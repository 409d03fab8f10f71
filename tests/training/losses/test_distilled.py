"""CLIP-KD's terms against loops in float64, alone and on several ranks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from clipsys.errors import ConfigError
from clipsys.training.losses import (
    DistillationWeights,
    Pairs,
    distilled_pairs,
    feature_distance,
    info_nce,
    interactive_contrast,
    relational_divergence,
)
from tests.ranks import run_ranks

ROWS, WIDTH, TEACHER_WIDTH = 12, 6, 5
_TEACHER_SCALE = 9.0


def naive_feature(ours: Pairs, theirs: Pairs) -> Any:
    """The mean over all numbers of images, plus that of texts."""
    total = ours.image.new_zeros(())
    for mine, other in zip(ours, theirs, strict=True):
        for i in range(len(mine)):
            for d in range(mine.shape[1]):
                total = total + (mine[i, d] - other[i, d]) ** 2 / mine.numel()
    return total


def naive_relational(ours: Pairs, theirs: Pairs, scale: Any, their_scale: float) -> Any:
    """KL of each image's distribution over texts and of each text's over images, averaged."""
    total = ours.image.new_zeros(())
    count = len(ours.image)
    for query, key, their_query, their_key in (
        (ours.image, ours.text, theirs.image, theirs.text),
        (ours.text, ours.image, theirs.text, theirs.image),
    ):
        for i in range(count):
            mine = torch.stack([scale * (query[i] * key[j]).sum() for j in range(count)])
            other = [
                their_scale * float((their_query[i] * their_key[j]).sum()) for j in range(count)
            ]
            normaliser = math.log(sum(math.exp(one - max(other)) for one in other)) + max(other)
            for j in range(count):
                log_p = other[j] - normaliser
                log_q = mine[j] - mine.logsumexp(dim=0)
                total = total + math.exp(log_p) * (log_p - log_q) / (2 * count)
    return total


def naive_contrast(query: torch.Tensor, key: torch.Tensor, scale: Any, groups: torch.Tensor) -> Any:
    """Cross-entropy of each query over all keys, its target spread over its group's keys."""
    total = query.new_zeros(())
    for i in range(len(query)):
        logits = torch.stack([scale * (query[i] * one).sum() for one in key])
        own = [j for j in range(len(key)) if groups[j] == groups[i]]
        for j in own:
            total = total - (logits[j] - logits.logsumexp(dim=0)) / (len(own) * len(query))
    return total


def naive_distilled(
    ours: Pairs,
    theirs: Pairs,
    projected: Pairs,
    scale: Any,
    their_scale: float,
    groups: torch.Tensor,
    weights: DistillationWeights,
) -> Any:
    """The weighted sum of the four."""
    both = naive_contrast(ours.image, ours.text, scale, groups)
    both = both + naive_contrast(ours.text, ours.image, scale, groups)
    crossed = naive_contrast(projected.image, theirs.text, scale, groups)
    crossed = crossed + naive_contrast(projected.text, theirs.image, scale, groups)
    return (
        weights.contrastive * both / 2
        + weights.feature * naive_feature(projected, theirs)
        + weights.relational * naive_relational(ours, theirs, scale, their_scale)
        + weights.interactive * crossed / 2
    )


def _unit(seed: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(ROWS, width, generator=generator, dtype=torch.float64), dim=1)


def _leaves() -> dict[str, torch.Tensor]:
    """What gradients are taken of."""
    return {
        "image": _unit(1, WIDTH).requires_grad_(),
        "text": _unit(2, WIDTH).requires_grad_(),
        "projected image": _unit(3, TEACHER_WIDTH).requires_grad_(),
        "projected text": _unit(4, TEACHER_WIDTH).requires_grad_(),
        "scale": torch.tensor(7.0, dtype=torch.float64, requires_grad=True),
    }


_THEIRS = Pairs(_unit(5, TEACHER_WIDTH), F.normalize(_unit(5, TEACHER_WIDTH) + _unit(6, 5), dim=1))
_GROUPS = torch.tensor([0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 0, 9])
_WEIGHTS = DistillationWeights(0.7, 30.0, 1.3, 0.4)


def _call(name: str, leaves: dict[str, torch.Tensor], rows: slice, **options: Any) -> Any:
    ours = Pairs(leaves["image"][rows], leaves["text"][rows])
    projected = Pairs(leaves["projected image"][rows], leaves["projected text"][rows])
    theirs, scale = Pairs(*(one[rows] for one in _THEIRS)), leaves["scale"]
    groups = _GROUPS[rows]
    if name == "feature":
        return feature_distance(projected, theirs)
    if name == "relational":
        return relational_divergence(ours, theirs, scale, _TEACHER_SCALE, **options)
    if name == "interactive":
        return interactive_contrast(projected, theirs, scale, groups=groups, **options)
    return distilled_pairs(
        *(ours, theirs, scale, _TEACHER_SCALE, _WEIGHTS, projected, groups), **options
    )


def _naive(name: str, leaves: dict[str, torch.Tensor]) -> Any:
    ours = Pairs(leaves["image"], leaves["text"])
    projected = Pairs(leaves["projected image"], leaves["projected text"])
    scale = leaves["scale"]
    if name == "feature":
        return naive_feature(projected, _THEIRS)
    if name == "relational":
        return naive_relational(ours, _THEIRS, scale, _TEACHER_SCALE)
    if name == "interactive":
        crossed = naive_contrast(projected.image, _THEIRS.text, scale, _GROUPS)
        return (crossed + naive_contrast(projected.text, _THEIRS.image, scale, _GROUPS)) / 2
    return naive_distilled(ours, _THEIRS, projected, scale, _TEACHER_SCALE, _GROUPS, _WEIGHTS)


def _with_gradients(value: Any, leaves: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    value.backward()
    found = {
        name: np.zeros(leaf.shape) if leaf.grad is None else leaf.grad.numpy().copy()
        for name, leaf in leaves.items()
    }
    return {**found, "value": value.detach().numpy()}


_NAMES = ("feature", "relational", "interactive", "all")


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("tile_size", [None, 1, 5])
def test_value_and_gradients_are_those_of_a_loop(name: str, tile_size: int | None) -> None:
    options = {} if name == "feature" else {"tile_size": tile_size}
    leaves, others = _leaves(), _leaves()
    actual = _with_gradients(_call(name, leaves, slice(None), **options), leaves)
    expected = _with_gradients(_naive(name, others), others)
    for of, gradient in expected.items():
        np.testing.assert_allclose(actual[of], gradient, rtol=1e-10, atol=1e-12, err_msg=of)


def _on_rank(rank: int, world_size: int) -> dict[str, dict[str, np.ndarray]]:
    found = {}
    share = ROWS // world_size
    for name in _NAMES:
        leaves = _leaves()
        value = _call(name, leaves, slice(rank * share, (rank + 1) * share))
        found[name] = _with_gradients(value, leaves)
    return found


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_together_have_the_loss_and_gradients_of_one_process(world_size: int) -> None:
    shares = run_ranks(_on_rank, world_size)
    for name in _NAMES:
        leaves = _leaves()
        expected = _with_gradients(_naive(name, leaves), leaves)
        for of, gradient in expected.items():
            mean = sum(one[name][of] for one in shares) / world_size
            np.testing.assert_allclose(mean, gradient, rtol=1e-10, atol=1e-12, err_msg=of)


def test_without_the_teachers_terms_it_is_info_nce() -> None:
    leaves = _leaves()
    alone = DistillationWeights(1.0, 0.0, 0.0, 0.0)
    ours = Pairs(leaves["image"], leaves["text"])
    value = distilled_pairs(ours, _THEIRS, leaves["scale"], 1.0, alone, groups=_GROUPS)
    expected = info_nce(*ours, leaves["scale"], groups=_GROUPS)
    torch.testing.assert_close(value, expected)


def test_a_student_that_is_its_teacher_has_no_distance_and_no_divergence() -> None:
    ours = Pairs(_unit(1, WIDTH).requires_grad_(), _unit(2, WIDTH).requires_grad_())
    scale = torch.tensor(_TEACHER_SCALE, dtype=torch.float64, requires_grad=True)
    value = feature_distance(ours, ours) + relational_divergence(ours, ours, scale, scale)
    value.backward()  # type: ignore[no-untyped-call]
    assert float(value.detach()) == pytest.approx(0, abs=1e-15)
    for leaf in (*ours, scale):
        assert leaf.grad is not None and float(leaf.grad.abs().max()) < 1e-14


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("kind", ["equal", "huge", "opposite"])
def test_extreme_batches_stay_finite(rows: int, kind: str) -> None:
    unit = F.normalize(torch.randn(rows, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    image, text = {
        "equal": (unit[:1].expand(rows, 4), unit[:1].expand(rows, 4)),
        "huge": (1e4 * unit, 1e4 * unit),
        "opposite": (unit, -unit),
    }[kind]
    leaves = [one.clone().requires_grad_() for one in (image, text)]
    scale = torch.tensor(100.0, requires_grad=True)
    value = distilled_pairs(Pairs(*leaves), Pairs(unit, unit), scale, 100.0)
    value.backward()  # type: ignore[no-untyped-call]
    assert bool(torch.isfinite(value)) and value.dtype == torch.float32
    for leaf in (*leaves, scale):
        assert leaf.grad is not None and bool(torch.isfinite(leaf.grad).all())


def test_the_teacher_gets_no_gradient_and_autocast_changes_nothing() -> None:
    theirs = Pairs(*(one.float().requires_grad_() for one in _THEIRS))
    ours = Pairs(*(_unit(seed, TEACHER_WIDTH).float().requires_grad_() for seed in (1, 2)))
    scale = torch.tensor(50.0)
    value = distilled_pairs(ours, theirs, scale, 50.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same = distilled_pairs(ours, theirs, scale, 50.0)
    torch.testing.assert_close(same, value, rtol=1e-6, atol=0)
    value.backward()  # type: ignore[no-untyped-call]
    assert all(one.grad is None for one in theirs)


def test_shapes_that_do_not_fit_are_refused() -> None:
    ours, wide = Pairs(_unit(1, 4), _unit(2, 4)), Pairs(_unit(3, 5), _unit(4, 5))
    scale = torch.tensor(1.0)
    with pytest.raises(ConfigError, match="the student has width 4 and the teacher 5; project"):
        distilled_pairs(ours, wide, scale, 1.0)
    with pytest.raises(ConfigError, match="expected \\(B, D\\) twice and \\(B, E\\) twice"):
        relational_divergence(ours, Pairs(wide.image[:3], wide.text[:3]), scale, 1.0)
    with pytest.raises(ConfigError, match="every weight is 0"):
        distilled_pairs(ours, wide, scale, 1.0, DistillationWeights(0, 0, 0, 0))
