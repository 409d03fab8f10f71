"""Optimizers by name, and the parameter groups they work on.

A group's learning rate is ``peak × schedule × lr_factor``. The factor is 1 for everything unless
layer-wise decay is set, which makes it fall from the top of each tower to its bottom, or the
temperature gets its own factor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from pydantic import Field, PositiveFloat, field_validator, model_validator
from torch import nn

from clipsys.config import Settings
from clipsys.training.model.layers import TEMPERATURE_NAMES, Tower, tower_depths

#: Settings that not every optimizer has, with the names of those that do.
_SETTINGS_OF = {
    "betas": ("adamw", "lamb", "muon"),
    "eps": ("adamw", "lamb", "muon"),
    "momentum": ("sgd", "lars", "muon"),
    "trust_coefficient": ("lars",),
}


class OptimizerConfig(Settings):
    """What turns gradients into steps; no decay for norms, biases, positions and temperature.

    AdamW: Loshchilov & Hutter 2019. LAMB: You et al. 2020, and LARS: You et al. 2017, for batches
    of many thousands; only with ``engine.zero_stage`` 0. SGD: with momentum, its decay added to the
    gradient. LARS is SGD with a rate of its own for each matrix and kernel, as SimCLR, SwAV and
    Barlow Twins use it. Muon: Jordan et al. 2024, matrices and kernels are moved by their
    orthogonalised momentum, with the rates of AdamW (Liu et al. 2025, "Muon is Scalable for LLM
    Training", equation 4); AdamW with Nesterov momentum moves embeddings and what does not decay.
    """

    name: Literal["adamw", "lamb", "lars", "muon", "sgd"] = Field(
        "adamw", description="which optimizer"
    )
    lr: PositiveFloat = Field(5e-4, description="peak learning rate")
    betas: tuple[float, float] = Field(
        (0.9, 0.98), description="decay of the two moments; adamw, lamb and muon"
    )
    eps: PositiveFloat = Field(
        1e-6, description="added to the root of the second moment; adamw, lamb and muon"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="of the gradient; sgd, lars and muon")
    trust_coefficient: PositiveFloat = Field(
        1e-3, description="a step's norm relative to that of its weights, at a rate of 1; lars"
    )
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

    @field_validator("betas")
    @classmethod
    def _are_decays(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("expected two numbers from 0 to below 1")
        return value

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        for field, names in _SETTINGS_OF.items():
            if self.name in names:
                continue
            if getattr(self, field) != type(self).model_fields[field].default:
                raise ValueError(f"{field} does nothing for {self.name}; leave it out")
        return self

    @property
    def needs_whole_tensors(self) -> bool:
        """Whether a step depends on whole parameters, and not on each number alone.

        LAMB and LARS scale each parameter's step by the ratio of its norm to its update's, and Muon
        makes a matrix orthogonal. ZeRO 1 to 3, and the fp32 masters of half-precision parameters,
        hand the optimizer one flat tensor of a whole group, or a piece of one: one ratio for all,
        and another one on each rank, and no matrix.
        """
        return self.name in ("lamb", "lars", "muon")

    @property
    def without_whole_tensors(self) -> str:
        """The nearest optimizer that looks at each number alone."""
        return "sgd" if self.name == "lars" else "adamw"


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Makes the optimizer of ``config.name`` over what `parameter_groups` returned."""
    groups = [{**group, "lr": config.lr * group["lr_factor"]} for group in groups]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    if config.name == "adamw":
        return torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True
        )
    if config.name == "muon":
        return _build_muon(groups, config)
    from timm.optim import Lamb, Lars

    # timm's take a weight decay of 0 for "not a matrix, no trust ratio"; a recipe without decay
    # would silently be Adam or SGD. LAMB's own clipping is the engine's business.
    groups = [{**group, "always_adapt": group["adapts"]} for group in groups]
    optimizer: torch.optim.Optimizer
    if config.name == "lamb":
        optimizer = Lamb(
            groups, lr=config.lr, betas=config.betas, eps=config.eps, max_grad_norm=None
        )
    else:
        optimizer = Lars(
            groups, lr=config.lr, momentum=config.momentum, trust_coeff=config.trust_coefficient
        )
    return optimizer


