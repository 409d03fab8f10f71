"""The model as DeepSpeed trains it: both towers and the temperature in one forward.

Shapes: B rows, D embedding width, L tokens.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from clipsys.errors import ConfigError
from clipsys.inference.text_tower import text_encoder
from clipsys.models.open_clip_models import ModelParts

#: Radford et al. 2021, section 2.5: the scale is kept from passing 100 "to prevent instability".
MAX_LOGIT_SCALE = 100.0

Encode = Callable[[torch.Tensor], torch.Tensor]
_PARAMETER_TYPES = {"bf16_params": torch.bfloat16, "fp16": torch.float16}


class Features(NamedTuple):
    """What a loss is taken of.

    Attributes:
        image_BD: unit norm, float32.
        text_BD: unit norm, float32.
        logit_scale: () float32, the scale and not its logarithm.
        logit_bias: () float32; None for models without one.
    """

    image_BD: torch.Tensor
    text_BD: torch.Tensor
    logit_scale: torch.Tensor
    logit_bias: torch.Tensor | None = None

    def to(self, device: torch.device) -> Features:
        """On another device."""
        return Features(*(None if part is None else part.to(device) for part in self))  # type: ignore[arg-type]

    @classmethod
    def stack(cls, parts: Sequence[Features], device: torch.device) -> Features:
        """The features of consecutive micro-batches as leaves of a new graph."""
        columns = (
            torch.cat([part.image_BD for part in parts]),
            torch.cat([part.text_BD for part in parts]),
            parts[0].logit_scale,
            parts[0].logit_bias,
        )
        return cls(
            *(
                None if column is None else column.detach().to(device).clone().requires_grad_()
                for column in columns
            )  # type: ignore[arg-type]
        )

    def gradients(self) -> Features:
        """The gradients that a loss left in these leaves."""
        return Features(*(None if part is None else part.grad for part in self))  # type: ignore[arg-type]

    def split(self, number: int) -> list[Features]:
        """Gradients of ``number`` micro-batches; those of scale and bias in equal shares."""
        bias = None if self.logit_bias is None else self.logit_bias / number
        return [
            Features(image_BD, text_BD, self.logit_scale / number, bias)
            for image_BD, text_BD in zip(
                self.image_BD.chunk(number), self.text_BD.chunk(number), strict=True
            )
        ]

    def dot(self, other: Features) -> torch.Tensor:
        """The sum of all products: a scalar whose gradient towards these features is ``other``."""
        total = (self.image_BD * other.image_BD).sum() + (self.text_BD * other.text_BD).sum()
        total = total + self.logit_scale * other.logit_scale
        if self.logit_bias is not None and other.logit_bias is not None:
            total = total + self.logit_bias * other.logit_bias
        return total


@dataclass(frozen=True)
class TowerOptions:
    """How the towers are trained.

    Attributes:
        precision: fp32; bf16 (autocast over float32 weights); bf16_params or fp16 (weights of 16
            bits, with float32 masters in the optimizer).
        grad_checkpointing: keeps no activations inside a tower's blocks, but computes them again.
        compile: torch.compile both towers.
    """

    precision: str = "fp32"
    grad_checkpointing: bool = False
    compile: bool = False


class ContrastiveModel(nn.Module):
    """open_clip's model with normalised outputs, autocast, and a clamped temperature.

    The clamp stands in forward, straight through: clamping the parameter after the step is undone
    by DeepSpeed's fp32 master copy, and a plain clamp has no gradient above the bound, so the scale
    could never come back. The scale is returned from forward because reading the parameter
    elsewhere mis-scales its gradient under accumulation, and gives size 0 under ZeRO-3.
    """

    def __init__(self, parts: ModelParts, options: TowerOptions = TowerOptions()) -> None:
        super().__init__()
        # Before ZeRO partitions anything: the comparison inside needs whole weights.
        self._encode_tokens: Encode = text_encoder(parts.model)
        self.clip = cast("Any", parts.model)
        self._encode_image: Encode = self.clip.encode_image
        self.precision = options.precision
        self._exact: dict[str, torch.Tensor] = {}
        if options.grad_checkpointing:
            self.clip.set_grad_checkpointing(True)
        if options.compile:
            _check_compiler()
            # In place, so that parameters keep their names; and of the text only the blocks, since
            # the cut to the longest caption looks at values, which breaks a graph.
            self.clip.visual.compile()
            text = getattr(self.clip, "text", self.clip)
            getattr(text, "transformer", text).compile(dynamic=True)

    def forward(self, image_BCHW: torch.Tensor, tokens_BL: torch.Tensor) -> Features:
        """Encodes float images (B, 3, H, W), normalised, and int64 tokens (B, L)."""
        values = dict(self.temperature())
        log_scale = self._master("logit_scale", values["logit_scale"])
        bound = log_scale.clamp(max=math.log(MAX_LOGIT_SCALE))
        scale = (log_scale + (bound - log_scale).detach()).exp().reshape(())
        bias = values.get("logit_bias")
        return Features(
            self.encode_image(image_BCHW),
            self.encode_tokens(tokens_BL),
            scale,
            None if bias is None else self._master("logit_bias", bias).reshape(()),
        )

    def temperature(self) -> Iterator[tuple[str, nn.Parameter]]:
        """``logit_scale`` (its logarithm) and, where there is one, ``logit_bias``."""
        for name in ("logit_scale", "logit_bias"):
            parameter = getattr(self.clip, name, None)
            if parameter is not None:
                yield name, parameter

    def keep_exact(self, masters: Mapping[str, torch.Tensor | None]) -> None:
        """Takes the float32 values of `temperature`'s parameters, which have 16 bits themselves.

        bf16 knows a log-scale of 4.6 in steps of 0.03. The exact value is used in forward; the
        gradient goes to the parameter.
        """
        self._exact = {name: value.detach() for name, value in masters.items() if value is not None}

    def _master(self, name: str, parameter: nn.Parameter) -> torch.Tensor:
        value = parameter.float()
        exact = self._exact.get(name)
        return value if exact is None else value + (exact.reshape(value.shape) - value).detach()

    def encode_image(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, D) unit-norm float32."""
        image_BCHW = image_BCHW.to(_PARAMETER_TYPES.get(self.precision, image_BCHW.dtype))
        with self._autocast(image_BCHW.device):
            features = self._encode_image(image_BCHW)
        return F.normalize(features.float(), dim=-1)

    def encode_tokens(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """(B, D) unit-norm float32."""
        with self._autocast(tokens_BL.device):
            features = self._encode_tokens(tokens_BL)
        return F.normalize(features.float(), dim=-1)

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def train(self, mode: bool = True) -> ContrastiveModel:
        """Training mode, but for what is frozen: its dropout and batch statistics rest too."""
        super().train(mode)
        if mode:
            rest_frozen(self.clip)
        return self


def rest_frozen(model: nn.Module) -> None:
    """Puts modules whose parameters are all frozen into evaluation mode."""
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def _check_compiler() -> None:
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        raise ConfigError(
            "engine.compile needs a C++ compiler, and none is on the PATH; install one (g++) or "
            "set engine.compile to false"
        )
