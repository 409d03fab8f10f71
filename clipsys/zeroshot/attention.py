"""Records the attention of a transformer while it runs, so that gradients reach it.

Fused attention never makes its probabilities. While a recorder is active, what calls it computes
them apart, with the same result to rounding::

    with AttentionRecorder() as recorder:
        features = model.encode_image(image)
    torch.autograd.grad(score(features), recorder.probabilities)

Both ways to it are covered: `scaled_dot_product_attention` (timm's towers) and
`multi_head_attention_forward` (`torch.nn.MultiheadAttention`, in open_clip's towers and poolings).
A recorder acts on its own thread alone.

B images, L queries, S keys, W width.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode


class AttentionRecorder(TorchFunctionMode):
    """Records what passes while it is active.

    Attributes:
        probabilities: those of each attention, (B, heads, L, S), in the order of the calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.probabilities: list[torch.Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._multi_head(inspect.signature(func).bind(*args, **kwargs).arguments), None
        return func(*args, **kwargs)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if is_causal or enable_gqa or dropout_p:
            raise NotImplementedError("attention of an image tower that is causal or in groups")
        logits = query @ key.transpose(-2, -1) * (scale or 1 / math.sqrt(query.shape[-1]))
        if attn_mask is not None:
            blocked = attn_mask.dtype == torch.bool
            logits = logits.masked_fill(~attn_mask, -math.inf) if blocked else logits + attn_mask
        probabilities = logits.softmax(-1)
        self.probabilities.append(probabilities)
        return probabilities @ value

    def _multi_head(self, call: dict[str, Any]) -> torch.Tensor:
        """What `multi_head_attention_forward` computes, of (L, B, W) queries."""
        if call.get("key_padding_mask") is not None or call["bias_k"] is not None:
            raise NotImplementedError("attention of an image tower with a mask of its padding")
        if call.get("use_separate_proj_weight"):
            weights = [call[f"{name}_proj_weight"] for name in "qkv"]
        else:
            weights = call["in_proj_weight"].chunk(3)
        bias = call["in_proj_bias"]
        biases = (None, None, None) if bias is None else bias.chunk(3)
        inputs = (call["query"], call["key"], call["value"])
        query, key, value = (
            _by_head(F.linear(one, weight, part), call["num_heads"])
            for one, weight, part in zip(inputs, weights, biases, strict=True)
        )
        mixed = self._attend(query, key, value, call.get("attn_mask"))
        joined_LBW = mixed.permute(2, 0, 1, 3).flatten(2)
        return F.linear(joined_LBW, call["out_proj_weight"], call["out_proj_bias"])


def _by_head(values_LBW: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(L, B, W) -> (B, heads, L, W / heads)"""
    return values_LBW.reshape(*values_LBW.shape[:2], num_heads, -1).permute(1, 2, 0, 3)
