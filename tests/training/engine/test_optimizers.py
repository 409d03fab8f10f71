"""Parameter groups, and optimizers on real ranks against one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from clipsys.errors import ConfigError
from clipsys.models.open_clip_models import build_model
from clipsys.training.engine.deepspeed_engine import Engine
from clipsys.training.engine.optimizers import (
    OptimizerConfig,
    build_optimizer,
    parameter_groups,
)
from clipsys.training.losses import info_nce
from clipsys.training.model.layers import tower_depths
from clipsys.training.model.outputs import Inputs, Sizes
from clipsys.training.model.trained import TrainedModel
from clipsys.training.objectives.infonce import InfoNCE, InfoNCEConfig
from clipsys.training.objectives.protocol import Labels
from clipsys.training.recipe import EngineConfig, Recipe
from tests.conftest import TINY_MODEL
from tests.ranks import run_ranks

_OBJECTIVE = InfoNCE(InfoNCEConfig(positives="pair"))


def _clip(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_model({**TINY_MODEL, **changes}, for_training=True).model


_DEEP_VIT = {"vision_cfg": {**TINY_MODEL["vision_cfg"], "layers": 3}}
_RESNET = {
    "vision_cfg": {"image_size": 32, "layers": [2, 1, 1, 1], "width": 8, "head_width": 32},
}
_TIMM_VIT = {
    "vision_cfg": {
        "image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token",
        "timm_proj": "linear",
    },
}  # fmt: skip
_CUSTOM_TEXT = {"text_cfg": {**TINY_MODEL["text_cfg"], "proj_bias": True}, "custom_text": True}


def _group_of(model: nn.Module, config: OptimizerConfig) -> dict[str, dict[str, Any]]:
    """The group of each parameter, by name; each must be in one group only."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, dict[str, Any]] = {}
    for group in parameter_groups(model, config):
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = group
    return found


@pytest.mark.parametrize("changes", [{}, _RESNET, _TIMM_VIT, _CUSTOM_TEXT])
def test_every_parameter_is_in_one_group_and_only_matrices_decay(changes: dict[str, Any]) -> None:
    model = _clip(**changes)
    group_of = _group_of(model, OptimizerConfig(weight_decay=0.2))
    assert set(group_of) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        spared = parameter.ndim < 2 or any(
            part in name for part in ("positional_embedding", "pos_embed", "cls_token")
        )
        assert group_of[name]["weight_decay"] == (0.0 if spared else 0.2), name


def test_the_scale_has_a_group_of_its_own() -> None:
    model = build_model(TINY_MODEL, for_training=True).model
    model.logit_bias = nn.Parameter(torch.zeros(1))
    config = OptimizerConfig(lr=1e-3, logit_scale_lr_factor=0.1, layer_decay=0.5)
    group = _group_of(model, config)["logit_scale"]
    assert [id(one) for one in group["params"]] == [id(model.logit_scale), id(model.logit_bias)]
    assert (group["lr_factor"], group["weight_decay"]) == (0.1, 0.0)
    optimizer = build_optimizer(parameter_groups(model, config), config)
    rates = {id(one): g["lr"] for g in optimizer.param_groups for one in g["params"]}
    assert rates[id(model.logit_scale)] == pytest.approx(1e-4)


def test_the_groups_of_a_wrapped_model_are_those_of_the_model() -> None:
    parts = build_model(TINY_MODEL, for_training=True)
    config = OptimizerConfig(layer_decay=0.5)
    wrapped = parameter_groups(TrainedModel(parts.model, _OBJECTIVE, sizes=Sizes(32)), config)
    plain = parameter_groups(parts.model, config)
    for one, other in zip(wrapped, plain, strict=True):
        assert [id(p) for p in one["params"]] == [id(p) for p in other["params"]]
        assert one["lr_factor"] == other["lr_factor"]


