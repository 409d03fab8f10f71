"""The model that a run begins with: made or loaded, with its temperature and its locked towers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from clipsys.errors import ConfigError, TrainingError
from clipsys.models import ModelParts, architecture_config, build_model, load_model
from clipsys.training.layers import Tower, tower_depths
from clipsys.training.recipe import ModelConfig

#: Where Zhai et al. 2023 (section 3.2) start the sigmoid loss: a bias of -10, since nearly all
#: pairs are negatives, and a scale of 10.
SIGMOID_BIAS, SIGMOID_SCALE = -10.0, 10.0


def initial_model(settings: ModelConfig, *, loss: str = "infonce") -> ModelParts:
    """Makes the model, with random weights or pretrained ones.

    Args:
        settings: the recipe's section.
        loss: the objective; ``sigmoid`` needs a model with a bias.

    Raises:
        ModelError: the architecture or the weights are not known or do not load.
        TrainingError: the weights are of another architecture.
        ConfigError: a tower to be locked has no blocks that could stay unlocked.
    """
    config = _configuration(settings, with_bias=loss == "sigmoid")
    parts = build_model(config, preprocess=settings.preprocess, for_training=True)
    if settings.pretrained:
        _load_weights(parts.model, settings.pretrained)
    _set(parts.model, "logit_scale", settings.initial_logit_scale, math.log)
    _set(parts.model, "logit_bias", settings.initial_logit_bias, float)
    if settings.unlocked_image_blocks is not None:
        lock_tower(parts.model, "image", settings.unlocked_image_blocks)
    if settings.unlocked_text_blocks is not None:
        lock_tower(parts.model, "text", settings.unlocked_text_blocks)
    return parts


def _configuration(settings: ModelConfig, *, with_bias: bool) -> str | dict[str, Any]:
    """The architecture with what the recipe adds to it; its name where it adds nothing."""
    if not with_bias and not settings.patch_dropout:
        return settings.architecture
    config = architecture_config(settings.architecture)
    if with_bias and config.get("init_logit_bias") is None:
        config |= {"init_logit_bias": SIGMOID_BIAS, "init_logit_scale": math.log(SIGMOID_SCALE)}
    if settings.patch_dropout:
        config["vision_cfg"] = {**config["vision_cfg"], "patch_dropout": settings.patch_dropout}
    return config


def _load_weights(model: nn.Module, pretrained: str) -> None:
    state = load_model(pretrained).model.state_dict()
    for name, parameter in model.named_parameters():
        if name in ("logit_scale", "logit_bias"):
            # A model without a bias may go on with the sigmoid loss, and the reverse.
            state[name] = state.get(name, parameter.detach()).reshape(parameter.shape)
    if "logit_bias" in state and getattr(model, "logit_bias", None) is None:
        del state["logit_bias"]
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[1:2] or [str(error)]
        raise TrainingError(
            f"model.pretrained {pretrained}: the weights do not fit "
            f"model.architecture ({first[0].strip()})"
        ) from error


def _set(model: nn.Module, name: str, value: float | None, transform: Any) -> None:
    if value is None:
        return
    parameter: torch.Tensor | None = getattr(model, name, None)
    if parameter is None:
        raise ConfigError(f"model.initial_{name} is {value}, but the model has no {name}")
    with torch.no_grad():
        parameter.fill_(transform(value))


def lock_tower(model: nn.Module, tower: Tower, unlocked_blocks: int) -> None:
    """Freezes a tower but for its last blocks and what follows them (LiT; Zhai et al. 2022).

    Args:
        model: open_clip's CLIP or CustomTextCLIP.
        tower: ``image`` or ``text``.
        unlocked_blocks: how many of the last blocks are trained, with what follows them; 0 freezes
            everything, the projection too. Blocks are a transformer's layers or the bottlenecks of
            a ResNet.

    Raises:
        ConfigError: the tower's blocks are not known, or fewer than asked for.
    """
    depths = tower_depths(model, tower, setting=f"model.unlocked_{tower}_blocks")
    deepest = max(depths.values()) - 1
    if unlocked_blocks > deepest:
        raise ConfigError(
            f"model.unlocked_{tower}_blocks is {unlocked_blocks}, but the {tower} tower has "
            f"{deepest} blocks; leave it out to train the whole tower"
        )
    for name, parameter in model.named_parameters():
        if name in depths:
            parameter.requires_grad = unlocked_blocks > 0 and depths[name] <= unlocked_blocks
