"""Optimizers by name, and the parameter groups they work on.

A group's learning rate is ``peak × schedule × lr_factor``. The factor is 1 for everything unless
layer-wise decay is asked for, which makes it fall from the top of each tower to its bottom, or the
temperature gets a factor of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import nn

from clipsys.config import Settings
from clipsys.errors import ConfigError


class OptimizerConfig(Settings):
    """What turns gradients into steps; no decay for norms, biases, positions and temperature.

    AdamW: Loshchilov & Hutter 2019. LAMB: You et al. 2020, for batches of many thousands; only
    with ``engine.zero_stage`` 0. SGD: with momentum, its decay added to the gradient.
    """

    name: Literal["adamw", "lamb", "sgd"] = Field("adamw", description="which optimizer")
    lr: PositiveFloat = Field(5e-4, description="peak learning rate")
    betas: tuple[float, float] = Field(
        (0.9, 0.98), description="decay of the two moments; adamw and lamb"
    )
    eps: PositiveFloat = Field(
        1e-6, description="added to the root of the second moment; adamw and lamb"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="of the gradient; sgd")
    weight_decay: float = Field(0.2, ge=0, description="of matrices and kernels only")
    logit_scale_lr_factor: PositiveFloat = Field(
        1.0, description="learning rate of temperature and bias, relative to lr"
    )
    layer_decay: float | None = Field(
        None,
        gt=0,
        le=1,
        description="learning rate of each layer of a tower, relative to the layer above it "
        "(Clark et al. 2020); null: the same for all",
    )

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        idle = ("betas", "eps") if self.name == "sgd" else ("momentum",)
        for field in idle:
            if getattr(self, field) != type(self).model_fields[field].default:
                raise ValueError(f"{field} does nothing for {self.name}; leave it out")
        return self

    @property
    def needs_whole_tensors(self) -> bool:
        """Whether a step depends on norms of whole parameters.

        LAMB scales each parameter's step by the ratio of its norm to its update's. ZeRO 1 to 3,
        and the fp32 masters of half-precision parameters, hand the optimizer one flat tensor of a
        whole group, or a piece of one: one ratio for all, and another one on each rank.
        """
        return self.name == "lamb"


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Makes the optimizer of ``config.name`` over what `parameter_groups` returned."""
    groups = [{**group, "lr": config.lr * group["lr_factor"]} for group in groups]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    if config.name == "adamw":
        return torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True
        )
    from timm.optim import Lamb

    # timm's takes a weight decay of 0 for "not a matrix, no trust ratio"; a recipe without decay
    # would silently be Adam. Its own clipping is the engine's business.
    groups = [{**group, "always_adapt": group["decays"]} for group in groups]
    optimizer: torch.optim.Optimizer = Lamb(
        groups, lr=config.lr, betas=config.betas, eps=config.eps, max_grad_norm=None
    )
    return optimizer


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Splits what is trained by learning-rate factor and by whether it decays.

    Decay is for matrices and kernels. Norms, biases, embeddings of position and class tokens are
    left alone; so are ``logit_scale`` and ``logit_bias``, which have a group of their own: decaying
    the scale would cool the temperature for no reason. Frozen parameters are in no group.

    Args:
        model: open_clip's CLIP or CustomTextCLIP, or a module that has it as ``clip``.
        config: what to decay, and by how much.

    Returns:
        Groups for a torch optimizer, each with ``params``, ``weight_decay``, ``lr_factor`` and
        ``decays``.

    Raises:
        ConfigError: ``layer_decay`` is set, and the layers of a tower are not known.
    """
    inner = getattr(model, "clip", None)
    clip = inner if isinstance(inner, nn.Module) else model
    depth_of = layer_depths(clip) if config.layer_decay is not None else {}
    spared = _spared_names(clip)
    groups: dict[tuple[bool, float, bool], dict[str, Any]] = {}
    for name, parameter in clip.named_parameters():
        if not parameter.requires_grad:
            continue
        is_scale = name in _SCALE_NAMES
        factor = (
            config.logit_scale_lr_factor
            if is_scale
            else (config.layer_decay or 1.0) ** depth_of.get(name, 0)
        )
        decays = parameter.ndim >= 2 and name not in spared
        group = groups.setdefault(
            (is_scale, factor, decays),
            {
                "params": [],
                "weight_decay": config.weight_decay if decays else 0.0,
                "lr_factor": factor,
                "decays": decays,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


_SCALE_NAMES = ("logit_scale", "logit_bias")

#: Last parts of names of what is an embedding of position or of a token without a word.
_EMBEDDINGS = (
    "positional_embedding", "position_embeddings.weight", "pos_embed", "class_embedding",
    "cls_emb", "cls_token", "reg_token", "relative_position_bias_table",
)  # fmt: skip


def _spared_names(clip: nn.Module) -> set[str]:
    """Names that do not decay whatever their shape."""
    names = {name for name, _ in clip.named_parameters()}
    spared = {
        name
        for name in names
        if name.endswith(_EMBEDDINGS) or name.rpartition(".")[2].startswith("bias")
    }
    # What the authors of a tower left out, in open_clip and timm alike.
    for prefix, module in clip.named_modules():
        listed = getattr(module, "no_weight_decay", None)
        if callable(listed):
            spared |= {f"{prefix}.{name}".removeprefix(".") for name in listed()}
    return spared & names


class _Layers(NamedTuple):
    """How the names of a tower's parameters tell their layer; each is matched at the start."""

    bottom: str
    block: str
    top: str


