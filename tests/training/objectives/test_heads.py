"""Heads beside the model: weight decay, rates, freezing, averages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from clipsys.models.open_clip_models import build_model
from clipsys.training.engine.deepspeed_engine import Engine
from clipsys.training.engine.ema import WeightAverage
from clipsys.training.engine.optimizers import OptimizerConfig, parameter_groups
from clipsys.training.model.initial import freeze_unused
from clipsys.training.model.outputs import Inputs, Outputs, Sizes
from clipsys.training.model.trained import MOMENTUM_PREFIX, TrainedModel
from clipsys.training.objectives.moco import MoCo, MoCoConfig
from clipsys.training.objectives.protocol import Labels
from clipsys.training.objectives.simclr import SimCLR, SimCLRConfig
from clipsys.training.recipe import EngineConfig
from tests.conftest import TINY_MODEL
from tests.ranks import run_ranks


class _Prototypes(nn.Module):
    """What SwAV is to have: directions, which do not decay."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, width))

    def no_weight_decay(self) -> set[str]:
        return {"weight"}


class _WithPrototypes(SimCLR):
    def heads(self, sizes: Sizes) -> nn.ModuleDict:
        heads = super().heads(sizes)
        heads["prototypes"] = _Prototypes(8)
        return heads

    def forward(self, towers: Any, inputs: Inputs) -> Outputs:
        rows, shared = super().forward(towers, inputs)
        return Outputs(rows, {**shared, "prototypes": towers.heads["prototypes"].weight})

    def loss(self, outputs: Outputs, *rest: Any) -> Any:
        value, state = super().loss(outputs, *rest)
        scores = outputs.rows["first"] @ outputs.shared["prototypes"].T
        return value + scores.square().mean(), state


def _model(objective: Any, **changes: Any) -> TrainedModel:
    torch.manual_seed(0)
    clip = build_model({**TINY_MODEL, **changes}, for_training=True).model
    freeze_unused(clip, image=True, text=False, temperature=False)
    return TrainedModel(clip, objective, sizes=Sizes(32))


_SIMCLR = SimCLRConfig(head_width=8, learn_temperature=True)


def test_heads_are_trained_and_only_their_matrices_decay() -> None:
    model = _model(_WithPrototypes(_SIMCLR))
    config = OptimizerConfig(weight_decay=0.2, layer_decay=0.5, logit_scale_lr_factor=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(parameter)]: (group["weight_decay"], group["lr_factor"])
        for group in parameter_groups(model, config)
        for parameter in group["params"]
    }
    assert set(found) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert found["heads.projection.0.weight"] == (0.2, 1.0)
    assert found["heads.projection.0.bias"] == (0.0, 1.0)
    assert found["heads.prototypes.weight"] == (0.0, 1.0)
    assert found["heads.temperature.log_scale"] == (0.0, 0.1)


def test_momentum_towers_are_frozen_and_in_no_group() -> None:
    model = _model(MoCo(MoCoConfig(head_width=8, queue_size=4))).train()
    assert model.momentum is not None
    own = dict(model.momentum.named_parameters())
    assert {name for name in own if name.startswith("clip.")} == {
        name for name, _ in model.named_parameters() if name.startswith("clip.visual.")
    }
    assert not any(parameter.requires_grad for parameter in own.values())
    assert not any(module.training for module in model.momentum.modules())
    grouped = {id(p) for g in parameter_groups(model, OptimizerConfig()) for p in g["params"]}
    assert not grouped & {id(parameter) for parameter in own.values()}


