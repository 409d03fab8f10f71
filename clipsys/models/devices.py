"""Which device, precision and threads an encoder uses, and why."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from clipsys.errors import ConfigError
from clipsys.inference import int8
from clipsys.inference.image_tower import CPU_CHUNK, may_be_in_int8
from clipsys.inference.threads import Arrangement
from clipsys.probe.figures import acceptable
from clipsys.probe.probing import Work, probe, signature
from clipsys.probe.products import Product, record

#: What an encoder may be asked to compute in.
PRECISIONS = ("auto", "fast", "fp32", "bf16", "int8")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodingChoice:
    """How an encoder computes.

    Attributes:
        precisions: the one that is used, then what takes its place where results are refused.
        is_checked: whether the first images are compared with fp32.
        arrangement: arrangement of threads; None: as many as torch has, apart.
    """

    precisions: tuple[str, ...]
    is_checked: bool = False
    arrangement: Arrangement | None = None


def choose_device(asked: str = "auto") -> torch.device:
    """The requested device; ``auto`` takes CUDA, then MPS, then the CPU, and logs the choice.

    Raises:
        ConfigError: the requested device is unavailable.
    """
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


def compute_in_full_float32() -> None:
    """Keeps the convolutions of this process's GPU from taking float32 products in TF32.

    TF32 has 10 bits of fraction, and cuDNN uses it by default; torch's matrix products
    are float32 already. Other precisions are not affected.
    """
    torch.backends.cudnn.allow_tf32 = False


def choose_encoding(
    asked: str, device: torch.device, model: Any, *, name: str, image_size: tuple[int, int]
) -> EncodingChoice:
    """The requested precision; ``auto`` and ``fast`` are decided by a measurement on a CPU.

    A GPU with instructions for bf16 is many times as fast in it, which needs no measurement.

    Args:
        asked: ``auto`` decides between fp32 and bf16, ``fast`` takes int8 into account too.
        device: where the model runs.
        model: open_clip's, with whole weights.
        name: what the log calls the model.
        image_size: (height, width) of its images.

    Raises:
        ConfigError: the precision is not known, or this device cannot compute in it.
    """
    if asked not in PRECISIONS:
        raise ConfigError(f"precision {asked!r} is not known; expected {', '.join(PRECISIONS)}")
    if asked == "int8":
        _check_int8(device, model, name)
    if asked not in ("auto", "fast"):
        return EncodingChoice((asked,), is_checked=asked == "int8")
    if device.type != "cpu":
        chosen, reason = choose_by_device(device)
        _logger.info("precision: %s (%s)", chosen, reason)
        return EncodingChoice(("bf16", "fp32") if chosen == "bf16" else ("fp32",), is_checked=True)
    with_int8 = asked == "fast" and int8.is_fast() and may_be_in_int8(model)
    figures = probe(encoding_work(model, name, image_size, with_int8=with_int8))
    if figures is None:
        return EncodingChoice(("fp32",))
    return EncodingChoice(
        acceptable(figures.gflops), is_checked=True, arrangement=figures.arrangement
    )


def encoding_work(model: Any, name: str, image_size: tuple[int, int], *, with_int8: bool) -> Work:
    """What encoding images with this model computes over and over."""
    shape = (CPU_CHUNK, 3, *image_size)

    def products() -> tuple[Product, ...]:
        return record(model, lambda same: same.encode_image(torch.empty(shape, device="meta")))

    return Work(
        name=f"encoding with {name}",
        signature=signature(model, shape),
        products=products,
        precisions=("fp32", "bf16", "int8") if with_int8 else ("fp32", "bf16"),
    )


def _check_int8(device: torch.device, model: Any, name: str) -> None:
    if device.type != "cpu":
        raise ConfigError(f"precision int8 is for CPUs, not for {device}; use bf16 or fp32")
    if not int8.is_fast():
        raise ConfigError(
            "precision int8: this processor has no instructions for it (VNNI); use fp32"
        )
    if not may_be_in_int8(model):
        raise ConfigError(
            f"precision int8: the image tower of {name} is not a vision transformer "
            "pooled at its class token, the only kind that it is for; use fp32 or bf16"
        )


def choose_by_device(device: torch.device) -> tuple[str, str]:
    """``bf16`` or ``fp32`` by what a GPU has, and the reason in words."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "the GPU multiplies bf16 natively"
        return "fp32", "the GPU has no native bf16"
    return "fp32", f"autocast to bf16 is not used on {device.type}"
