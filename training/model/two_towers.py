"""A model of two pretrained towers: built from their settings, locked, its heads told apart.

Each tower comes with its weights, its preprocessing or tokenizer, and a head that maps what it
gives into the common space. The result is open_clip's CustomTextCLIP, whatever the towers are:

    timm                visual.trunk, visual.head
    Hugging Face        text.transformer, text.proj
    open_clip           visual, or text, with its own head

Locked image towers with a trained text tower are LiT (Zhai et al. 2022, "LiT: Zero-Shot Transfer
with Locked-image text Tuning").
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipsys.errors import ConfigError, ModelError, TrainingError
from clipsys.models import hub
from clipsys.models.architectures import complete_config
from clipsys.models.construction import one_line
from clipsys.models.open_clip_models import ModelParts, build_model
from clipsys.models.tokenization import make_tokenizer
from clipsys.training.model.layers import HEADS, TEMPERATURE_NAMES, Tower, tower_depths
from clipsys.training.model.tower_config import (
    TIMM,
    ImageTowerConfig,
    TextTowerConfig,
    TowerConfig,
)
from clipsys.training.model.tower_sources import (
    TowerSource,
    image_source,
    text_source,
    timm_look,
)
from clipsys.training.model.tower_weights import load_trunk, read_weights

_logger = logging.getLogger(__name__)

#: Width of the common space unless the recipe or a tower with its own head sets it.
DEFAULT_WIDTH = 512


def build_two_towers(
    image: ImageTowerConfig,
    text: TextTowerConfig,
    *,
    embed_dim: int | None = None,
    preprocess: Mapping[str, Any] | None = None,
    image_size: int | tuple[int, int] | None = None,
    context_length: int | None = None,
    bias: Mapping[str, float] | None = None,
) -> ModelParts:
    """Makes a model of two towers with their weights, and new heads where they are asked for.

    Args:
        image: the image tower.
        text: the text tower.
        embed_dim: width of the common space; None takes that of a tower with its own head, else
            512.
        preprocess: what differs from the image tower's own ``preprocess_cfg``.
        image_size: pixels of the images; None takes the tower's.
        context_length: tokens of a text; None takes the tower's, at most 77 of Hugging Face's.
        bias: further keys of the ``model_cfg``, such as ``init_logit_bias``.

    Raises:
        ModelError: a tower's weights are unavailable or damaged.
        ConfigError: heads and widths contradict each other.
        TrainingError: weights do not fit their tower.
    """
    visual = image_source(image, image_size)
    textual = text_source(text, context_length)
    width = _common_width(embed_dim, (image, visual, "image_tower"), (text, textual, "text_tower"))
    _require_head_kind(image, visual, "image_tower")
    _require_head_kind(text, textual, "text_tower")
    config = {
        "embed_dim": width,
        "vision_cfg": visual.config,
        "text_cfg": textual.config,
        "custom_text": True,
        "quick_gelu": _activation(visual, textual),
        **(bias or {}),
    }
    tokenizer = textual.parts.tokenizer if textual.parts else None
    if textual.parts and context_length is not None:
        tokenizer = make_tokenizer(config)
    own = visual.parts.preprocessing.to_open_clip() if visual.parts else timm_look(visual.config)
    own["size"] = complete_config(config)["vision_cfg"]["image_size"]
    parts = build_model(
        config, preprocess={**own, **(preprocess or {})}, for_training=True, tokenizer=tokenizer
    )
    # A folder with this configuration has all weights itself.
    parts.config["text_cfg"]["hf_model_pretrained"] = False
    _load_image(parts.model, image, visual)
    if textual.parts is not None:
        _load_own_tower(parts.model, textual.parts, "text", keep_head=text.head is None)
    _add_dropout(parts.model, image, text)
    _logger.info(
        "two towers: %s and %s, heads %s and %s, %d values wide",
        *(image.name, text.name, _head_kind(image, visual), _head_kind(text, textual), width),
    )
    name = f"{image.name.rpartition('/')[2]} + {text.name.rpartition('/')[2]}"
    return replace(parts, name=name)


def lock_towers(model: nn.Module, image: TowerConfig, text: TowerConfig) -> None:
    """Freezes what the two settings say: everything but heads and unlocked blocks.

    Raises:
        ConfigError: the blocks of a tower are not known, or fewer than asked for.
    """
    towers: tuple[tuple[Tower, TowerConfig], ...] = (("image", image), ("text", text))
    for tower, settings in towers:
        unlocked = settings.unlocked_blocks
        if unlocked is None:
            continue
        heads = head_names(model, tower)
        depths: dict[str, int] = {}
        if unlocked:
            setting = f"model.{tower}_tower.unlocked_blocks"
            depths = tower_depths(model, tower, setting=setting)
            deepest = max(depths.values()) - 1
            if unlocked > deepest:
                raise ConfigError(
                    f"{setting} is {unlocked}, but the {tower} tower has {deepest} blocks; set it "
                    "to null to train the whole tower"
                )
        for name, parameter in tower_parameters(model, tower):
            is_head = name in heads
            parameter.requires_grad = (is_head and not settings.locked_head) or (
                name in depths and unlocked > 0 and depths[name] <= unlocked
            )


def tower_parameters(model: nn.Module, tower: Tower) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters of a tower of open_clip's CLIP or CustomTextCLIP."""
    return [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if name not in TEMPERATURE_NAMES and name.startswith("visual.") == (tower == "image")
    ]


def head_names(model: nn.Module, tower: Tower) -> frozenset[str]:
    """Names of the parameters of a tower's head: what follows its last layer and its pooling."""
    names = [name for name, _ in tower_parameters(model, tower)]
    return frozenset(name for name in names if name.startswith(HEADS[tower]))