def test_averages_take_heads_in_and_leave_momentum_towers_out() -> None:
    model = _model(MoCo(MoCoConfig(head_width=8, queue_size=4)))
    average = WeightAverage(model, 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0
    average.update(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with average.swapped(model):
        for name, parameter in model.named_parameters():
            same = torch.equal(parameter, before[name])
            assert same == name.startswith(MOMENTUM_PREFIX), name


def _steps(rank: int, world_size: int, cases: list[tuple[int, bool]]) -> list[set[str]]:
    """The heads' parameters that two steps moved, for each ZeRO stage and frozen or not."""
    found = []
    for stage, is_frozen in cases:
        objective: Any = _WithPrototypes(_SIMCLR)
        model = _model(objective)
        model.heads["projection"].requires_grad_(not is_frozen)
        engine = Engine(
            model,
            config=EngineConfig(zero_stage=stage),
            optimizer=OptimizerConfig(lr=0.01, weight_decay=0.5),
            local_batch_size=4,
            device=torch.device("cpu"),
        )
        engine.train()
        assert engine.module.heads["projection"].training != is_frozen
        before = engine.heads_state_dict()
        labels = Labels(torch.arange(4), torch.arange(4))
        for step in range(2):
            generator = torch.Generator().manual_seed(2 * step + rank)
            views = torch.randn(2, 4, 3, 32, 32, generator=generator)
            inputs = [lambda part=part: Inputs(part.unbind()) for part in views.split(2, dim=1)]
            engine.accumulate(
                inputs,
                lambda outputs, targets, state: objective.loss(outputs, targets, labels, state),  # noqa: B023
            )
            engine.update(1.0)
        after = engine.heads_state_dict()
        found.append({name for name in before if not torch.equal(before[name], after[name])})
    return found


@pytest.mark.parametrize("stages", [(1, 3), pytest.param((0, 2), marks=pytest.mark.slow)])
def test_heads_freeze_and_thaw_like_towers(stages: tuple[int, ...]) -> None:
    cases = [(stage, is_frozen) for stage in stages for is_frozen in (True, False)]
    rest = {"prototypes.weight", "temperature.log_scale"}
    projection = {f"projection.{number}.{kind}" for number in (0, 2) for kind in ("weight", "bias")}
    for moved in run_ranks(_steps, 2, cases):
        assert moved == [rest, rest | projection] * len(stages)


def _statistics(rank: int, world_size: int) -> dict[str, tuple[Any, Any]]:
    objective = MoCo(MoCoConfig(head_width=8, queue_size=4, momentum=0.9))
    model = _model(
        objective, vision_cfg={"image_size": 32, "layers": [1] * 4, "width": 8, "head_width": 32}
    )
    engine = Engine(
        model,
        config=EngineConfig(zero_stage=1),
        optimizer=OptimizerConfig(lr=0.01),
        local_batch_size=4,
        device=torch.device("cpu"),
        momentum=objective.momentum,
        state=objective.initial_state(Sizes(32, 8), torch.Generator().manual_seed(0)),
    )
    engine.train()
    momentum = engine.module.momentum
    assert momentum is not None
    # Statistics of the batch, as in MoCo; anything else rests.
    assert {type(module) for module in momentum.modules() if module.training} == {nn.BatchNorm2d}
    views = torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(rank))
    labels = Labels(torch.arange(4), torch.arange(4))
    engine.accumulate(
        [lambda: Inputs(views.unbind())],
        lambda outputs, targets, state: objective.loss(outputs, targets, labels, state),
    )
    engine.update(1.0)
    buffers = dict(engine.module.named_buffers())
    return {
        name: (buffers[name.removeprefix(MOMENTUM_PREFIX)].numpy(), copy.numpy())
        for name, copy in buffers.items()
        if name.startswith(MOMENTUM_PREFIX) and "running_" in name
    }


def test_momentum_towers_have_the_batch_statistics_of_all_ranks() -> None:
    first, second = run_ranks(_statistics, 2)
    assert len(first) > 10
    for name, (trained, copied) in first.items():
        assert (trained == copied).all() and (copied == second[name][1]).all(), name
    # Each rank saw other images; the mean has left its beginning.
    assert any(abs(copied).max() > 0 for _, copied in first.values())
