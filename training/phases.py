"""The two phases of a run with locked towers: heads over stored features, then the last blocks.

RUN/locked/     a run of its own: heads trained over features that are computed once
RUN/            goes on from its model with some blocks unlocked, at a low rate
"""

from __future__ import annotations

from typing import Any, TypeVar

from clipsys.training.model.initial import with_towers_of
from clipsys.training.model.tower_config import TowerConfig
from clipsys.training.recipe import Recipe

TowerConfigT = TypeVar("TowerConfigT", bound=TowerConfig)

#: The folder of the first phase in that of the run.
LOCKED_FOLDER = "locked"


def locked_phase(recipe: Recipe) -> Recipe:
    """The first phase of a recipe: a run with nothing unlocked, over stored features."""
    engine = recipe.engine.model_copy(update={"grad_checkpointing": False, "compile": False})
    optimizer = recipe.optimizer.model_copy(update={"layer_decay": None})
    return recipe.model_copy(
        update={
            "output": str(recipe.run_folder / LOCKED_FOLDER),
            "unlock": None,
            "engine": engine,
            "optimizer": optimizer,
        }
    )


def unlocked_phase(recipe: Recipe) -> Recipe:
    """The second phase of a recipe: from the first one's model on, with blocks unlocked."""
    unlock = recipe.unlock
    assert unlock is not None
    model = with_towers_of(recipe.model, recipe.run_folder / LOCKED_FOLDER / "model")
    assert model.image_tower is not None and model.text_tower is not None
    model = model.model_copy(
        update={
            "image_tower": _unlocked(model.image_tower, unlock.image_blocks),
            "text_tower": _unlocked(model.text_tower, unlock.text_blocks),
        }
    )
    batch_size = unlock.batch_size or recipe.data.batch_size
    data = recipe.data.model_copy(
        update={"batch_size": batch_size, "micro_batch_size": unlock.micro_batch_size}
    )
    schedule = recipe.schedule.model_copy(
        update={"epochs": unlock.epochs, "warmup_steps": unlock.warmup_steps}
    )
    optimizer = recipe.optimizer.model_copy(
        update={
            "lr": unlock.lr,
            "layer_decay": unlock.layer_decay or recipe.optimizer.layer_decay,
        }
    )
    return recipe.model_copy(
        update={
            "model": model,
            "data": data,
            "schedule": schedule,
            "optimizer": optimizer,
            "checkpoint": recipe.checkpoint.model_copy(update={"every_epochs": 1}),
            "evaluation": recipe.evaluation.model_copy(update={"every_epochs": 1}),
            "unlock": None,
        }
    )


def _unlocked(tower: TowerConfigT, blocks: int | None) -> TowerConfigT:
    update: dict[str, Any] = {"unlocked_blocks": blocks}
    if blocks != 0:
        update["locked_head"] = False
    return tower.model_copy(update=update)