def _head_kind(tower: TowerConfig, source: TowerSource) -> str:
    return tower.head or ("its own" if source.width is not None else "linear")


def _common_width(asked: int | None, *towers: tuple[TowerConfig, TowerSource, str]) -> int:
    """Width of the common space: what towers with their own heads give."""
    own = {
        setting: source.width
        for tower, source, setting in towers
        if source.width is not None and tower.head is None
    }
    width = asked or next((one for one in own.values() if one), DEFAULT_WIDTH)
    for setting, given in own.items():
        if given != width:
            raise ConfigError(
                f"model.{setting}: its own head gives {given} values, and the common space has "
                f"{width} (model.embed_dim, or the other tower's head); set model.{setting}.head "
                "to linear for a new one"
            )
    return int(width)


def _require_head_kind(tower: TowerConfig, source: TowerSource, setting: str) -> None:
    from_library = any(source.config.get(key) for key in ("timm_model_name", "hf_model_name"))
    if tower.head == "mlp" and not from_library:
        raise ConfigError(
            f"model.{setting}.head is mlp, and open_clip's own transformers end in one matrix; "
            "set it to linear"
        )


def _activation(visual: TowerSource, textual: TowerSource) -> bool:
    """QuickGELU or not; one key of the ``model_cfg`` is for both of open_clip's own towers."""
    asked = {
        bool(source.parts.config.get("quick_gelu"))
        for source, library in ((visual, "timm_model_name"), (textual, "hf_model_name"))
        if source.parts is not None and not source.config.get(library)
    }
    if len(asked) > 1:
        raise ConfigError(
            "model.image_tower and model.text_tower were trained with different activations "
            "(quick_gelu), and open_clip has one for both; choose towers with the same"
        )
    return bool(asked and asked.pop())


def _add_dropout(model: Any, image: TowerConfig, text: TowerConfig) -> None:
    for tower, module in ((image, model.visual), (text, model.text)):
        if tower.dropout:
            add_head_dropout(module, tower.dropout)


class HeadDropout:
    """Leaves out values before a head's last matrix, in training; the weights stay as they are."""

    def __init__(self, share: float) -> None:
        self._share = share

    def __call__(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
        """Called by torch before the layer, with its inputs."""
        if not module.training:
            return None
        return (torch.nn.functional.dropout(inputs[0], self._share), *inputs[1:])


def add_head_dropout(tower: nn.Module, share: float) -> None:
    """Adds `HeadDropout` to a tower whose head ends in a linear layer.

    A hook, not a module: names and number of the weights stay those of open_clip.

    Raises:
        ConfigError: its head is a bare matrix, as that of open_clip's own transformers.
    """
    head = getattr(tower, "head", None) or getattr(tower, "proj", None)
    layers = (
        [one for one in head.modules() if isinstance(one, nn.Linear)]
        if isinstance(head, nn.Module)
        else []
    )
    if not layers:
        raise ConfigError(
            f"dropout: the head of {type(tower).__name__} is a bare matrix; set dropout to 0"
        )
    layers[-1].register_forward_pre_hook(HeadDropout(share))


def _load_image(model: Any, tower: ImageTowerConfig, source: TowerSource) -> None:
    if source.parts is not None:
        _load_own_tower(model, source.parts, "image", keep_head=tower.head is None)
        return
    if tower.weights == "random":
        return
    name = tower.name.removeprefix(TIMM)
    if tower.weights is not None:
        load_trunk(model.visual.trunk, read_weights(Path(tower.weights)), tower.weights)
        return
    import timm

    with hub.quiet_hub() as unreachable:
        try:
            fetched = timm.create_model(name, pretrained=True, num_classes=0)
        except Exception as error:
            # timm and the hub's client raise anything here; the next step is the same.
            reason = unreachable or one_line(error)
            raise ModelError(
                f"model.image_tower {tower.name}: its weights are not on this machine, and "
                f"{reason}; set model.image_tower.weights to a file with them, or "
                "connect this machine"
            ) from error
    load_trunk(model.visual.trunk, fetched.state_dict(), tower.name)


def _load_own_tower(model: nn.Module, source: ModelParts, tower: Tower, *, keep_head: bool) -> None:
    """Copies a tower out of an open_clip model; its head only where it is kept."""
    own = dict(tower_parameters_and_buffers(model, tower))
    heads = head_names(model, tower)
    given = {
        _custom_name(name, source.model): tensor
        for name, tensor in tower_parameters_and_buffers(source.model, tower)
    }
    for name, tensor in own.items():
        if not keep_head and name in heads:
            continue
        if name not in given or given[name].shape != tensor.shape:
            found = tuple(given[name].shape) if name in given else "nothing"
            raise TrainingError(
                f"model.{tower}_tower {source.name}: {name} has shape {tuple(tensor.shape)}, the "
                f"weights have {found}; use another model"
            )
        tensor.data.copy_(given[name])
    if tower == "image":
        return
    scale: Any = model
    other: Any = source.model
    with torch.no_grad():
        scale.logit_scale.copy_(other.logit_scale.reshape(scale.logit_scale.shape))


def tower_parameters_and_buffers(model: nn.Module, tower: Tower) -> list[tuple[str, torch.Tensor]]:
    """Everything of a tower that its state dict holds."""
    is_image = tower == "image"
    return [
        (name, tensor)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name not in TEMPERATURE_NAMES
        and name.startswith("visual.") == is_image
        and not name.startswith("text_decoder.")
    ]


def _custom_name(name: str, source: nn.Module) -> str:
    """The name in CustomTextCLIP of a tensor of CLIP, whose text tower is spread over the model."""
    if hasattr(source, "text") or name.startswith("visual."):
        return name
    return f"text.{name}"
