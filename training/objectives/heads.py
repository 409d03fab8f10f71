"""Projection heads: what objectives over images put between a tower and their loss.

A head is trained beside the towers, takes part in ZeRO, averages and checkpoints, and is not part
of the exported model unless the recipe sets that. No head has batch normalisation: a row would
depend on what else passes at once, and micro-batches would change the result.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import nn

from clipsys.training.model.towers import Towers
from clipsys.training.objectives.protocol import ObjectiveConfig

PROJECTION = "projection"
_TEMPERATURE = "temperature"


class TemperatureConfig(ObjectiveConfig):
    """Settings of an objective with a temperature of its own."""

    temperature: PositiveFloat = Field(0.1, description="what cosines are divided by")
    learn_temperature: bool = Field(
        False, description="train the temperature, from the one that is set"
    )


class ProjectionConfig(TemperatureConfig):
    """Settings of an objective on projected features."""

    head: Literal["mlp", "linear", "none"] = Field(
        "mlp", description="what projects the tower's features: two layers, one, or nothing"
    )
    head_hidden: PositiveInt | None = Field(
        None, description="width of the hidden layer of head: mlp; default that of the features"
    )
    head_width: PositiveInt = Field(128, description="width of the projection")

    @model_validator(mode="after")
    def _check(self) -> ProjectionConfig:
        if self.head_hidden is not None and self.head != "mlp":
            raise ValueError(f"head_hidden does nothing while head is {self.head}; leave it out")
        default = type(self).model_fields["head_width"].default
        if self.head == "none" and self.head_width != default:
            raise ValueError("head_width does nothing while head is none; leave it out")
        return self

    def projected_width(self, width: int) -> int:
        """The width of what the loss sees, of features of ``width``."""
        return width if self.head == "none" else self.head_width


def projection_heads(settings: ProjectionConfig, width: int) -> nn.ModuleDict:
    """The projection, and the temperature if it is learned."""
    heads: dict[str, nn.Module] = {}
    if settings.head == "linear":
        heads[PROJECTION] = nn.Linear(width, settings.head_width)
    elif settings.head == "mlp":
        hidden = settings.head_hidden or width
        heads[PROJECTION] = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, settings.head_width)
        )
    return nn.ModuleDict({**heads, **temperature_heads(settings)})


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


def project(settings: ProjectionConfig, towers: Towers, image_BCHW: torch.Tensor) -> torch.Tensor:
    """Unit-norm projections of images, float32."""
    features_BD = towers.image_features(image_BCHW)
    if settings.head != "none":
        features_BD = towers.head(PROJECTION, features_BD)
    return nn.functional.normalize(features_BD, dim=-1)


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
