"""Whether a checkpoint fits the engine that loads it, and what the engine keeps of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipsys.errors import ConfigError
from clipsys.training.engine.repartition import SavedBy
from clipsys.training.model.outputs import State


def check_layout(checkpoint: Path, saved: SavedBy, stage: int, precision: str) -> None:
    """Refuses what DeepSpeed would load into weights or parts of another kind.

    Raises:
        ConfigError: the ZeRO stage or the precision is another one; names both.
    """
    if saved.zero_stage != stage and {saved.zero_stage, stage} != {1, 2}:
        raise ConfigError(
            f"{checkpoint}: was saved with engine.zero_stage {saved.zero_stage}, now it is "
            f"{stage}; resume with {saved.zero_stage}"
        )
    sixteen_bits = ("bf16_params", "fp16")
    if saved.precision != precision and {saved.precision, precision} & set(sixteen_bits):
        raise ConfigError(
            f"{checkpoint}: was saved with engine.precision {saved.precision}, now it is "
            f"{precision}; resume with engine.precision={saved.precision}"
        )


def check_objective_state(place: Path, saved: State, present: State) -> None:
    """Refuses an objective's state of another kind.

    Raises:
        ConfigError: names or shapes differ.
    """
    found, expected = (
        {name: tuple(tensor.shape) for name, tensor in state.items()} for state in (saved, present)
    )
    if found != expected:
        raise ConfigError(
            f"{place}: the state of the objective is {found or 'empty'}, and this run's is "
            f"{expected or 'empty'}; resume with the objective and the settings as they were"
        )


def settings_of(group: dict[str, Any]) -> dict[str, Any]:
    """A parameter group without its parameters and without LAMB's count of steps."""
    return {name: value for name, value in group.items() if name not in ("params", "step")}
