"""Adding adapters to a model: chosen, tried, and the weights beside them frozen."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from clipsys.errors import ConfigError
from clipsys.models.adapters import Base, weight_name
from clipsys.models.open_clip_models import ModelParts
from clipsys.models.quantisation import require_bitsandbytes
from clipsys.training.model.adapter_check import (
    Probe,
    receiving,
    require_exact_merging,
    require_gradients,
)
from clipsys.training.model.adapter_targets import (
    HEADS,
    candidates,
    describe_names,
    ends_as,
    known_endings,
    modules_of,
    named_targets,
    pattern_of,
    tower_prefix,
)
from clipsys.training.model.adapters import BASE, FACTOR, Adapters, LoraConfig
from clipsys.training.model.layers import TEMPERATURE_NAMES, Tower

_logger = logging.getLogger(__name__)

#: Standard deviation of B while adapters are tried; then it is zero.
_TRIAL = 0.02


def add_adapters(
    parts: ModelParts, settings: LoraConfig, *, base: Base, heads: frozenset[str] = frozenset()
) -> Adapters:
    """Adds adapters to a model, in place; each is tried before it is trained.

    The weights of the adapted towers are frozen but for ``heads``; all else is as it was.

    Args:
        parts: the model with the weights that it begins with.
        settings: the recipe's section.
        base: where the weights come from.
        heads: names of parameters of the adapted towers that go on being trained.

    Raises:
        ConfigError: no layer can have an adapter, or one would receive no gradient or could not be
            merged.
    """
    clip = parts.model
    peft = _import_peft()
    if settings.quantised:
        require_bitsandbytes()
    probe = Probe(parts, settings.towers)
    chosen = {tower: _chosen(clip, tower, settings, probe) for tower in settings.towers}
    names = [name for layers in chosen.values() for name in layers]
    for target in settings.targets or ():
        if not any(ends_as(name, target) for name in names):
            raise ConfigError(
                f"model.lora.targets names {target!r}, and no layer of the adapted towers has a "
                "name that ends so; leave it out"
            )
    flags = {name: parameter.requires_grad for name, parameter in clip.named_parameters()}
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=pattern_of(names, clip),
        modules_to_save=[
            head for head in HEADS.values() if any(name.startswith(f"{head}.") for name in heads)
        ]
        or None,
    )
    from clipsys.training.model.adapter_layers import (
        ADAPTER_NAME,
        AttentionAdapter,
        quantise_bases,
    )

    described = _described(config, base)
    config.modules_to_save = None  # they are trained where they stand
    config._register_custom_module({nn.MultiheadAttention: AttentionAdapter})
    peft.inject_adapter_in_model(config, clip, ADAPTER_NAME)
    del clip.peft_config
    adapters = Adapters(
        described, settings.alpha / settings.rank, base, settings.quantised, _adapted(clip)
    )
    _try_out(probe, clip, adapters)
    if settings.quantised:
        quantise_bases(clip)
    _freeze(clip, flags, settings.towers, heads)
    for tower, names_of_tower in chosen.items():
        left_out = _left_out(clip, tower)
        _logger.info(
            "model.lora: rank %d, alpha %g on %d layers of the %s tower (%s)%s",
            *(settings.rank, settings.alpha, len(names_of_tower), tower),
            describe_names(names_of_tower),
            f"; without adapters: {left_out}" if left_out else "",
        )
    return adapters


def _import_peft() -> Any:
    """Imports peft without the remarks of libraries that it looks for on the way."""
    noisy = [logging.getLogger(name) for name in ("torch.utils._pytree", "bitsandbytes")]
    levels = [logger.level for logger in noisy]
    for logger in noisy:
        logger.setLevel(logging.ERROR)
    try:
        import peft
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)
    return peft


def _chosen(clip: nn.Module, tower: Tower, settings: LoraConfig, probe: Probe) -> list[str]:
    found = candidates(clip, tower)
    if settings.targets is not None:
        named = named_targets(clip, tower, settings.targets)
        if not named:
            raise ConfigError(
                f"model.lora.targets is {list(settings.targets)}, and the {tower} tower has no "
                f"layer whose name ends so; its layers: {known_endings(found)}"
            )
        return list(named)
    names = receiving(probe, clip, found)
    if not names:
        raise ConfigError(
            f"model.lora: no layer of the {tower} tower can have an adapter that receives "
            f"gradients; leave {tower} out of model.lora.towers"
        )
    return names


def _described(config: Any, base: Base) -> dict[str, Any]:
    """A configuration of peft's as JSON holds it."""
    described = {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in config.to_dict().items()
    }
    return {**described, "base_model_name_or_path": base.model or None, "inference_mode": True}


