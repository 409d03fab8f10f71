"""Which device and precision an encoder or a run uses, and why."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from clipsys.errors import ConfigError

if TYPE_CHECKING:
    import torch

PRECISIONS = ("auto", "fp32", "bf16")

_logger = logging.getLogger(__name__)


def choose_device(asked: str = "auto") -> torch.device:
    """The device asked for; ``auto`` takes CUDA, then MPS, then the CPU, and logs the choice.

    Raises:
        ConfigError: the device asked for is not there.
    """
    import torch

    if asked == "auto":
        if torch.cuda.is_available():
            asked = "cuda"
        elif torch.backends.mps.is_available():
            asked = "mps"
        else:
            asked = "cpu"
        _logger.info("device: %s (the best one that this machine has)", asked)
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise ConfigError(
            f"device {asked!r} is not known; expected auto, cpu, cuda or mps"
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {asked!r} was asked for, but this machine has no CUDA device")
    return device


def choose_precision(asked: str, device: torch.device) -> str:
    """``fp32`` or ``bf16`` (autocast); ``auto`` decides by what the device multiplies fast.

    Raises:
        ConfigError: the precision is not known.
    """
    if asked not in PRECISIONS:
        raise ConfigError(f"precision {asked!r} is not known; expected {', '.join(PRECISIONS)}")
    if asked != "auto":
        return asked
    fast, reason = _bf16_is_fast(device)
    chosen = "bf16" if fast else "fp32"
    _logger.info("precision: %s (%s)", chosen, reason)
    return chosen


def choose_training_precision(asked: str, device: torch.device) -> str:
    """What a run computes in; ``auto`` decides by the device, and says why.

    Returns:
        ``fp32``; ``bf16`` (autocast over float32 parameters); ``bf16_params``; or ``fp16``.

    Raises:
        ConfigError: the device cannot compute in what was asked for.
    """
    import torch

    if asked == "auto":
        fast, reason = _bf16_is_fast(device)
        old_gpu = device.type == "cuda" and not fast
        chosen = "bf16" if fast else "fp16" if old_gpu else "fp32"
        _logger.info("precision: %s (%s)", chosen, reason)
        return chosen
    if (
        asked == "fp16"
        and device.type == "cpu"
        and not torch.ops.mkldnn._is_mkldnn_fp16_supported()
    ):
        raise ConfigError("engine.precision fp16: this processor cannot compute in fp16; use fp32")
    return asked


def _bf16_is_fast(device: torch.device) -> tuple[bool, str]:
    import torch

    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return fast, "the GPU multiplies bf16 natively" if fast else "the GPU has no native bf16"
    if device.type == "cpu":
        # AVX512-BF16 alone converts and multiplies, but was measured slower than fp32 on the small
        # convolutions of our CPU recipes; AMX tiles are what pays.
        amx = torch.cpu._is_amx_tile_supported()
        return amx, "the processor has AMX" if amx else "the processor has no AMX tiles"
    return False, f"autocast to bf16 is not used on {device.type}"