def test_frozen_parameters_are_in_no_group() -> None:
    model = _clip()
    model.visual.requires_grad_(False)
    group_of = _group_of(model, OptimizerConfig(layer_decay=0.5))
    assert set(group_of) == {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            _DEEP_VIT,
            {
                "visual.proj": 0,
                "visual.ln_post.weight": 0,
                "visual.transformer.resblocks.2.mlp.c_fc.weight": 1,
                "visual.transformer.resblocks.0.ln_1.bias": 3,
                "visual.conv1.weight": 4,
                "visual.class_embedding": 4,
                "visual.ln_pre.weight": 4,
                "text_projection": 0,
                "ln_final.weight": 0,
                "transformer.resblocks.0.attn.in_proj_weight": 1,
                "token_embedding.weight": 2,
                "positional_embedding": 2,
            },
        ),
        (
            _RESNET,
            {
                "visual.attnpool.c_proj.weight": 0,
                "visual.layer4.0.conv1.weight": 1,
                "visual.layer1.1.bn1.weight": 4,
                "visual.layer1.0.conv1.weight": 5,
                "visual.conv3.weight": 6,
                "visual.bn1.weight": 6,
            },
        ),
        (
            _TIMM_VIT,
            {
                "visual.head.proj.weight": 0,
                "visual.trunk.norm.weight": 1,  # timm counts it to the last block
                "visual.trunk.blocks.5.attn.qkv.weight": 1,
                "visual.trunk.blocks.0.attn.qkv.weight": 6,
                "visual.trunk.patch_embed.proj.weight": 7,
                "visual.trunk.cls_token": 7,
            },
        ),
        (
            _CUSTOM_TEXT,
            {
                "text.text_projection.bias": 0,
                "text.transformer.resblocks.0.attn.in_proj_weight": 1,
                "text.token_embedding.weight": 2,
            },
        ),
    ],
)
def test_depth_is_counted_from_the_top_of_each_tower(
    changes: dict[str, Any], expected: dict[str, int]
) -> None:
    model = _clip(**changes)
    depths = {
        **tower_depths(model, "image", setting="x"),
        **tower_depths(model, "text", setting="x"),
    }
    assert {name: depths[name] for name in expected} == expected
    assert set(depths) == {n for n, _ in model.named_parameters() if n != "logit_scale"}
    group_of = _group_of(model, OptimizerConfig(layer_decay=0.5))
    for name, depth in expected.items():
        assert group_of[name]["lr_factor"] == 0.5**depth


@pytest.mark.parametrize(
    ("tower", "message"),
    [("visual", r"image tower \(Sequential around Sequential\)"), ("text", r"text tower \(Seq")],
)
def test_a_tower_of_unknown_layers_is_named(tower: str, message: str) -> None:
    model = _clip(**_CUSTOM_TEXT)
    setattr(model, tower, nn.Sequential(nn.Linear(2, 2)))
    assert parameter_groups(model, OptimizerConfig())
    with pytest.raises(ConfigError, match=message) as caught:
        parameter_groups(model, OptimizerConfig(layer_decay=0.9))
    assert "set optimizer.layer_decay to null" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adamw", "momentum": 0.5}, "momentum does nothing for adamw"),
        ({"name": "sgd", "betas": (0.9, 0.999)}, "betas does nothing for sgd"),
        ({"name": "muon", "trust_coefficient": 0.1}, "trust_coefficient does nothing for muon"),
        ({"name": "sgd", "eps": 1e-8}, "eps does nothing for sgd"),
        ({"name": "lars", "eps": 1e-8}, "eps does nothing for lars"),
        ({"name": "sgd", "trust_coefficient": 0.1}, "trust_coefficient does nothing for sgd"),
        ({"layer_decay": 0.0}, "greater than 0"),
        ({"layer_decay": 1.1}, "less than or equal to 1"),
    ],
)
def test_a_setting_without_effect_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        OptimizerConfig(**settings)


def _naive_step(
    name: str, weight: torch.Tensor, gradient: torch.Tensor, config: OptimizerConfig, decays: bool
) -> torch.Tensor:
    """The first step of each optimizer, from its paper."""
    decay = config.weight_decay if decays else 0.0
    if name == "sgd":
        return weight - config.lr * (gradient + decay * weight)
    if name == "lars":
        return weight - _naive_lars_update(weight, gradient, config, decay)
    # Bias correction makes the moments of the first step the gradient and its square.
    adam = gradient / (gradient.abs() + config.eps)
    if name == "adamw":
        return weight - config.lr * (adam + decay * weight)
    update = adam + decay * weight
    ratio = weight.norm() / update.norm() if decays else 1.0
    return weight - config.lr * ratio * update


def _naive_lars_update(
    weight: torch.Tensor, gradient: torch.Tensor, config: OptimizerConfig, decay: float
) -> torch.Tensor:
    """Equations 4 to 6 of You et al. 2017, but for momentum; vectors are left out, as in SimCLR."""
    decayed = gradient + decay * weight
    if weight.ndim < 2 or not weight.norm() or not gradient.norm():
        return config.lr * decayed
    local = weight.norm() / (gradient.norm() + decay * weight.norm())
    return config.lr * config.trust_coefficient * local * decayed


