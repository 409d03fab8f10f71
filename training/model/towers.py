"""The towers of a model and the heads of an objective, each tower as one call.

Shapes: B rows, D embedding width, L tokens.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from clipsys.errors import ConfigError
from clipsys.inference.text_tower import text_encoder, token_features

if TYPE_CHECKING:
    from typing_extensions import Self

#: Radford et al. 2021, section 2.5: the scale is kept from passing 100 "to prevent instability".
MAX_LOGIT_SCALE = 100.0

Encode = Callable[[torch.Tensor], torch.Tensor]
_PARAMETER_TYPES = {"bf16_params": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TowerOptions:
    """How the towers are trained.

    Attributes:
        precision: fp32; bf16 (autocast over float32 weights); bf16_params or fp16 (weights of 16
            bits, with float32 masters in the optimizer).
        grad_checkpointing: keeps no activations inside a tower's blocks, but computes them again.
        compile: torch.compile both towers.
        freeze_batch_norm: keeps the statistics of the model's batch norm as they are.
    """

    precision: str = "fp32"
    grad_checkpointing: bool = False
    compile: bool = False
    freeze_batch_norm: bool = False


class Towers(nn.Module):
    """open_clip's model and an objective's heads: normalised outputs, autocast, exact scalars.

    The scale's clamp stands in forward, straight through: clamping the parameter after the step is
    undone by DeepSpeed's fp32 master copy, and a plain clamp has no gradient above the bound, so
    the scale could never come back. Parameters without rows (scale, prototypes) must be read inside
    the forward of the module that DeepSpeed trains and returned from it: reading them elsewhere
    mis-scales their gradients under accumulation, and gives size 0 under ZeRO-3.
    """

    def __init__(
        self,
        clip: nn.Module,
        heads: nn.ModuleDict | None = None,
        options: TowerOptions = TowerOptions(),
        *,
        has_text: bool = True,
    ) -> None:
        """
        Args:
            clip: open_clip's model, or what has its ``visual`` and ``encode_image``.
            heads: what the objective trains beside it.
            options: precision, checkpointing, compilation.
            has_text: whether the model has a text tower.
        """
        super().__init__()
        # Before ZeRO partitions anything: the comparison inside needs whole weights.
        self._encode_tokens: Encode | None = text_encoder(clip) if has_text else None
        self.clip = cast("Any", clip)
        self.heads = nn.ModuleDict() if heads is None else heads
        self._encode_image: Encode = self.clip.encode_image
        self.precision = options.precision
        self.freezes_batch_norm = options.freeze_batch_norm
        #: Names of parameters of one element, which 16 bits are too coarse for.
        self._scalars = [name for name, one in self.named_parameters() if one.numel() == 1]
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

    def encode_image(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, D) unit-norm float32 of float images (B, 3, H, W), normalised."""
        return F.normalize(self.image_features(image_BCHW), dim=-1)

    def image_features(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, D) float32, as the tower gives them: what heads are put on."""
        image_BCHW = image_BCHW.to(_PARAMETER_TYPES.get(self.precision, image_BCHW.dtype))
        with self._autocast(image_BCHW.device):
            features = self._encode_image(image_BCHW)
        return features.float()

    def encode_tokens(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """(B, D) unit-norm float32 of int64 tokens (B, L)."""
        return F.normalize(self.text_features(tokens_BL), dim=-1)

    def text_features(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """(B, D) float32, as the tower gives them: what heads are put on."""
        assert self._encode_tokens is not None, "these towers have no text"
        with self._autocast(tokens_BL.device):
            features = self._encode_tokens(tokens_BL)
        return features.float()

    def token_features(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """(B, L, D) float32: what the tower makes of each token, projected as its pooled output."""
        with self._autocast(tokens_BL.device):
            features = token_features(self.clip, tokens_BL)
        return features.float()

    def head(self, name: str, features_BX: torch.Tensor) -> torch.Tensor:
        """What a head makes of float32 features, in float32."""
        features_BX = features_BX.to(_PARAMETER_TYPES.get(self.precision, features_BX.dtype))
        with self._autocast(features_BX.device):
            result: torch.Tensor = self.heads[name](features_BX)
        return result.float()

    def logit_scale(self, name: str = "clip.logit_scale") -> torch.Tensor:
        """() float32: the scale of the logits, at most 100; the parameter is its logarithm."""
        log_scale = self.scalar(name)
        bound = log_scale.clamp(max=math.log(MAX_LOGIT_SCALE))
        return (log_scale + (bound - log_scale).detach()).exp().reshape(())

    def logit_bias(self) -> torch.Tensor:
        """() float32: the bias of the logits."""
        return self.scalar("clip.logit_bias").reshape(())

    def scalar(self, name: str) -> torch.Tensor:
        """A parameter of one element by its name, in float32.

        bf16 knows a log-scale of 4.6 in steps of 0.03. The exact value is used in forward; the
        gradient goes to the parameter.
        """
        value = self.get_parameter(name).float()
        exact = self._exact.get(name)
        return value if exact is None else value + (exact.reshape(value.shape) - value).detach()

    def scalars(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of one element: temperature, bias, an objective's own."""
        for name in self._scalars:
            yield name, self.get_parameter(name)

    def keep_exact(self, masters: Mapping[str, torch.Tensor | None]) -> None:
        """Takes the float32 values of `scalars`, which have 16 bits themselves."""
        self._exact = {name: value.detach() for name, value in masters.items() if value is not None}

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def train(self, mode: bool = True) -> Self:
        """Training mode, but for what is frozen: its dropout and batch statistics rest too."""
        super().train(mode)
        if mode:
            rest_frozen(self)
            if self.freezes_batch_norm:
                rest_batch_norm(self.clip)
        return self


def rest_batch_norm(model: nn.Module) -> None:
    """Puts batch norm into evaluation mode; its scale and shift go on being trained.

    Statistics of a few rows, or of other images than those that the weights were trained on, spoil
    what the weights have learnt.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


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
