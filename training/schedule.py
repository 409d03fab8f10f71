"""Length of a run and its learning rate over the steps."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from clipsys.config import Settings


class ScheduleConfig(Settings):
    """How long to train, and how the learning rate moves."""

    epochs: PositiveInt = Field(10, description="passes over the training data")
    warmup_steps: NonNegativeInt = Field(100, description="steps of linear warm-up from zero")
    decay: Literal["cosine", "constant"] = Field("cosine", description="after the warm-up")
    final_lr_share: float = Field(
        0.0, ge=0, le=1, description="where the cosine ends, as a share of the peak"
    )


def lr_factor(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """What the peak learning rate is multiplied with at a step (0-based), in [0, 1]."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    falling_steps = total_steps - config.warmup_steps
    if config.decay == "constant" or falling_steps <= 0:
        return 1.0
    done = (step - config.warmup_steps) / falling_steps
    cosine = (1 + math.cos(math.pi * min(1.0, done))) / 2
    return config.final_lr_share + (1 - config.final_lr_share) * cosine
