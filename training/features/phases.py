"""The two phases of a run with locked towers: heads over stored features, then the last blocks.

RUN/locked/     a run of its own: heads trained over features that are computed once
RUN/            goes on from its model with some blocks unlocked, at a low rate
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from clipsys.config import Settings
from clipsys.training.features.config import FeaturesConfig

if TYPE_CHECKING:
    from clipsys.training.objectives import Objective
    from clipsys.training.recipe import Recipe

#: The folder of the first phase in that of the run.
LOCKED_FOLDER = "locked"


class UnlockConfig(Settings):
    """A second phase, in which blocks of the locked towers are trained too."""

    image_blocks: NonNegativeInt | None = Field(
        0, description="last blocks of the image tower that are trained; null: all of them"
    )
    text_blocks: NonNegativeInt | None = Field(0, description="the same of the text tower")
    epochs: PositiveInt = Field(description="epochs of the second phase")
    lr: PositiveFloat = Field(description="its peak learning rate; a tenth of optimizer.lr or less")
    warmup_steps: NonNegativeInt = Field(0, description="its warm-up")
    batch_size: PositiveInt | None = Field(
        None, description="its data.batch_size; default that of the first phase"
    )
    micro_batch_size: PositiveInt | None = Field(
        None, description="its data.micro_batch_size; default all of a rank's share at once"
    )
    layer_decay: PositiveFloat | None = Field(
        None, le=1, description="its optimizer.layer_decay; default that of the first phase"
    )

    @model_validator(mode="after")
    def _check(self) -> UnlockConfig:
        if self.image_blocks == 0 and self.text_blocks == 0:
            raise ValueError("image_blocks and text_blocks are both 0: nothing would be unlocked")
        return self


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


def uses_features(recipe: Recipe) -> bool:
    """Whether a run, or its first phase, trains heads over stored features."""
    return recipe.model.has_locked_towers


def feature_faults(recipe: Recipe, objective: Objective[Any]) -> Iterator[str]:
    """What contradicts locked towers, or does nothing without them."""
    if not uses_features(recipe):
        if recipe.unlock is not None:
            yield (
                "unlock is the second phase of a run with locked towers; set "
                "model.image_tower and model.text_tower with unlocked_blocks 0, or leave it out"
            )
        if recipe.features != FeaturesConfig():
            yield (
                "features are stored of locked towers only; set model.image_tower and "
                "model.text_tower with unlocked_blocks 0, or leave it out"
            )
        return
    views = objective.views(recipe.augmentation)
    name = recipe.objective.name
    if len(views) != 1 or objective.num_texts != 1 or objective.momentum is not None:
        yield (
            f"objective.name {name} needs more than one view and one caption of each sample, and "
            "locked towers are trained over stored features of one; use infonce or sigmoid, or "
            "unlock a block"
        )
    if objective.num_frames > 1 or recipe.data.frames is not None:
        yield f"objective.name {name} takes windows of frames; unlock a block of the towers"
    if objective.needs_classes or recipe.data.label_noise:
        yield (
            f"objective.name {name} or data.label_noise needs labels of classes, which are not "
            "stored with features; unlock a block of the towers"
        )
    if recipe.unlock is not None:
        return
    for setting in ("compile", "grad_checkpointing"):
        if getattr(recipe.engine, setting):
            yield (
                f"engine.{setting} does nothing for locked towers, whose features are stored; "
                "leave it out"
            )
    if recipe.optimizer.layer_decay is not None:
        yield "optimizer.layer_decay does nothing for locked towers; leave it out"