_TRANSFORMER_BLOCK = r"transformer\.resblocks\.(\d+)\."
_IMAGE_TOWERS = (
    _Layers(
        bottom=r"conv1\.|class_embedding|positional_embedding|ln_pre\.",
        block=_TRANSFORMER_BLOCK,
        top=r"ln_post\.|proj$|attn_pool",
    ),
    _Layers(bottom=r"(conv|bn)[123]\.", block=r"layer(\d+)\.(\d+)\.", top=r"attnpool\."),
)
_TEXT_TOWERS = (
    _Layers(
        bottom=r"token_embedding\.|positional_embedding|cls_emb",
        block=_TRANSFORMER_BLOCK,
        top=r"ln_final\.|text_projection",
    ),
)


def layer_depths(clip: nn.Module) -> dict[str, int]:
    """The layer of each parameter of both towers, counted from the top: 0 is the projection.

    The last block is 1, the first of n blocks n, what feeds it (patches, tokens, positions) n + 1,
    as in BEiT (Bao et al. 2022). ``logit_scale`` and ``logit_bias`` are in no tower.

    Raises:
        ConfigError: a tower's structure is not known.
    """
    names = [name for name, _ in clip.named_parameters() if name not in _SCALE_NAMES]
    image_names = [name for name in names if name.startswith("visual.")]
    text_names = [name for name in names if not name.startswith("visual.")]
    text_prefix = "text." if hasattr(clip, "text") else ""
    visual = getattr(clip, "visual", None)
    depths = _timm_depths(visual) if hasattr(visual, "trunk") else None
    if depths is None:
        depths = _tower_depths("visual.", image_names, _IMAGE_TOWERS)
    if depths is None:
        raise _unknown_layers("image", visual)
    text_depths = _tower_depths(text_prefix, text_names, _TEXT_TOWERS)
    if text_depths is None:
        raise _unknown_layers("text", getattr(clip, "text", clip))
    return depths | text_depths


def _unknown_layers(tower: str, module: Any) -> ConfigError:
    trunk = getattr(module, "trunk", None) or getattr(module, "transformer", None) or module
    return ConfigError(
        f"optimizer.layer_decay: the layers of the {tower} tower ({type(module).__name__} around "
        f"{type(trunk).__name__}) are not known; expected open_clip's own transformers, its "
        "ResNet or a timm trunk; set optimizer.layer_decay to null"
    )


def _tower_depths(
    prefix: str, names: Iterable[str], structures: Iterable[_Layers]
) -> dict[str, int] | None:
    """Depths by the first structure that explains every name; None if none does."""
    for layers in structures:
        places = {name: _place(name.removeprefix(prefix), layers) for name in names}
        if None not in places.values():
            return _count_from_top({name: place for name, place in places.items() if place})
    return None


def _place(name: str, layers: _Layers) -> tuple[int, ...] | None:
    """Sorts from the bottom (0,) over the blocks (1, i) to the top (2,)."""
    if re.match(layers.bottom, name):
        return (0,)
    if re.match(layers.top, name):
        return (2,)
    block = re.match(layers.block, name)
    return (1, *map(int, block.groups())) if block else None


def _timm_depths(visual: Any) -> dict[str, int] | None:
    from timm.models import group_parameters

    if not hasattr(visual.trunk, "group_matcher"):
        return None
    # timm counts the final norm to the last block, and the classifier, if any, one above it.
    layer_of = group_parameters(
        visual.trunk, visual.trunk.group_matcher(coarse=False), reverse=True
    )
    places: dict[str, tuple[int, ...]] = {
        f"visual.trunk.{name}": (0, layer) for name, layer in layer_of.items()
    }
    places |= {f"visual.head.{name}": (1,) for name, _ in visual.head.named_parameters()}
    return _count_from_top(places)


def _count_from_top(places: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    ordered = sorted(set(places.values()), reverse=True)
    depth_of = {place: depth for depth, place in enumerate(ordered)}
    return {name: depth_of[place] for name, place in places.items()}
