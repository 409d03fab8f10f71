"""The model that a run begins with: made or loaded, with its temperature and its locked towers."""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat
from torch import nn

from clipsys.config import PathText, Settings
from clipsys.errors import ConfigError, TrainingError
from clipsys.models.open_clip_models import ModelParts, architecture_config, build_model, load_model
from clipsys.training.model.layers import Tower, tower_depths

#: Where Zhai et al. 2023 (section 3.2) start the sigmoid loss: a bias of -10, since nearly all
#: pairs are negatives, and a scale of 10.
SIGMOID_BIAS, SIGMOID_SCALE = -10.0, 10.0


class ModelConfig(Settings):
    """What is trained."""

    architecture: str | dict[str, Any] = Field(
        "ViT-B-32", description="a name that open_clip knows, or a model_cfg of its own"
    )
    pretrained: PathText | None = Field(
        None, description="start from these weights: NAME/TAG, hf-hub:ORG/REPO or a model folder"
    )
    preprocess: dict[str, Any] = Field(
        default_factory=dict, description="what differs from open_clip's default preprocess_cfg"
    )
    initial_logit_scale: PositiveFloat | None = Field(
        None, description="inverse temperature at the start; default the model's (1/0.07)"
    )
    initial_logit_bias: float | None = Field(
        None, description="bias of the sigmoid loss at the start; default -10"
    )
    patch_dropout: float = Field(
        0.0, ge=0, lt=1, description="share of image patches left out in training (FLIP)"
    )
    unlocked_image_blocks: NonNegativeInt | None = Field(
        None,
        description="train only the last blocks of the image tower and what follows; 0 locks all "
        "of it (LiT); default: train everything",
    )
    unlocked_text_blocks: NonNegativeInt | None = Field(
        None, description="the same for the text tower"
    )


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