def _adapted(clip: nn.Module) -> dict[str, str]:
    """The adapted layers: peft's names by those of the plain model."""
    end = ".lora_A.default.weight"
    names = [name.removesuffix(end) for name, _ in clip.named_parameters() if name.endswith(end)]
    return {name.replace(BASE, ""): name for name in names}


def _try_out(probe: Probe, clip: nn.Module, adapters: Adapters) -> None:
    """Gradients and merging, with adapters that are not zero; then B is zero, as LoRA begins."""
    parameters = dict(clip.named_parameters())
    ups = [parameters[f"{name}.lora_B.default.weight"] for name in adapters.names.values()]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for up in ups:
            up.copy_(torch.randn(up.shape, generator=generator) * _TRIAL)
    require_gradients(probe, clip)
    plain = {name.replace(BASE, ""): one for name, one in parameters.items()}
    values = adapters.merged_weights(clip, {n: p.detach() for n, p in parameters.items()})
    places = [weight_name(layer, plain) for layer in adapters.names]
    require_exact_merging(probe, clip, {plain[place]: values[place] for place in places})
    with torch.no_grad():
        for up in ups:
            up.zero_()


def _freeze(
    clip: nn.Module, flags: Mapping[str, bool], towers: tuple[Tower, ...], heads: frozenset[str]
) -> None:
    """Freezes the adapted towers but for adapters and heads; the rest is as it was."""
    inside = {parameter for tower in towers for parameter in _parameters_of(clip, tower)}
    for name, parameter in clip.named_parameters():
        if FACTOR in name:
            parameter.requires_grad = True
            continue
        was = flags[name.replace(BASE, "")]
        parameter.requires_grad = was and (parameter not in inside or name in heads)


def _parameters_of(clip: nn.Module, tower: Tower) -> list[nn.Parameter]:
    prefix = tower_prefix(clip, tower)
    return [
        parameter
        for name, parameter in clip.named_parameters()
        if name.startswith(prefix)
        and (prefix or not name.startswith("visual."))
        and name not in TEMPERATURE_NAMES
    ]


def announce_trained(clip: nn.Module, heads: frozenset[str]) -> None:
    """Says what of a model with adapters is trained, once all that is not trained is frozen."""
    counts = {"adapters": 0, "heads": 0, "temperature": 0, "other weights": 0}
    frozen = 0
    for name, parameter in clip.named_parameters():
        kind = "heads" if name in heads else "other weights"
        if FACTOR in name:
            kind = "adapters"
        elif name in TEMPERATURE_NAMES:
            kind = "temperature"
        if parameter.requires_grad:
            counts[kind] += parameter.numel()
        else:
            frozen += parameter.numel()
    trained = ", ".join(f"{number:,} of {kind}" for kind, number in counts.items() if number)
    held = 2 * sum(b.numel() for n, b in clip.named_buffers() if n.endswith(".packed"))
    _logger.info(
        "model.lora: trained are %s; %s parameters are frozen%s",
        *(trained, f"{frozen + held:,}"),
        f", {held:,} of them in NF4" if held else "",
    )


def _left_out(clip: nn.Module, tower: Tower) -> str:
    """Convolutions of a tower that can have no adapter, for the log."""
    number = sum(
        isinstance(module, nn.Conv2d) and module.groups > 1
        for module in modules_of(clip, tower).values()
    )
    return f"{number} depthwise or grouped convolutions" if number else ""
