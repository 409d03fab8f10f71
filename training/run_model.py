"""The model of a run: what it begins with, and what DeepSpeed is given of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipsys.errors import ConfigError
from clipsys.models.adapters import Base, read_base
from clipsys.models.open_clip_models import ModelParts, read_card
from clipsys.models.open_clip_models import fingerprint as fingerprint_of_parts
from clipsys.training.checkpoints import ADAPTER_FOLDER
from clipsys.training.distributed.agreement import on_every_rank, require_equal
from clipsys.training.distributed.collectives import rank
from clipsys.training.features.trunks import BehindTrunks
from clipsys.training.model.adapter_targets import HEADS
from clipsys.training.model.adapters import Adapters
from clipsys.training.model.adding_adapters import add_adapters, announce_trained
from clipsys.training.model.initial import (
    ModelConfig,
    fingerprint,
    freeze_unused,
    initial_model,
)
from clipsys.training.model.layers import Tower
from clipsys.training.model.outputs import Sizes
from clipsys.training.model.towers import TowerOptions
from clipsys.training.model.trained import TrainedModel
from clipsys.training.model.two_towers import head_names
from clipsys.training.objectives import Objective, View
from clipsys.training.recipe import Recipe

#: Settings with which a model begins elsewhere than at its pretrained weights.
_CHANGING = (
    "architecture", "preprocess", "image_size", "context_length", "initial_logit_scale",
    "initial_logit_bias",
)  # fmt: skip


def begin_model(
    settings: ModelConfig, recipe: Recipe, objective: Objective[Any]
) -> tuple[ModelParts, Adapters | None]:
    """The model that every rank begins with, with what the objective does not train frozen.

    Args:
        settings: what it is made from: the recipe's section, or a checkpoint in its place.
        recipe: the recipe.
        objective: what is minimised.

    Returns:
        The model, and the adapters that it got.
    """
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
    adapters = on_every_rank(lambda: _adapters(model, settings, recipe.model))
    freeze_unused(
        model.model,
        image=bool(objective.views(recipe.augmentation)),
        text=objective.num_texts > 0,
        temperature=objective.trains_temperature,
    )
    if adapters is not None and rank() == 0:
        announce_trained(model.model, _trained_heads(model.model, recipe.model))
    return model, adapters


def _adapters(model: ModelParts, settings: ModelConfig, recipe: ModelConfig) -> Adapters | None:
    """Adds the adapters that a recipe asks for."""
    if recipe.lora is None:
        return None
    if settings is not recipe:  # resumed, from a model that they are merged into
        model_folder = settings.towers[0].name if settings.towers else settings.pretrained
        base, _ = read_base(Path(str(model_folder)) / ADAPTER_FOLDER)
    else:
        base = _base_of(model, recipe)
    return add_adapters(model, recipe.lora, base=base, heads=_trained_heads(model.model, recipe))


def _trained_heads(clip: nn.Module, recipe: ModelConfig) -> frozenset[str]:
    """Names of the parameters that are trained beside the adapters of their tower.

    Two towers have new heads, of whatever kind. Of a pretrained model those that are modules of
    their own: the matrices at the end of open_clip's transformers belong to the weights that are
    kept.
    """
    names: frozenset[str] = frozenset()
    towers: tuple[Tower, ...] = ("image", "text")
    for number, tower in enumerate(towers):
        own = head_names(clip, tower)
        if recipe.towers is not None:
            names |= frozenset() if recipe.towers[number].locked_head else own
        elif getattr(recipe, f"unlocked_{tower}_blocks") != 0:
            names |= {name for name in own if name.startswith(f"{HEADS[tower]}.")}
    return names


def _base_of(model: ModelParts, recipe: ModelConfig) -> Base:
    """The model that adapters are trained on, as it was before the recipe changed it."""
    if recipe.pretrained is None:
        return Base()
    mark = fingerprint_of_parts(model)
    changing = [f"model.{name}" for name in _CHANGING if getattr(recipe, name) not in (None, {})]
    folder = Path(recipe.pretrained).expanduser()
    card = read_card(folder) or read_card(folder / "model")
    if card is not None and card.fingerprint != mark and not changing:
        changing = ["objective.name, which needs a bias, or leaves out a decoder"]
    return Base(recipe.pretrained, mark, tuple(changing))


def make_trained_model(
    recipe: Recipe,
    objective: Objective[Any],
    model: ModelParts,
    sizes: Sizes,
    adapters: Adapters | None = None,
) -> TrainedModel:
    """The model with the objective's heads and momentum towers, checked against the recipe.

    Of a tower whose features are stored only the head, which takes them.
    """
    engine = recipe.engine
    options = TowerOptions(
        engine.precision,
        engine.grad_checkpointing,
        engine.compile,
        freeze_batch_norm=recipe.model.rests_batch_norm,
    )
    _check_frozen_batch_norm(model.model, recipe.model)
    stored = recipe.model.stored_towers
    clip = BehindTrunks(model.model, stored) if stored else model.model
    trained = TrainedModel(clip, objective, options, sizes=sizes, adapters=adapters)
    _check_batch_norm(trained, recipe)
    return trained


def _check_frozen_batch_norm(clip: nn.Module, settings: ModelConfig) -> None:
    """Refuses the setting where there is nothing to freeze.

    Raises:
        ConfigError: it is set, and no tower has batch norm.
    """
    kinds = nn.modules.batchnorm._BatchNorm
    has_batch_norm = any(isinstance(module, kinds) for module in clip.modules())
    if settings.freeze_batch_norm is not None and not has_batch_norm:
        raise ConfigError(
            f"model.freeze_batch_norm is {str(settings.freeze_batch_norm).lower()}, but the towers "
            "have no batch norm; leave it out"
        )


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
                "result; leave data.micro_batch_size out, or use a model without batch norm, or "
                "with statistics that rest (model.freeze_batch_norm)"
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
