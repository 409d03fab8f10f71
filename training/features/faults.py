"""What contradicts locked towers whose features are stored, or does nothing without them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from clipsys.training.features.config import FeaturesConfig, UnlockConfig
from clipsys.training.model.initial import ModelConfig


class Trained(Protocol):
    """What needs to be known of an objective."""

    @property
    def num_texts(self) -> int:
        """Texts of each sample."""

    @property
    def num_frames(self) -> int:
        """Frames of each sample."""

    @property
    def needs_classes(self) -> bool:
        """Whether labels are numbered."""

    @property
    def momentum(self) -> float | None:
        """Of momentum towers."""


def feature_faults(
    name: str,
    objective: Trained,
    *,
    num_views: int,
    model: ModelConfig,
    features: FeaturesConfig,
    unlock: UnlockConfig | None,
) -> Iterator[str]:
    """Faults of a recipe's sections ``features`` and ``unlock``.

    Args:
        name: name of the objective.
        objective: the objective.
        num_views: views that it takes of each image.
        model: the recipe's section.
        features: the recipe's section.
        unlock: the recipe's section.
    """
    if unlock is not None and len(model.stored_towers) < 2:
        yield (
            "unlock is the second phase of a run with locked towers; set model.image_tower and "
            "model.text_tower with unlocked_blocks 0, or leave it out"
        )
    if not model.stored_towers:
        if features != FeaturesConfig():
            yield (
                "features are stored of locked towers only; set model.image_tower with "
                "unlocked_blocks 0, or leave it out"
            )
        return
    if num_views != 1 or objective.num_texts != 1 or objective.momentum is not None:
        yield (
            f"objective.name {name} needs more or less than one view and one caption of each "
            "sample, and locked towers are trained over stored features of one; use infonce or "
            "sigmoid, or unlock a block"
        )
    if objective.num_frames > 1:
        yield f"objective.name {name} takes windows of frames; unlock a block of the towers"
    if objective.needs_classes:
        yield (
            f"objective.name {name} needs labels of classes, which are not stored with features; "
            "unlock a block of the towers"
        )


def idle_settings(model: ModelConfig, sections: Any, unlock: UnlockConfig | None) -> Iterator[str]:
    """Settings about towers that pass no step, since their features are stored.

    Args:
        model: the recipe's section.
        sections: the recipe's ``engine`` and ``optimizer``, by name.
        unlock: the recipe's section, in whose phase they are of use.
    """
    if len(model.stored_towers) < 2 or unlock is not None:
        return
    for section, setting, idle in (
        ("engine", "compile", False),
        ("engine", "grad_checkpointing", False),
        ("optimizer", "layer_decay", None),
    ):
        if getattr(sections[section], setting) != idle:
            yield (
                f"{section}.{setting} does nothing for locked towers, whose features are stored; "
                "leave it out"
            )
