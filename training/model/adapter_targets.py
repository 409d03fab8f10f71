"""Which layers of a tower get an adapter: those that can have one, and that receive gradients."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from clipsys.errors import ConfigError
from clipsys.training.model.layers import Tower, tower_depths
from clipsys.training.model.two_towers import head_names

#: Modules between the towers and what is trained of them, by their names in open_clip's model.
HEADS: dict[Tower, str] = {"image": "visual.head", "text": "text.proj"}


def tower_prefix(clip: nn.Module, tower: Tower) -> str:
    """What the names of a tower's modules begin with; empty for the text tower of `CLIP`."""
    if tower == "image":
        return "visual."
    return "text." if hasattr(clip, "text") else ""


def modules_of(clip: nn.Module, tower: Tower) -> dict[str, nn.Module]:
    """The modules of a tower by name."""
    prefix = tower_prefix(clip, tower)
    return {
        name: module
        for name, module in clip.named_modules()
        if name.startswith(prefix) and (prefix or not name.startswith("visual"))
    }


def why_unfit(module: nn.Module) -> str | None:
    """Why a layer cannot have an adapter that is merged exactly; None where it can."""
    kind = type(module)
    if kind is nn.Linear:
        return None
    if kind is nn.MultiheadAttention:
        plain: Any = module
        if not plain._qkv_same_embed_dim or plain.bias_k is not None or plain.add_zero_attn:
            return "its queries, keys and values have weights of their own"
        return None
    if kind is nn.Conv2d or kind.__name__ == "Conv2dSame":
        convolution: Any = module
        if convolution.groups > 1:
            return f"it is a convolution of {convolution.groups} groups"
        if tuple(convolution.dilation) != (1, 1) or convolution.padding_mode != "zeros":
            return "it is a convolution with holes, or padded otherwise than with zeros"
        return None
    return f"a {kind.__name__} is no linear layer, attention or convolution"


def candidates(clip: nn.Module, tower: Tower) -> dict[str, nn.Module]:
    """The layers inside a tower's blocks that can have an adapter, by name.

    Neither what feeds the blocks (patches, tokens) nor what follows them (poolers, projections).
    """
    depths = tower_depths(clip, tower, setting="model.lora")
    deepest = max(depths.values())
    inside = {name for name, depth in depths.items() if 0 < depth < deepest}
    found = {}
    attentions: list[str] = []
    for name, module in modules_of(clip, tower).items():
        if isinstance(module, nn.MultiheadAttention):
            attentions.append(f"{name}.")
        weight = f"{name}.in_proj_weight" if f"{name}." in attentions else f"{name}.weight"
        # Attention reads the weight of its output projection without calling it.
        is_read = name.startswith(tuple(attentions))
        if weight in inside and not is_read and why_unfit(module) is None:
            found[name] = module
    return found


def named_targets(clip: nn.Module, tower: Tower, targets: Iterable[str]) -> dict[str, nn.Module]:
    """The layers of a tower whose names end as the recipe says, as peft matches them.

    Raises:
        ConfigError: one cannot have an adapter.
    """
    endings, heads = tuple(targets), head_names(clip, tower)
    found = {
        name: module
        for name, module in modules_of(clip, tower).items()
        if f"{name}.weight" not in heads  # trained whole: visual.head.proj is no "proj"
        and any(ends_as(name, ending) for ending in endings)
    }
    for name, module in found.items():
        reason = why_unfit(module)
        if reason is not None and type(module).__name__ != "NonDynamicallyQuantizableLinear":
            raise ConfigError(
                f"model.lora.targets: {name} cannot have an adapter: {reason}; leave it out, or "
                "set model.lora.targets to null to take the layers that can"
            )
    return found


def ends_as(name: str, ending: str) -> bool:
    """Whether a name ends with whole parts."""
    return name == ending or name.endswith(f".{ending}")


def pattern_of(names: Iterable[str], clip: nn.Module) -> str:
    """A regular expression that matches these modules of a model and no other, as short as can be.

    peft reads it from ``adapter_config.json``. A list of names would not do: peft matches endings,
    and ``transformer.resblocks.0.attn`` of the text tower is one of the image tower's.
    """
    wanted = set(names)
    others = {name for name, _ in clip.named_modules()} - wanted
    patterns: dict[str, list[str]] = {}
    for name in sorted(wanted):
        patterns.setdefault(re.sub(r"\d+", r"\\d+", re.escape(name)), []).append(name)
    parts: list[str] = []
    for pattern, covered in patterns.items():
        is_exact = not any(re.fullmatch(pattern, other) for other in others)
        parts += [pattern] if is_exact else [re.escape(name) for name in covered]
    return "|".join(parts)


def describe_names(names: Iterable[str]) -> str:
    """The last parts of names with how often each stands: ``12 attn, 12 c_fc``."""
    counts: dict[str, int] = {}
    for name in names:
        last = _ending(name)
        counts[last] = counts.get(last, 0) + 1
    return ", ".join(f"{number} {last}" for last, number in counts.items())


def known_endings(found: Mapping[str, nn.Module]) -> str:
    """The last parts of the names of layers, for a message."""
    return ", ".join(dict.fromkeys(map(_ending, found))) or "none"


def _ending(name: str) -> str:
    """The last part of a name, with the one before it where it is a number: ``downsample.0``."""
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-1].isdecimal() else parts[-1:])
