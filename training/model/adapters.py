"""LoRA: small factors beside frozen weights are trained in their place.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models". peft adds them to open_clip's
model, whose modules keep their names: an adapted ``visual.x`` has its own weight as
``visual.x.base_layer.weight`` and the factors as ``visual.x.lora_A.default.weight`` and
``visual.x.lora_B.default.weight``. What leaves the engine has the names and the weights of the
plain model again (`Adapters.merged_weights`), so that all that reads a model folder goes on to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import nn

from clipsys.config import Settings
from clipsys.models.adapters import Adapter, Base, Pair, merged
from clipsys.training.model.layers import Tower

#: What peft puts into the names of an adapted layer's own weights, and of its factors.
BASE, FACTOR = ".base_layer", ".lora_"


class LoraConfig(Settings):
    """Adapters that are trained in the place of a tower's weights (LoRA; Hu et al. 2021)."""

    rank: PositiveInt = Field(16, description="width of the two factors of an adapter")
    alpha: PositiveFloat = Field(
        32.0, description="alpha / rank scales what an adapter adds to its layer"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="of what goes into an adapter")
    towers: tuple[Tower, ...] = Field(
        ("image", "text"),
        min_length=1,
        description="image, text; another tower is trained as without adapters",
    )
    targets: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="layers that get adapters, by the ends of their names, as peft takes them "
        "(attn, c_fc, c_proj); default: every attention, linear layer and convolution of the "
        "blocks that can have one and receives gradients",
    )
    quantised: bool = Field(
        False, description="hold the matrices below adapters in NF4 (QLoRA); needs bitsandbytes"
    )

    @model_validator(mode="after")
    def _check(self) -> LoraConfig:
        if len(set(self.towers)) < len(self.towers):
            raise ValueError(f"towers names {self.towers[0]} twice")
        return self


@dataclass(frozen=True)
class Adapters:
    """The adapters of a model that is trained.

    Attributes:
        config: peft's LoraConfig, for the adapter folder.
        scale: alpha / rank.
        base: the model that they are trained on.
        quantised: whether matrices below adapters are held in NF4.
        names: how peft names the layers, by their names in open_clip's model.
    """

    config: dict[str, Any]
    scale: float
    base: Base
    quantised: bool
    names: dict[str, str]

    def merged_weights(
        self, clip: nn.Module, state: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The plain model's state dict, with the adapters in its weights.

        Args:
            clip: the model with adapters, for what it holds in NF4.
            state: its whole state dict.
        """
        plain = {
            name.replace(BASE, ""): tensor
            for name, tensor in state.items()
            if FACTOR not in name and not name.endswith((".packed", ".scales"))
        }
        if self.quantised:
            plain |= _dequantised(clip)
        return merged(plain, Adapter(self._pairs(state), {}, self.scale))

    def adapter(
        self,
        clip: nn.Module,
        state: Mapping[str, torch.Tensor],
        *,
        with_statistics: bool,
        fingerprint: str,
    ) -> Adapter:
        """What an adapter folder of these weights holds.

        Args:
            clip: the model with adapters.
            state: its whole state dict.
            with_statistics: whether batch norm's statistics change in training.
            fingerprint: of the merged model.
        """
        trained = {n for n, one in clip.named_parameters() if one.requires_grad}
        if with_statistics:
            trained |= {n for n in state if ".running_" in n}
        kept = {n.replace(BASE, ""): state[n] for n in trained if FACTOR not in n}
        return Adapter(self._pairs(state), kept, self.scale, self.base, self.quantised, fingerprint)

    def _pairs(self, state: Mapping[str, torch.Tensor]) -> dict[str, Pair]:
        return {
            layer: Pair(
                state[f"{name}.lora_A.default.weight"], state[f"{name}.lora_B.default.weight"]
            )
            for layer, name in self.names.items()
        }


def _dequantised(clip: nn.Module) -> dict[str, torch.Tensor]:
    from clipsys.training.model.adapter_layers import Quantised

    return {
        name.replace(".in_proj_packed", ".in_proj_weight").replace(BASE, "")
        + ("" if name.endswith(".in_proj_packed") else ".weight"): module.weight.cpu()
        for name, module in clip.named_modules()
        if isinstance(module, Quantised)
    }