def _build_muon(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Timm's Muon; what its shape makes no matrix of (depthwise kernels) it leaves to AdamW too."""
    from timm.optim import Muon

    routed = []
    for group in groups:
        # The eps of a group of matrices is that of their orthogonalisation, which has its own.
        own = {} if group["orthogonal"] else {"use_fallback": True, "eps": config.eps}
        routed.append({**group, **own})
    optimizer: torch.optim.Optimizer = Muon(
        routed, lr=config.lr, momentum=config.momentum, nesterov=True, betas=config.betas
    )
    return optimizer


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Splits what is trained by learning-rate factor and by whether it decays.

    Decay is for matrices and kernels. Norms, biases, embeddings of position and class tokens are
    left alone; so are ``logit_scale`` and ``logit_bias``, which have a group of their own: decaying
    the scale would cool the temperature for no reason. An objective's heads are like the top of a
    tower; what they list in ``no_weight_decay()`` (prototypes) does not decay. Frozen parameters
    are in no group.

    LAMB adapts what decays. LARS adapts every tensor of two dimensions or more, as the codes of
    MoCo v3 and SwAV do: at its rates of 1 and more, prototypes and positions that were not adapted
    would be thrown far off. Muon makes orthogonal what decays but embeddings, whose rows are no
    matrix that anything is multiplied with.

    Args:
        model: open_clip's CLIP or CustomTextCLIP, or a module that has it as ``clip`` and an
            objective's heads as ``heads``.
        config: what to decay, and by how much.

    Returns:
        Groups for a torch optimizer, each with ``params``, ``weight_decay``, ``lr_factor`` and
        ``decays``; those of LAMB and LARS with ``adapts`` too, those of Muon with ``orthogonal``.

    Raises:
        ConfigError: ``layer_decay`` is set, and the layers of a tower are not known.
    """
    inner = getattr(model, "clip", None)
    clip = inner if isinstance(inner, nn.Module) else model
    depth_of: dict[str, int] = {}
    if config.layer_decay is not None:
        for tower in get_args(Tower):
            depth_of |= tower_depths(clip, tower, setting="optimizer.layer_decay")
    heads = getattr(model, "heads", None) if clip is inner else None
    embeddings = _embedding_tables(model) if config.name == "muon" else frozenset()
    groups: dict[tuple[bool, float, bool, bool, bool], dict[str, Any]] = {}
    for name, parameter, may_decay in (*_trained(clip), *(_trained(heads) if heads else ())):
        # An objective's own temperature is one like the model's.
        is_scale = name in TEMPERATURE_NAMES or name.endswith(".log_scale")
        factor = (
            config.logit_scale_lr_factor
            if is_scale
            else (config.layer_decay or 1.0) ** depth_of.get(name, 0)
        )
        decays = parameter.ndim >= 2 and may_decay
        adapts = parameter.ndim >= 2 if config.name == "lars" else decays
        orthogonal = config.name == "muon" and decays and id(parameter) not in embeddings
        group = groups.setdefault(
            (is_scale, factor, decays, adapts, orthogonal),
            {
                "params": [],
                "weight_decay": config.weight_decay if decays else 0.0,
                "lr_factor": factor,
                "decays": decays,
                **({"adapts": adapts} if config.name in ("lamb", "lars") else {}),
                **({"orthogonal": orthogonal} if config.name == "muon" else {}),
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def _embedding_tables(model: nn.Module) -> frozenset[int]:
    """The ids of the parameters that are tables of vectors."""
    return frozenset(
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    )


def _trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Name, parameter and whether it may decay, of each that is not frozen."""
    spared = _spared_names(module)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            yield name, parameter, name not in spared


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
