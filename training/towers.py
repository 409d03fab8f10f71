"""The model as DeepSpeed trains it: both towers and the temperature in one forward."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from clipsys.errors import TrainingError
from clipsys.models import ModelParts, build_model, load_model
from clipsys.text_tower import text_encoder
from clipsys.training.recipe import ModelConfig

#: Radford et al. 2021, section 2.5: the scale is kept from passing 100 "to prevent instability".
MAX_LOGIT_SCALE = 100.0


class Features(NamedTuple):
    """(B, D) unit-norm float32 features, and the scale (not its logarithm)."""

    image_BD: torch.Tensor
    text_BD: torch.Tensor
    logit_scale: torch.Tensor


class ContrastiveModel(nn.Module):
    """open_clip's model with normalised outputs, autocast, and a clamped temperature.

    The clamp stands in forward, straight through: clamping the parameter after the step is undone
    by DeepSpeed's fp32 master copy, and a plain clamp has no gradient above the bound, so the scale
    could never come back. The scale is returned from forward because reading the parameter
    elsewhere mis-scales its gradient under accumulation, and gives size 0 under ZeRO-3.
    """

    def __init__(self, parts: ModelParts, *, precision: str = "fp32") -> None:
        super().__init__()
        # Before ZeRO partitions anything: the comparison inside needs whole weights.
        self._encode_tokens = text_encoder(parts.model)
        self.clip: Any = parts.model
        self.precision = precision

    def forward(self, image_BCHW: torch.Tensor, tokens_BL: torch.Tensor) -> Features:
        """Encodes float images (B, 3, H, W), normalised, and int64 tokens (B, L)."""
        log_scale = self.clip.logit_scale
        bound = log_scale.clamp(max=math.log(MAX_LOGIT_SCALE))
        scale = (log_scale + (bound - log_scale).detach()).float().exp().reshape(())
        return Features(self.encode_image(image_BCHW), self.encode_tokens(tokens_BL), scale)

    def encode_image(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, D) unit-norm float32."""
        with self._autocast(image_BCHW.device):
            features = self.clip.encode_image(image_BCHW)
        return F.normalize(features.float(), dim=-1)

    def encode_tokens(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """(B, D) unit-norm float32."""
        with self._autocast(tokens_BL.device):
            features = self._encode_tokens(tokens_BL)
        return F.normalize(features.float(), dim=-1)

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")


def initial_model(settings: ModelConfig) -> ModelParts:
    """The model that a run begins with: random weights, or pretrained ones.

    Raises:
        ModelError: the architecture or the weights are not known or do not load.
        TrainingError: the weights are of another architecture.
    """
    parts = build_model(settings.architecture, preprocess=settings.preprocess, for_training=True)
    if settings.pretrained:
        start = load_model(settings.pretrained)
        state = start.model.state_dict()
        state["logit_scale"] = state["logit_scale"].reshape(1)
        try:
            parts.model.load_state_dict(state)
        except RuntimeError as error:
            first = str(error).strip().splitlines()[1:2] or [str(error)]
            raise TrainingError(
                f"model.pretrained {settings.pretrained}: the weights do not fit "
                f"model.architecture ({first[0].strip()})"
            ) from error
    if settings.initial_logit_scale is not None:
        with torch.no_grad():
            scale: torch.Tensor = parts.model.logit_scale  # type: ignore[assignment]
            scale.fill_(math.log(settings.initial_logit_scale))
    return parts
