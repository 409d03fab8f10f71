"""Towers cut before their heads: trunks that are computed once, and what is trained behind them.

Shapes: B rows, F width of a trunk's features, D width of the common space, L tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from clipsys.errors import ConfigError
from clipsys.inference.text_tower import text_encoder
from clipsys.models.parts import ModelParts
from clipsys.models.tokenization import PROBE_TEXTS
from clipsys.training.model.layers import Tower
from clipsys.training.model.two_towers import head_names

Encode = Callable[[torch.Tensor], torch.Tensor]


class Trunks:
    """Locked towers of a model without their heads, without gradients.

    Attributes:
        stored: the towers whose features are stored.
    """

    def __init__(
        self,
        parts: ModelParts,
        device: torch.device,
        *,
        stored: Sequence[Tower],
        precision: str,
        channels_last: bool,
    ) -> None:
        """
        Args:
            parts: open_clip's CustomTextCLIP with locked towers.
            device: where they run.
            stored: the towers whose features are stored.
            precision: ``bf16``, or anything else for float32.
            channels_last: feed images in the layout that convolutions prefer.

        Raises:
            ConfigError: the head of a tower cannot be told from what stands before it.
        """
        self.model: Any = parts.model.to(device).eval()
        self.device = device
        self._in_bf16 = precision in ("bf16", "bf16_params", "fp16")
        self._channels_last = channels_last
        self.stored = tuple(stored)
        for tower in self.stored:
            _require_head(self.model, tower)
        with self._without_heads():
            self._encode_text = text_encoder(self.model)

    def images(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, F) float32 of normalised images (B, 3, H, W)."""
        if self._channels_last:
            image_BCHW = image_BCHW.contiguous(memory_format=torch.channels_last)
        return self._run(self.model.visual, image_BCHW)

    def texts(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """(B, F) float32 of int64 tokens (B, L)."""
        return self._run(self._encode_text, tokens_BL)

    def fingerprint(self, parts: ModelParts, tower: Tower) -> str:
        """Equal if and only if features of this tower are, or its tokens."""
        if tower not in self.stored:
            return tokenizer_fingerprint(parts)
        return trunk_fingerprint(parts, tower)

    def _run(self, encode: Encode, inputs: torch.Tensor) -> torch.Tensor:
        in_bf16 = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._in_bf16)
        with torch.no_grad(), in_bf16, self._without_heads():
            return encode(inputs.to(self.device)).float()

    @contextmanager
    def _without_heads(self) -> Iterator[None]:
        with _headless(self.model, "image"), _headless(self.model, "text"):
            yield


class BehindTrunks(nn.Module):
    """What is trained of a model with stored features: heads, temperature, a text tower.

    Takes features where open_clip's model takes images, and tokens if the text tower is locked too.
    The parameters are those of the model, under their own names.
    """

    def __init__(self, model: Any, stored: Sequence[Tower]) -> None:
        """
        Args:
            model: open_clip's CustomTextCLIP.
            stored: the towers whose features are stored.
        """
        super().__init__()
        self.logit_scale = model.logit_scale
        if getattr(model, "logit_bias", None) is not None:
            self.logit_bias = model.logit_bias
        self._has_text_tower = "text" not in stored
        self.visual = _head_alone(model.visual)
        self.text: Any = model.text if self._has_text_tower else _head_alone(model.text)

    def encode_image(self, features_BF: torch.Tensor) -> torch.Tensor:
        """(B, D), not normalised."""
        return _apply(self.visual, features_BF)

    def encode_text(self, inputs: torch.Tensor) -> torch.Tensor:
        """(B, D), not normalised; of features (B, F), or of tokens (B, L)."""
        if not self._has_text_tower:
            return _apply(self.text, inputs)
        features: torch.Tensor = self.text(inputs)
        return features

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Of the text tower; heads have no blocks."""
        if self._has_text_tower:
            self.text.set_grad_checkpointing(enable)


def _head_alone(tower: Any) -> nn.Module:
    holder = nn.Module()
    name = _head_name(tower)
    if name is not None:
        setattr(holder, name, getattr(tower, name))
    return holder


def tokenizer_fingerprint(parts: ModelParts) -> str:
    """Equal for tokenizers that give the same tokens for some texts."""
    tokens = parts.tokenizer(PROBE_TEXTS).tolist()
    return hashlib.blake2b(repr(tokens).encode(), digest_size=16).hexdigest()


def trunk_fingerprint(parts: ModelParts, tower: Tower) -> str:
    """Equal if and only if a trunk gives equal features: weights, and what prepares its inputs."""
    heads = head_names(parts.model, tower)
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in parts.model.state_dict().items():
        own = name.startswith("visual.") == (tower == "image")
        if own and name not in heads and not name.startswith("logit_"):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(memoryview(values.numpy()))
    if tower == "image":
        digest.update(repr(parts.preprocessing).encode())
        vision = parts.config["vision_cfg"]
        digest.update(repr((vision.get("timm_model_name"), vision.get("timm_pool"))).encode())
    else:
        text = parts.config["text_cfg"]
        digest.update(repr((text.get("hf_pooler_type"), text.get("pool_type"))).encode())
        digest.update(tokenizer_fingerprint(parts).encode())
    return digest.hexdigest()


def _head_name(tower: Any) -> str | None:
    """The attribute of a tower that is its head; None where there is none to take off."""
    for name in ("head", "proj", "text_projection"):
        head = getattr(tower, name, None)
        if isinstance(head, nn.Parameter):
            return name
        if isinstance(head, nn.Module) and any(True for _ in head.parameters()):
            return name
    return None


def _require_head(model: Any, tower: Tower) -> None:
    """Refuses a tower whose trained head is inside another layer.

    Raises:
        ConfigError: as said.
    """
    module = model.visual if tower == "image" else model.text
    trained = [name for name in head_names(model, tower) if model.get_parameter(name).requires_grad]
    if trained and _head_name(module) is None:
        raise ConfigError(
            f"model.{tower}_tower: the head of {type(module).__name__} is a part of its pooling "
            f"layer ({trained[0]}), so that features before it cannot be stored; set locked_head, "
            "or unlock a block of the tower"
        )


@contextmanager
def _headless(model: Any, tower: Tower) -> Iterator[None]:
    """A tower that ends before its head while this holds."""
    module = model.visual if tower == "image" else model.text
    name = _head_name(module)
    if name is None:
        yield
        return
    head = getattr(module, name)
    # open_clip's transformers leave a projection out that is None; the others call a module.
    is_optional = name == "text_projection" or isinstance(head, nn.Parameter)
    setattr(module, name, None if is_optional else nn.Identity())
    try:
        yield
    finally:
        setattr(module, name, head)


def _apply(holder: Any, features_BF: torch.Tensor) -> torch.Tensor:
    name = _head_name(holder)
    if name is None:
        return features_BF
    head = getattr(holder, name)
    result: torch.Tensor = (
        features_BF @ head if isinstance(head, nn.Parameter) else head(features_BF)
    )
    return result
