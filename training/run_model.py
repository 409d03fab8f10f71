"""The model of a run: what it begins with, and what DeepSpeed is given of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from clipsys.errors import ConfigError
from clipsys.models.open_clip_models import ModelParts
from clipsys.training.distributed.agreement import on_every_rank, require_equal
from clipsys.training.features.phases import uses_features
from clipsys.training.features.trunks import Heads
from clipsys.training.model.initial import (
    ModelConfig,
    fingerprint,
    freeze_unused,
    initial_model,
)
from clipsys.training.model.outputs import Sizes
from clipsys.training.model.towers import TowerOptions
from clipsys.training.model.trained import TrainedModel
from clipsys.training.objectives import Objective, View
from clipsys.training.recipe import Recipe


def begin_model(settings: ModelConfig, recipe: Recipe, objective: Objective[Any]) -> ModelParts:
    """The model that every rank begins with, with what the objective does not train frozen."""
    model = on_every_rank(
        lambda: initial_model(
            settings,
            with_bias=objective.needs_bias,
            trains_images=bool(objective.views(recipe.augmentation)),
        )
    )
    require_equal(
        {"a model with the fingerprint": fingerprint(model, weights=settings.begins_with_weights)},
        remedy="give every machine the same model, and the same files of its weights",
    )
    freeze_unused(
        model.model,
        image=bool(objective.views(recipe.augmentation)),
        text=objective.num_texts > 0,
        temperature=objective.trains_temperature,
    )
    return model


def make_trained_model(
    recipe: Recipe, objective: Objective[Any], model: ModelParts, sizes: Sizes
) -> TrainedModel:
    """The model with the objective's heads and momentum towers, checked against the recipe.

    Of a model with locked towers only the heads, which take the features of the towers.
    """
    engine = recipe.engine
    options = TowerOptions(engine.precision, engine.grad_checkpointing, engine.compile)
    clip = Heads(model.model) if uses_features(recipe) else model.model
    trained = TrainedModel(clip, objective, options, sizes=sizes)
    _check_batch_norm(trained, recipe)
    return trained


def _check_batch_norm(model: TrainedModel, recipe: Recipe) -> None:
    """Refuses micro-batches where batch norm would make them change the result.

    Raises:
        ConfigError: a head has batch norm, or a tower of an objective that has no older recipes.
    """
    if recipe.data.micro_batch_size is None:
        return
    model.train()
    # InfoNCE and the sigmoid loss have allowed it in a tower from the start; the docs say so.
    parts = ("heads.",) if recipe.objective.name in ("infonce", "sigmoid") else ("heads.", "clip.")
    for name, module in model.named_modules():
        is_active = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
        if is_active and name.startswith(parts):
            raise ConfigError(
                f"data.micro_batch_size is {recipe.data.micro_batch_size}, but {name} is batch "
                "normalisation, which would take its statistics over a micro-batch: another "
                "result; leave data.micro_batch_size out, or use a model without batch norm"
            )


def check_view_sizes(clip: nn.Module, views: Sequence[View], model_size: tuple[int, int]) -> None:
    """Tries the image tower on views of another size than the model's; nothing changes in it.

    Raises:
        ConfigError: the tower takes its own size alone, as transformers with learned positions do.
    """
    visual: Any = clip.visual
    sizes = {view.size for view in views if view.size is not None} - {model_size}
    was_training = visual.training
    visual.eval()
    try:
        for height, width in sizes:
            with torch.no_grad():
                visual(torch.zeros(1, 3, height, width))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError(
            f"the image tower ({type(visual).__name__}) does not take views of {height} x {width} "
            f"pixels, only of {model_size[0]} x {model_size[1]}; leave objective.local_size out, "
            "or use a model that takes any size, such as a convolutional one of timm"
        ) from error
    finally:
        visual.train(was_training)


def feature_width(model: ModelParts) -> int:
    """Width of the features of both towers."""
    return int(model.config["embed_dim"])
