"""Which device and precision an encoder or a run uses, and why."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from clipsys.errors import ConfigError

if TYPE_CHECKING:
    import torch

#: What an encoder may be asked to compute in.
PRECISIONS = ("auto", "fast", "fp32", "bf16", "int8")

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
    """``fp32``, ``bf16`` (autocast) or ``int8`` (images on the CPU), and says why.

    Args:
        asked: ``auto`` decides between fp32 and bf16 by what the device multiplies fast; ``fast``
            takes int8 too, where that is faster still.
        device: where the model runs.

    Raises:
        ConfigError: the precision is not known, or not to be had on this device.
    """
    if asked not in PRECISIONS:
        raise ConfigError(f"precision {asked!r} is not known; expected {', '.join(PRECISIONS)}")
    if asked == "int8":
        _check_int8(device)
    if asked not in ("auto", "fast"):
        return asked
    fast, reason = _bf16_is_fast(device)
    if asked == "fast" and not fast and _int8_is_fast(device):
        return "int8"  # said with the first images, which decide
    chosen = "bf16" if fast else "fp32"
    _logger.info("precision: %s (%s)", chosen, reason)
    return chosen


def _check_int8(device: torch.device) -> None:
    if device.type != "cpu":
        raise ConfigError(f"precision int8 is for CPUs, not for {device}; use bf16 or fp32")
    if not _int8_is_fast(device):
        raise ConfigError(
            "precision int8: this processor has no instructions for it (VNNI); use fp32"
        )


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


def _int8_is_fast(device: torch.device) -> bool:
    from clipsys.inference import int8

    return device.type == "cpu" and int8.is_fast()
