"""SupCon against loops in float64, against pytorch-metric-learning, and on several ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pytorch_metric_learning.losses import SupConLoss
from torch.nn import functional as F  # noqa: N812

from clipsys.errors import ConfigError
from clipsys.training.losses import nt_xent, supcon
from tests.ranks import run_ranks


def naive_supcon(features: torch.Tensor, labels: torch.Tensor, temperature: Any, form: str) -> Any:
    """One anchor after the other."""
    rows = features.flatten(0, 1)
    of_row = labels.repeat_interleave(features.shape[1]).tolist()
    losses = []
    for anchor in range(len(rows)):
        others = [n for n in range(len(rows)) if n != anchor]
        positives = [n for n in others if of_row[n] == of_row[anchor]]
        if not positives:
            continue
        logit = rows @ rows[anchor] / temperature
        denominator = torch.logsumexp(logit[others], 0)
        if form == "out":
            losses.append(torch.stack([denominator - logit[n] for n in positives]).mean())
        else:
            share = torch.stack([(logit[n] - denominator).exp() for n in positives]).mean()
            losses.append(-share.log())
    return torch.stack(losses).mean() if losses else 0 * rows.sum()


def _features(samples: int = 9, views: int = 2, width: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(samples)
    features = torch.randn(samples, views, width, generator=generator, dtype=torch.float64)
    return F.normalize(features, dim=-1)


def _labels(samples: int = 9) -> torch.Tensor:
    return torch.tensor([0, 1, 1, 2, 0, 1, 7, 2, 1])[torch.arange(samples) % 9]


def _with_gradients(loss: Any, *tensors: torch.Tensor) -> tuple[Any, list[Any]]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    value = loss(*leaves)
    value.backward()
    return value.detach(), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("form", ["out", "in"])
@pytest.mark.parametrize("views", [1, 2, 3])
def test_supcon_and_its_gradients_are_those_of_a_loop(form: Any, views: int) -> None:
    features, labels = _features(views=views), _labels()
    temperature = torch.tensor(0.3, dtype=torch.float64)
    actual = _with_gradients(lambda z, t: supcon(z, labels, t, form), features, temperature)
    expected = _with_gradients(lambda z, t: naive_supcon(z, labels, t, form), features, temperature)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("form", ["out", "in"])
def test_tiles_change_nothing(form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = _features(40), _labels(40)
    whole = _with_gradients(lambda z: supcon(z, labels, 0.1, form), features)
    monkeypatch.setattr("clipsys.training.losses.supervised.auto_tile_size", lambda *_: 7)
    torch.testing.assert_close(
        _with_gradients(lambda z: supcon(z, labels, 0.1, form), features), whole, rtol=1e-12,
        atol=1e-14,
    )  # fmt: skip


@pytest.mark.parametrize("views", [1, 2])
def test_supcon_is_that_of_pytorch_metric_learning(views: int) -> None:
    features, labels = _features(views=views), _labels()
    theirs = SupConLoss(temperature=0.2)
    # Theirs normalises, so ours does here too: gradients are towards what is normalised.
    actual = _with_gradients(lambda z: supcon(F.normalize(z, dim=-1), labels, 0.2), 2 * features)
    expected = _with_gradients(
        lambda z: theirs(z.flatten(0, 1), labels.repeat_interleave(views)), 2 * features
    )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


def test_a_label_of_its_own_for_each_sample_is_nt_xent() -> None:
    features = _features(8)
    value = supcon(features, torch.arange(8), 0.1)
    torch.testing.assert_close(value, nt_xent(features[:, 0], features[:, 1], 0.1))


def test_anchors_without_a_positive_are_left_out_of_the_mean() -> None:
    """SupContrast 141: they gave NaN there, and count as zeros now."""
    """SupContrast 141: they gave NaN, and count as zeros now: its loss falls with their share."""
    features = _features(6, views=1)
    labels = torch.tensor([0, 0, 1, 2, 3, 4])
    pairs = torch.stack([naive_supcon(features, labels, 0.1, "out")])
    torch.testing.assert_close(supcon(features, labels, 0.1), pairs[0])
    assert float(supcon(features, torch.arange(6), 0.1)) == 0.0


_EQUAL = F.normalize(torch.ones(8, 2, 5), dim=-1)
_HARD_CASES = {
    "all features equal": (_EQUAL, torch.arange(8) // 2),
    "one class only": (_features(8).float(), torch.zeros(8, dtype=torch.int64)),
    "a class with one member and one view": (_features(8, views=1).float(), torch.arange(8) // 7),
    "unnormalised": (1e3 * torch.randn(8, 2, 5), torch.arange(8) // 2),
    "zeros": (torch.zeros(8, 2, 5), torch.arange(8) // 2),
    "a single row": (_features(1, views=1).float(), torch.zeros(1, dtype=torch.int64)),
    "every row is near to itself alone": (torch.eye(8)[:, None], torch.arange(8) // 2),
}


@pytest.mark.parametrize("form", ["out", "in"])
@pytest.mark.parametrize("case", _HARD_CASES)
def test_hard_inputs_at_a_low_temperature_stay_finite(case: str, form: Any) -> None:
    """SupContrast 50, 104 and 106: its code subtracts the maximum of rows that contain self."""
    features, labels = _HARD_CASES[case]
    value, (gradient,) = _with_gradients(lambda z: supcon(z, labels, 0.01, form), features)
    assert bool(torch.isfinite(value))
    assert bool(torch.isfinite(gradient).all())


def test_bfloat16_features_are_compared_in_float32() -> None:
    features, labels = _features().bfloat16(), _labels()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = supcon(features, labels, 0.1)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, supcon(features.double(), labels, 0.1).float())


def _on_rank(rank: int, world_size: int) -> list[tuple[float, list[np.ndarray]]]:
    features, labels = _features(12), _labels(12)
    rows = slice(rank * 12 // world_size, (rank + 1) * 12 // world_size)
    temperature = torch.tensor(0.2, dtype=torch.float64)
    found = []
    for form in ("out", "in"):
        value, gradients = _with_gradients(
            lambda z, t, form=form: supcon(z, labels[rows], t, form), features[rows], temperature
        )
        found.append((float(value), [gradient.numpy() for gradient in gradients]))
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_give_the_loss_and_the_gradient_of_one(world_size: int) -> None:
    alone, shares = _on_rank(0, 1), run_ranks(_on_rank, world_size)
    for form, (value, (of_features, of_temperature)) in enumerate(alone):
        parts = [share[form] for share in shares]
        np.testing.assert_allclose(np.mean([part[0] for part in parts]), value, rtol=1e-12)
        # Averaged over ranks by DDP.
        gradient = np.concatenate([part[1][0] for part in parts]) / world_size
        np.testing.assert_allclose(gradient, of_features, atol=1e-13)
        mean = np.mean([part[1][1] for part in parts])
        np.testing.assert_allclose(mean, of_temperature, rtol=1e-11)


def test_shapes_and_forms_that_do_not_fit_are_named() -> None:
    with pytest.raises(ConfigError, match=r"supcon: features \(9, 6\); expected \(B, V, D\)"):
        supcon(_features()[:, 0], _labels())
    with pytest.raises(ConfigError, match=r"supcon: labels \(3,\) for 9 samples; expected \(9,\)"):
        supcon(_features(), _labels()[:3])
    with pytest.raises(ConfigError, match="form is 'both'; expected out or in"):
        supcon(_features(), _labels(), form="both")  # type: ignore[arg-type]
