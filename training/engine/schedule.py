"""Length of a run and its learning rate over the steps."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from clipsys.config import Settings


class ScheduleConfig(Settings):
    """How long to train, and how the learning rate moves."""

    epochs: PositiveInt = Field(10, description="passes over the training data")
    warmup_steps: NonNegativeInt = Field(100, description="steps of linear warm-up from zero")
    decay: Literal["cosine", "constant", "cooldown"] = Field(
        "cosine",
        description="after the warm-up: cosine, constant, or constant with a linear fall at the "
        "end",
    )
    cooldown_steps: NonNegativeInt | None = Field(
        None, description="length of the fall of decay: cooldown; default a fifth of the run"
    )
    final_lr_share: float = Field(
        0.0, ge=0, le=1, description="where cosine and cooldown end, as a share of the peak"
    )

    @model_validator(mode="after")
    def _check(self) -> ScheduleConfig:
        if self.cooldown_steps is not None and self.decay != "cooldown":
            raise ValueError("schedule.cooldown_steps does nothing unless decay is cooldown")
        if self.final_lr_share and self.decay == "constant":
            raise ValueError("schedule.final_lr_share does nothing while decay is constant")
        return self


def lr_factor(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """What the peak learning rate is multiplied with at a step (0-based), in [0, 1]."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    start = config.warmup_steps
    if config.decay == "cooldown":
        fall = total_steps // 5 if config.cooldown_steps is None else config.cooldown_steps
        start = max(start, total_steps - fall)
    if config.decay == "constant" or step < start or total_steps <= start:
        return 1.0
    done = min(1.0, (step - start) / (total_steps - start))
    left = 1 - done if config.decay == "cooldown" else (1 + math.cos(math.pi * done)) / 2
    return config.final_lr_share + (1 - config.final_lr_share) * left
