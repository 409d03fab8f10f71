"""The image tower without computations that its output does not depend on.

A vision transformer that is pooled at its class token needs only that token's output from its last
block: queries, projection and MLP of the other tokens are superfluous (7 % of ViT-B/32). Outputs
are compared to decide whether a tower is of this kind; any other tower runs unchanged. With chunks
that fit the caches (`clipsys.inference.threads`) it is 1.3 times as fast as open_clip's own forward
on two cores, with the same output to rounding.

The same forward with its matrix products in 8-bit integers is `int8_image_encoder`.

B images, C channels, H x W pixels, L tokens, W width of the tower, D of the embedding, P patches of
K values.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812

from clipsys.inference.equal_outputs import outputs_are_equal
from clipsys.inference.int8 import Int8Linear
from clipsys.inference.threads import EncodeImage

_logger = logging.getLogger(__name__)

#: Images that pass the tower together on a CPU: measured best for ViT-B/32 (8 to 32 are as good).
CPU_CHUNK = 16
#: The same in int8, where what is not a product counts for more (4 to 8 are as good).
INT8_CHUNK = 6

#: (…, I) -> (…, O), by a matrix and a bias
Product = Callable[[torch.Tensor], torch.Tensor]
#: weight (O, I), bias (O,) -> their product
MakeProduct = Callable[[torch.Tensor, torch.Tensor | None], Product]


def image_encoder(model: Any) -> EncodeImage:
    """The fastest exact way to encode images with this model.

    The model must hold its weights (before ZeRO-3 partitions them), on any device.
    """
    tower = _class_token_tower(model, _float_product)
    if tower is None:
        encode: EncodeImage = model.encode_image
        return encode
    _logger.debug("the last block of the image tower runs for the class token only")
    return tower


def int8_image_encoder(model: Any) -> EncodeImage | None:
    """The same in 8-bit integers on the CPU, an approximation: see `clipsys.inference.int8`.

    None for any other tower than a vision transformer that is pooled at its class token.
    """
    if _class_token_tower(model, _float_product) is None:
        return None
    return _ClassTokenTower(model.visual, Int8Linear)


def may_be_in_int8(model: Any) -> bool:
    """Whether the image tower has the parts that `int8_image_encoder` needs; outputs decide."""
    return _class_token_parts(model) is not None


def _float_product(weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> Product:
    return partial(F.linear, weight=weight_OI, bias=bias_O)


def _class_token_parts(model: Any) -> Any:
    """The image tower, if it has the parts of a vision transformer with a class token."""
    tower: Any = getattr(model, "visual", None)
    needed = (
        "conv1",
        "class_embedding",
        "positional_embedding",
        "ln_pre",
        "transformer",
        "ln_post",
    )
    if any(getattr(tower, name, None) is None for name in needed):
        return None
    return None if getattr(tower, "attn_pool", None) is not None else tower


def _class_token_tower(model: Any, make: MakeProduct) -> _ClassTokenTower | None:
    """The image tower, if it is a vision transformer that is pooled at its class token."""
    tower = _class_token_parts(model)
    if tower is None:
        return None
    size = getattr(tower, "image_size", None)
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    parameter = tower.class_embedding
    image_BCHW = torch.randn(
        2, 3, int(height or 0), int(width or 0), generator=torch.Generator().manual_seed(0)
    ).to(parameter.device, parameter.dtype)
    try:
        faster = _ClassTokenTower(tower, make)
    except AttributeError:
        return None  # not built like open_clip's own towers
    equal = outputs_are_equal(
        model, lambda: model.encode_image(image_BCHW), lambda: faster(image_BCHW)
    )
    return faster if equal else None


class _ClassTokenTower:
    """open_clip's vision transformer, up to the class token's features."""

    def __init__(self, tower: Any, make: MakeProduct) -> None:
        self._tower = tower
        self._patch_size = tower.conv1.kernel_size
        self._embed_patches = make(tower.conv1.weight.flatten(1), tower.conv1.bias)
        *blocks, last = tower.transformer.resblocks
        self._blocks = [_Block(block, make) for block in blocks]
        self._last = _LastBlock(last, make)

    def __call__(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Image (B, C, H, W) float, normalised -> features (B, D)."""
        tower = self._tower
        hidden_BLW = self._embed_patches(self._patches(image_BCHW))
        first_B1W = tower.class_embedding.to(hidden_BLW.dtype).expand(len(hidden_BLW), 1, -1)
        hidden_BLW = torch.cat([first_B1W, hidden_BLW], dim=1)
        hidden_BLW = tower.ln_pre(hidden_BLW + tower.positional_embedding.to(hidden_BLW.dtype))
        for block in self._blocks:
            hidden_BLW = block(hidden_BLW)
        features_BD: torch.Tensor = tower.ln_post(self._last(hidden_BLW)[:, 0])
        if tower.proj is not None:
            features_BD = torch.matmul(features_BD, tower.proj)
        return features_BD

    def _patches(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, P, K): what a convolution of kernel = stride multiplies its weights with."""
        tall, wide = self._patch_size
        batch, channels, height, width = image_BCHW.shape
        split = image_BCHW.view(batch, channels, height // tall, tall, width // wide, wide)
        return split.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class _Block:
    """A pre-norm residual block: (B, L, W) -> (B, L, W)."""

    def __init__(self, block: Any, make: MakeProduct) -> None:
        self._block = block
        attention, mlp = block.attn, block.mlp
        self._prepare(attention.in_proj_weight, attention.in_proj_bias, make)
        self._mix = make(attention.out_proj.weight, attention.out_proj.bias)
        self._widen = make(mlp.c_fc.weight, mlp.c_fc.bias)
        self._narrow = make(mlp.c_proj.weight, mlp.c_proj.bias)

    def _prepare(
        self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, make: MakeProduct
    ) -> None:
        """Makes the products that give queries, keys and values."""
        self._attend = make(weight_OI, bias_O)

    def __call__(self, hidden_BLW: torch.Tensor) -> torch.Tensor:
        """Attention and MLP, each added to what came in."""
        query, key, value = self._attend(self._block.ln_1(hidden_BLW)).chunk(3, dim=2)
        return self._finish(hidden_BLW, query, key, value)

    def _finish(
        self,
        hidden_BLW: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> torch.Tensor:
        block = self._block
        query, key, value = (self._heads(tensor) for tensor in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value)
        mixed_BLW = mixed.transpose(1, 2).flatten(2)
        hidden_BLW = hidden_BLW + block.ls_1(self._mix(mixed_BLW))
        wide = block.mlp.gelu(self._widen(block.ln_2(hidden_BLW)))
        outputs_BLW: torch.Tensor = hidden_BLW + block.ls_2(self._narrow(wide))
        return outputs_BLW

    def _heads(self, tensor_BLW: torch.Tensor) -> torch.Tensor:
        """(B, heads, L, W / heads)"""
        heads = self._block.attn.num_heads
        return tensor_BLW.view(*tensor_BLW.shape[:2], heads, -1).transpose(1, 2)


class _LastBlock(_Block):
    """The same for the class token alone: (B, L, W) -> (B, 1, W)."""

    def _prepare(
        self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, make: MakeProduct
    ) -> None:
        width = weight_OI.shape[1]
        bias_1, bias_2 = (None, None) if bias_O is None else (bias_O[:width], bias_O[width:])
        self._ask = make(weight_OI[:width], bias_1)
        self._answer = make(weight_OI[width:], bias_2)

    def __call__(self, hidden_BLW: torch.Tensor) -> torch.Tensor:
        """Every token is attended to; only the first one is worked out."""
        normed_BLW = self._block.ln_1(hidden_BLW)
        key, value = self._answer(normed_BLW).chunk(2, dim=2)
        return self._finish(hidden_BLW[:, :1], self._ask(normed_BLW[:, :1]), key, value)