@pytest.mark.parametrize("name", ["adamw", "lamb", "lars", "sgd"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_first_step_is_that_of_the_paper(name: str, weight_decay: float) -> None:
    config = OptimizerConfig(name=name, lr=0.01, weight_decay=weight_decay)
    model = _clip().double()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    group_of = _group_of(model, config)
    optimizer = build_optimizer(parameter_groups(model, config), config)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for parameter_name, parameter in model.named_parameters():
        expected = _naive_step(
            name, before[parameter_name], parameter.grad, config, group_of[parameter_name]["decays"]
        )
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-9, atol=1e-12)


def test_lars_keeps_momentum_of_its_updates_and_adapts_what_does_not_decay() -> None:
    config = OptimizerConfig(name="lars", lr=0.5, weight_decay=0.1, trust_coefficient=0.02)
    model = _WithPrototypes().double()
    names = dict(model.named_parameters())
    weights = {name: one.detach().clone() for name, one in names.items()}
    velocities = {name: torch.zeros_like(one) for name, one in weights.items()}
    optimizer = build_optimizer(parameter_groups(model, config), config)
    for _ in range(3):
        for name, parameter in names.items():
            gradient = torch.randn_like(parameter)
            parameter.grad = gradient.clone()
            decay = 0.1 if name == "linear.weight" else 0.0
            update = _naive_lars_update(weights[name], gradient, config, decay)
            velocities[name] = 0.9 * velocities[name] + update
            weights[name] = weights[name] - velocities[name]
        optimizer.step()
    for name, parameter in names.items():
        torch.testing.assert_close(parameter.detach(), weights[name], rtol=1e-7, atol=1e-12)


#: https://leloykun.github.io/ponder/muon-opt-coeffs, for five steps.
_QUINTIC = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def _naive_orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The iteration of Jordan et al. 2024, in float64."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm()
    for a, b, c in _QUINTIC:
        square = wide @ wide.T
        wide = a * wide + (b * square + c * square @ square) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


def test_muon_moves_matrices_and_kernels_by_their_orthogonal_momentum() -> None:
    config = OptimizerConfig(name="muon", lr=0.01, weight_decay=0.1, momentum=0.5)
    kernel, table = nn.Conv2d(4, 8, 3, bias=False), nn.Embedding(20, 4)
    model = nn.Sequential(kernel, table).double()
    names = {"kernel": kernel.weight, "table": table.weight}
    before = {name: one.detach().clone() for name, one in names.items()}
    optimizer = build_optimizer(parameter_groups(model, config), config)
    gradients = {}
    for name, one in names.items():
        one.grad = torch.randn_like(one)
        gradients[name] = one.grad.clone()
    optimizer.step()
    # The first momentum is a part of the gradient, which the iteration normalises away.
    update = _naive_orthogonal(gradients["kernel"].reshape(8, -1)).reshape(8, 4, 3, 3)
    expected = before["kernel"] * (1 - 0.01 * 0.1) - 0.01 * 0.2 * 36**0.5 * update
    # It computes in bf16: an error of 1 % of the largest entry of a step.
    torch.testing.assert_close(kernel.weight.detach(), expected, rtol=0, atol=1e-4)
    # An embedding's rows step by their signs, as with AdamW, not as one matrix.
    moved = (table.weight.detach() - before["table"] * (1 - 0.01 * 0.1)).abs()
    assert float(moved.std() / moved.mean()) < 1e-3


def test_muon_leaves_embeddings_and_what_does_not_decay_to_adamw() -> None:
    model = _clip(**_RESNET)
    group_of = _group_of(model, OptimizerConfig(name="muon"))
    orthogonal = {name for name, group in group_of.items() if group["orthogonal"]}
    assert {"text_projection", "visual.layer1.0.conv2.weight"} <= orthogonal
    assert "transformer.resblocks.0.mlp.c_fc.weight" in orthogonal
    assert orthogonal == {
        name for name, group in group_of.items() if group["decays"] and "token_emb" not in name
    }


class _WithPrototypes(nn.Module):
    """A matrix that does not decay, beside one that does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(5, 4)
        self.prototypes = nn.Parameter(torch.randn(6, 4))

    def no_weight_decay(self) -> set[str]:
        return {"prototypes"}


_BATCH, _STEPS = 8, 4


def _batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    tokens_BL = torch.randint(1, 1000, (_BATCH, 16), generator=generator)
    tokens_BL[:, 6] = 49407
    tokens_BL[:, 7:] = 0
    return torch.randn(_BATCH, 3, 32, 32, generator=generator), tokens_BL


def _config(name: str) -> OptimizerConfig:
    # eps stands far above rounding: some gradients are exactly zero but for it.
    own = {"sgd": {}, "lars": {"trust_coefficient": 1.0}}.get(name, {"eps": 1e-4})
    return OptimizerConfig(name=name, lr=1e-2, logit_scale_lr_factor=0.5, layer_decay=0.7, **own)


def _trained_model() -> TrainedModel:
    torch.manual_seed(0)
    return TrainedModel(
        build_model(TINY_MODEL, for_training=True).model, _OBJECTIVE, sizes=Sizes(32)
    )


Case = tuple[str, int]  # optimizer, ZeRO stage


def _train_on_ranks(rank: int, world_size: int, cases: list[Case]) -> list[dict[str, Any]]:
    return [_train_on_rank(rank, _BATCH // world_size, name, stage) for name, stage in cases]


def _train_on_rank(rank: int, local: int, name: str, stage: int) -> dict[str, Any]:
    engine = Engine(
        _trained_model(),
        config=EngineConfig(zero_stage=stage, gradient_clipping=0.0),
        optimizer=_config(name),
        local_batch_size=local,
        device=torch.device("cpu"),
    )
    labels = Labels(torch.arange(rank * local, (rank + 1) * local), torch.arange(local))
    for step in range(_STEPS):
        own = [part[rank * local : (rank + 1) * local] for part in _batch(step)]
        engine.accumulate(
            [lambda own=own: Inputs((own[0],), (own[1],))],
            lambda outputs, targets, state: _OBJECTIVE.loss(outputs, targets, labels, state),
        )
        engine.update(1.0 / (1 + step))
    return {key: tensor.numpy() for key, tensor in engine.state_dict().items()}


def _train_alone(name: str) -> dict[str, torch.Tensor]:
    model, config = _trained_model(), _config(name)
    optimizer = build_optimizer(parameter_groups(model, config), config)
    for step in range(_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * group["lr_factor"] / (1 + step)
        optimizer.zero_grad()
        image_BCHW, tokens_BL = _batch(step)
        rows, shared = model(Inputs((image_BCHW,), (tokens_BL,)))
        info_nce(rows["image"], rows["text"], shared["logit_scale"]).backward()
        optimizer.step()
    return dict(model.clip.state_dict())


def _largest_differences(cases: list[Case]) -> dict[Case, float]:
    """Between two ranks and one process, over all weights. One start of processes serves all."""
    largest = dict.fromkeys(cases, 0.0)
    for states in run_ranks(_train_on_ranks, 2, cases):
        for case, state in zip(cases, states, strict=True):
            expected = _train_alone(case[0])
            for key, actual in state.items():
                difference = float((torch.as_tensor(actual) - expected[key]).abs().max())
                largest[case] = max(largest[case], difference)
    return largest


_WHOLE = ("lamb", "lars", "muon")
_EXACT: list[Case] = [("lamb", 0), ("lars", 0), ("muon", 0), ("sgd", 1), ("adamw", 2)]
_ALL_EXACT: list[Case] = [
    *((name, 0) for name in _WHOLE),
    *((name, stage) for name in ("sgd", "adamw") for stage in range(4)),
]


@pytest.mark.parametrize(
    ("exact", "other"),
    [
        (_EXACT, [("lamb", 1), ("lars", 1), ("muon", 1)]),
        pytest.param(
            _ALL_EXACT, [(n, z) for n in _WHOLE for z in (1, 2, 3)], marks=pytest.mark.slow
        ),
    ],
)
def test_two_ranks_step_like_one_process_except_those_of_whole_tensors_under_zero(
    exact: list[Case], other: list[Case]
) -> None:
    largest = _largest_differences(exact + other)
    # Muon computes in bf16, where a last digit is 0.4 % of a number.
    bounds = {case: 2e-3 if case[0] == "muon" else 1e-5 for case in exact}
    assert all(largest[case] < bounds[case] for case in exact), largest
    # Why the recipe refuses these: the weights come out otherwise, and not by rounding.
    assert all(largest[case] > 2e-3 for case in other), largest


@pytest.mark.parametrize(("name", "other"), [("lamb", "adamw"), ("lars", "sgd"), ("muon", "adamw")])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_needs_whole_tensors_is_refused_under_zero(stage: int, name: str, other: str) -> None:
    sections = {"data": {"train": "x", "batch_size": 8}, "optimizer": {"name": name}}
    message = f"zero_stage is {stage}, which flattens .*_stage 0 or optimizer.name {other}"
    with pytest.raises(ValidationError, match=message):
        Recipe(**sections, engine={"zero_stage": stage})
    assert Recipe(**sections, engine={"zero_stage": 0}).optimizer.needs_whole_tensors


def test_no_decay_does_not_turn_lamb_into_adam() -> None:
    weight = nn.Parameter(torch.full((2, 2), 3.0))
    groups = [{"params": [weight], "weight_decay": 0.0, "lr_factor": 1.0, "adapts": True}]
    optimizer = build_optimizer(groups, OptimizerConfig(name="lamb", lr=0.1, weight_decay=0.0))
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    # Trust ratio: a norm of 6 over an update's of 2.
    assert float(weight.detach()[0, 0]) == pytest.approx(3.0 - 0.1 * 3.0, abs=1e-5)
