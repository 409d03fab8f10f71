"""Projection heads: what objectives over images put between a tower and their loss.

A head is trained beside the towers, takes part in ZeRO, averages and checkpoints, and is not part
of the exported model unless that is asked for. Batch normalisation is an option: it takes the
statistics of all ranks, so that the result does not depend on their number.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import nn

from clipsys.training.model.batch_norm import GlobalBatchNorm
from clipsys.training.model.towers import Towers
from clipsys.training.objectives.protocol import ObjectiveConfig

PROJECTION = "projection"
_TEMPERATURE = "temperature"


class HeadConfig(ObjectiveConfig):
    """Settings of an objective that puts a projection between the tower and its loss."""

    head: Literal["mlp", "linear", "none"] = Field(
        "mlp", description="what projects the tower's features: several layers, one, or nothing"
    )
    head_layers: int = Field(2, ge=2, description="layers of head: mlp")
    head_hidden: PositiveInt | None = Field(
        None, description="width of the hidden layers of head: mlp; default that of the features"
    )
    head_norm: Literal["none", "batch"] = Field(
        "none",
        description="what stands behind each hidden layer of head: mlp; batch normalisation takes "
        "the statistics of all processes and does not go with data.micro_batch_size",
    )
    head_width: PositiveInt = Field(128, description="width of the projection")

    @model_validator(mode="after")
    def _check_head(self) -> HeadConfig:
        idle = {"head_layers", "head_hidden", "head_norm"} if self.head != "mlp" else set()
        idle |= {"head_width"} if self.head == "none" else set()
        for name in sorted(idle):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} does nothing while head is {self.head}; leave it out")
        return self

    def projected_width(self, width: int) -> int:
        """The width of what the loss sees, of features of ``width``."""
        return width if self.head == "none" else self.head_width


class TemperatureConfig(ObjectiveConfig):
    """Settings of an objective with a temperature of its own."""

    temperature: PositiveFloat = Field(0.1, description="what cosines are divided by")
    learn_temperature: bool = Field(
        False, description="train the temperature, from the one that is set"
    )


class ProjectionConfig(HeadConfig, TemperatureConfig):
    """Settings of an objective that compares projected features at a temperature."""


def projection(settings: HeadConfig, width: int) -> nn.Module | None:
    """What projects features of ``width``; None where nothing does."""
    if settings.head == "none":
        return None
    if settings.head == "linear":
        return nn.Linear(width, settings.head_width)
    return mlp(
        width,
        settings.head_hidden or width,
        settings.head_width,
        layers=settings.head_layers,
        norm=settings.head_norm,
    )


def mlp(
    width: int, hidden: int, out: int, *, layers: int = 2, norm: Literal["none", "batch"] = "none"
) -> nn.Sequential:
    """Linear layers with rectifiers between them, and with a norm before each of these."""
    parts: list[nn.Module] = []
    for number in range(layers - 1):
        # A bias before a norm is subtracted again with the mean.
        parts.append(nn.Linear(hidden if number else width, hidden, bias=norm == "none"))
        if norm == "batch":
            parts.append(GlobalBatchNorm(hidden))
        parts.append(nn.ReLU())
    return nn.Sequential(*parts, nn.Linear(hidden, out))


def projection_heads(settings: HeadConfig, width: int) -> nn.ModuleDict:
    """The projection, and the temperature if there is one that is learned."""
    module = projection(settings, width)
    heads: dict[str, nn.Module] = {} if module is None else {PROJECTION: module}
    if isinstance(settings, ProjectionConfig):
        heads |= temperature_heads(settings)
    return nn.ModuleDict(heads)


def temperature_heads(settings: TemperatureConfig) -> dict[str, nn.Module]:
    """The temperature as a head, if it is learned."""
    if not settings.learn_temperature:
        return {}
    return {_TEMPERATURE: _LogScale(1 / settings.temperature)}


class _LogScale(nn.Module):
    """The logarithm of an inverse temperature; shape (1,), since DeepSpeed cannot train 0-d."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((1,), math.log(scale)))


def features_of(settings: HeadConfig, towers: Towers, image_BCHW: torch.Tensor) -> torch.Tensor:
    """Projections of images as the head gives them, float32."""
    features_BD = towers.image_features(image_BCHW)
    return features_BD if settings.head == "none" else towers.head(PROJECTION, features_BD)


def project(settings: HeadConfig, towers: Towers, image_BCHW: torch.Tensor) -> torch.Tensor:
    """Unit-norm projections of images, float32."""
    return nn.functional.normalize(features_of(settings, towers, image_BCHW), dim=-1)


def learned_scale(settings: TemperatureConfig, towers: Towers) -> dict[str, torch.Tensor]:
    """The inverse temperature among the shared outputs, if it is learned."""
    if not settings.learn_temperature:
        return {}
    return {"logit_scale": towers.logit_scale(f"heads.{_TEMPERATURE}.log_scale")}


def temperature_of(
    settings: TemperatureConfig, shared: dict[str, torch.Tensor]
) -> float | torch.Tensor:
    """The temperature of this step: the learned one or the fixed one."""
    return 1 / shared["logit_scale"] if "logit_scale" in shared else settings.temperature
