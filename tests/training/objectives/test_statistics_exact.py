"""Objectives on statistics of the batch, and batch norm in heads, against one float64 process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from clipsys.training.model.outputs import State
from clipsys.training.objectives.barlow_twins import BarlowTwinsConfig
from clipsys.training.objectives.moco import MoCoConfig
from clipsys.training.objectives.simclr import SimCLRConfig
from clipsys.training.objectives.vicreg import VICRegConfig
from tests.training.losses.test_redundancy import naive_barlow_twins, naive_vicreg
from tests.training.objectives.exact import (
    HEAD,
    Case,
    Seen,
    Subject,
    all_cases,
    check_exact,
    check_resume,
    few_cases,
)
from tests.training.objectives.test_two_views_exact import naive_moco, naive_nt_xent


def _projected(seen: Seen, views: Any, *, slow: bool = False) -> list[torch.Tensor]:
    """Projections of views that pass together, batch norm written out with torch's own."""
    clip, heads = (seen.slow_clip, seen.slow_heads) if slow else (seen.clip, seen.heads)
    features = clip.visual(torch.cat(views))
    for layer in heads["projection"]:
        if isinstance(layer, nn.BatchNorm1d):
            features = F.batch_norm(
                features, layer.running_mean, layer.running_var, layer.weight, layer.bias,
                training=True,
            )  # fmt: skip
            layer.num_batches_tracked += 1  # type: ignore[operator]
        else:
            features = layer(features)
    return list(features.chunk(len(views)))


def _barlow_twins(seen: Seen) -> tuple[torch.Tensor, State]:
    first, second = _projected(seen, seen.inputs.views)
    return naive_barlow_twins(first, second, seen.settings.off_diagonal), seen.state


def _vicreg(seen: Seen) -> tuple[torch.Tensor, State]:
    one = seen.settings
    weights = one.invariance, one.variance, one.covariance
    return naive_vicreg(*_projected(seen, seen.inputs.views), *weights), seen.state


def _simclr(seen: Seen) -> tuple[torch.Tensor, State]:
    first, second = (F.normalize(z, dim=-1) for z in _projected(seen, seen.inputs.views))
    return naive_nt_xent(first, second, seen.temperature()), seen.state


def _moco(seen: Seen) -> tuple[torch.Tensor, State]:
    (query,) = (F.normalize(z, dim=-1) for z in _projected(seen, seen.inputs.views[:1]))
    with torch.no_grad():
        (key,) = _projected(seen, seen.inputs.views[1:], slow=True)
    key, queue = F.normalize(key, dim=-1), seen.state["queue"]
    # The momentum copy takes the running statistics of the trained head.
    for copy, trained in zip(seen.slow_heads.buffers(), seen.heads.buffers(), strict=True):
        copy.copy_(trained)
    loss = naive_moco(query, key, queue, seen.temperature())
    return loss, {"queue": torch.cat([queue, key])[-len(queue) :]}


#: Large deviations, as trained features have them: the squares of small ones are rounding.
_WIDE: dict[str, Any] = {"head_hidden": 24, "head_width": 6}
_CACHED = {
    "barlow twins": Subject(BarlowTwinsConfig(**_WIDE, head_norm="none"), _barlow_twins),
    "vicreg": Subject(VICRegConfig(**_WIDE, head_norm="none", head_layers=2), _vicreg),
}
_WHOLE = {
    "barlow twins, batch norm": Subject(BarlowTwinsConfig(**_WIDE), _barlow_twins),
    "vicreg, batch norm": Subject(VICRegConfig(**_WIDE), _vicreg),
    "simclr, batch norm": Subject(SimCLRConfig(**HEAD, head_norm="batch"), _simclr),
    "moco, batch norm": Subject(
        MoCoConfig(**HEAD, head_norm="batch", momentum=0.7, queue_size=30), _moco
    ),
}
_ALL = _CACHED | _WHOLE


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_split_is_exact(world_size: int) -> None:
    cases = few_cases(list(_CACHED)) + few_cases(list(_WHOLE), cached=False)
    check_exact(_ALL, cases if world_size == 2 else cases[::5], world_size)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_whole_matrix_is_exact(world_size: int) -> None:
    cases = all_cases(list(_CACHED)) + all_cases(list(_WHOLE), cached=False)
    check_exact(_ALL, cases, world_size)


@pytest.mark.slow
def test_running_statistics_resume_bit_for_bit(tmp_path: Any) -> None:
    cases = [Case("moco, batch norm", stage) for stage in range(4)]
    check_resume(_ALL, cases, tmp_path)
