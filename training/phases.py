"""The two phases of a run with locked towers: heads over stored features, then the last blocks.

RUN/locked/     a run of its own: heads trained over features that are computed once
RUN/            goes on from its model with some blocks unlocked, at a low rate
"""

from __future__ import annotations

from typing import Any

from clipsys.training.recipe import Recipe

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
    assert unlock is not None and recipe.model.towers is not None
    folder = str(recipe.run_folder / LOCKED_FOLDER / "model")
    towers = {}
    for tower, settings, blocks in (
        ("image_tower", recipe.model.image_tower, unlock.image_blocks),
        ("text_tower", recipe.model.text_tower, unlock.text_blocks),
    ):
        assert settings is not None
        update: dict[str, Any] = {"name": folder, "head": None, "unlocked_blocks": blocks}
        update |= {"weights": None} if tower == "image_tower" else {"pooling": None}
        if blocks != 0:
            update["locked_head"] = False
        towers[tower] = settings.model_copy(update=update)
    as_they_are = ("image_size", "context_length", "embed_dim", "initial_logit_scale")
    model = recipe.model.model_copy(
        update={
            **towers,
            "preprocess": {},
            "initial_logit_bias": None,
            **dict.fromkeys(as_they_are),
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
    checkpoint = recipe.checkpoint.model_copy(update={"every_epochs": 1})
    evaluation = recipe.evaluation.model_copy(update={"every_epochs": 1})
    return recipe.model_copy(
        update={
            "model": model,
            "data": data,
            "schedule": schedule,
            "optimizer": optimizer,
            "checkpoint": checkpoint,
            "evaluation": evaluation,
            "unlock": None,
        }
    )
