"""Layers with adapters that peft lacks, or has in a form that training cannot use.

peft (0.21) adds an adapter to `nn.MultiheadAttention` into its weights before each forward and
takes it off again after it: the frozen weights drift by rounding and are new parameters each time,
which DeepSpeed and momentum towers hold on to, ZeRO-3 fails (``ds_numel``), dropout does nothing,
and the output projection gets its adapter twice (huggingface/peft#3774). `AttentionAdapter` adds
up beside the frozen weights; its parameters have the names that peft gives them.

Shapes: B rows, L tokens, D width, H heads; X is any leading shape.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from peft.tuners.lora import Linear as LinearAdapter
from peft.tuners.lora.layer import MultiheadAttention as PeftAttention
from torch import nn
from torch.nn import functional as F  # noqa: N812

from clipsys.models.quantisation import dequantise, quantise

#: What peft calls the only adapter of a layer.
ADAPTER_NAME = "default"


class AttentionAdapter(PeftAttention):  # type: ignore[misc]
    """`nn.MultiheadAttention` with an adapter for its inputs and one for its output."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        need_weights: bool = False,
        attn_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, None]:
        """As open_clip calls attention: the attended values, projected, and no weights."""
        assert not need_weights, "open_clip asks for no weights of attention"
        base = self.get_base_layer()
        if query is key and key is value:
            parts = self._projected(query).chunk(3, dim=-1)
        else:
            each = (query, key, value)
            parts = tuple(self._projected(x).chunk(3, dim=-1)[i] for i, x in enumerate(each))
        if not base.batch_first:
            parts = tuple(part.transpose(0, 1) for part in parts)
        query_BHLD, key_BHLD, value_BHLD = (
            part.reshape(*part.shape[:2], base.num_heads, -1).transpose(1, 2) for part in parts
        )
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.reshape(-1, base.num_heads, *attn_mask.shape[1:])
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = ~attn_mask  # there True hides, here it shows
        attended_BHLD = F.scaled_dot_product_attention(
            query_BHLD,
            key_BHLD,
            value_BHLD,
            attn_mask=None
            if attn_mask is None
            else attn_mask.to(_mask_type(query_BHLD, attn_mask)),
            dropout_p=base.dropout if self.training else 0.0,
        )
        attended = attended_BHLD.transpose(1, 2).flatten(-2)
        if not base.batch_first:
            attended = attended.transpose(0, 1)
        return base.out_proj(attended), None

    def _projected(self, input_XD: torch.Tensor) -> torch.Tensor:
        """(X, 3 D): queries, keys and values."""
        base = self.get_base_layer()
        packed = getattr(base, "in_proj_packed", None)
        if packed is None:
            result = F.linear(input_XD, base.in_proj_weight, base.in_proj_bias)
        else:
            result = packed(input_XD)
            if base.in_proj_bias is not None:
                result = result + base.in_proj_bias
        if self.disable_adapters:
            return result
        down, up = self.lora_A[ADAPTER_NAME], self.lora_B[ADAPTER_NAME]
        change = up(down(self.lora_dropout[ADAPTER_NAME](input_XD)))
        return cast("torch.Tensor", result + change * self.scaling[ADAPTER_NAME])

    # peft's register the weights anew, for what its forward does to them.
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """That of any module."""
        return nn.Module.state_dict(self, *args, **kwargs)

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        """Those of any module."""
        return nn.Module.named_modules(self, *args, **kwargs)


def _mask_type(query: torch.Tensor, mask: torch.Tensor) -> torch.dtype:
    return mask.dtype if mask.dtype == torch.bool else query.dtype


class _QuantisedProduct(torch.autograd.Function):
    """x · Wᵀ with W in NF4: unpacked in forward and again in backward, and never kept."""

    @staticmethod
    def forward(ctx: Any, input_XI: torch.Tensor, layer: Quantised) -> torch.Tensor:
        ctx.layer = layer
        return F.linear(input_XI, layer.weight.to(input_XI.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient_XO,) = gradients
        return gradient_XO @ ctx.layer.weight.to(gradient_XO.dtype), None


class Quantised(nn.Module):
    """A frozen matrix in NF4.

    Its values are buffers, not parameters: neither optimizer nor averages touch them, and a
    checkpoint holds them as they are.
    """

    packed: torch.Tensor
    scales: torch.Tensor

    def __init__(self, weight: torch.Tensor, bias: nn.Parameter | None = None) -> None:
        """
        Args:
            weight: (out, in), of 32 bits.
            bias: kept as it is.
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        packed, scales = quantise(weight)
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.bias = bias

    @property
    def weight(self) -> torch.Tensor:
        """(out, in) float32."""
        shape = (self.out_features, self.in_features)
        return dequantise(self.packed, self.scales, shape, torch.float32)

    def forward(self, input_XI: torch.Tensor) -> torch.Tensor:
        """The product, and the bias if there is one."""
        if torch.is_autocast_enabled(input_XI.device.type):
            input_XI = input_XI.to(torch.get_autocast_dtype(input_XI.device.type))
        result = cast("torch.Tensor", _QuantisedProduct.apply(input_XI, self))
        return result if self.bias is None else result + self.bias.to(result.dtype)


def quantise_bases(model: nn.Module) -> int:
    """Puts the frozen matrices below adapters into NF4, in place; kernels stay as they are.

    Returns:
        How many values are packed.
    """
    num_values = 0
    for module in list(model.modules()):
        if isinstance(module, LinearAdapter):
            base = module.get_base_layer()
            quantised = Quantised(base.weight, base.bias)
            module.base_layer = quantised
            num_values += math.prod(base.weight.shape)
        elif isinstance(module, AttentionAdapter):
            base = module.get_base_layer()
            base.in_proj_packed = Quantised(base.in_proj_weight)
            num_values += math.prod(base.in_proj_weight.shape)
            base.in_proj_weight = None
    return num_values
