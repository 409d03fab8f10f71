"""Weights in NF4: four bits a value, for the frozen base of a model that adapters are trained on.

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", section 3: blocks of 64
values share a scale, and each value is one of 16 quantiles of a normal distribution. A weight is
off by about 9 % of its norm. bitsandbytes computes it, on CPUs and GPUs.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from clipsys.errors import ConfigError

if TYPE_CHECKING:
    import torch

BLOCK_SIZE = 64


def require_bitsandbytes() -> Any:
    """The functions of bitsandbytes.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "weights in NF4 (model.lora.quantised) need bitsandbytes, which is not installed; "
            "install clipsys[qlora], or leave the setting out"
        )
    # It announces on the way which faster kernels it did not find.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes.functional

    return bitsandbytes.functional


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed values (uint8) and the scale of each block (float32)."""
    values = weight.detach().float().flatten()
    padded = values.new_zeros(-(-len(values) // BLOCK_SIZE) * BLOCK_SIZE)
    padded[: len(values)] = values
    # One block a row: bitsandbytes 0.50 unpacks rows that are no multiple of a block to something
    # else on processors with AVX-512 (40 % off for rows of 32 values).
    packed, state = require_bitsandbytes().quantize_4bit(
        padded.view(-1, BLOCK_SIZE), blocksize=BLOCK_SIZE, quant_type="nf4"
    )
    return packed, state.absmax


def dequantise(
    packed: torch.Tensor, scales: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """The weight that `quantise` packed."""
    if packed.is_meta:
        return packed.new_empty(shape, dtype=dtype)
    functional = require_bitsandbytes()
    state = functional.QuantState(
        absmax=scales,
        shape=(len(scales), BLOCK_SIZE),
        dtype=dtype,
        blocksize=BLOCK_SIZE,
        quant_type="nf4",
        code=functional.get_4bit_type("nf4", device=scales.device),
    )
    blocks: torch.Tensor = functional.dequantize_4bit(packed, state)
    return blocks.flatten()[: math.prod(shape)].view(shape)


def as_quantised(weight: torch.Tensor) -> torch.Tensor:
    """A weight as it is after it was packed and unpacked."""
    packed, scales = quantise(weight)
    return dequantise(packed, scales, tuple(weight.shape), weight.dtype)


def quantised_names(layers: Iterable[str], state: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """The names of the weights of adapted layers that are held in NF4: matrices, no kernels."""
    for layer in layers:
        for name in (f"{layer}.weight", f"{layer}.in_proj_weight"):
            if name in state and state[name].ndim == 2:
                yield name
