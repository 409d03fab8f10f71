"""DeepSpeed's settings of ZeRO: the stage, the size of buckets, what is offloaded.

A bucket is a buffer that DeepSpeed (0.19.8) allocates for the whole run and fills with gradients
before they are exchanged. Its default, 5e8 elements whatever the model's size, is 2 GB in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from clipsys.errors import ConfigError

#: Elements of a bucket where the recipe does not set its size: 200 MB in float32. Larger messages
#: are no faster on gloo or NCCL.
DEFAULT_ELEMENTS = 50_000_000
#: Without ZeRO, DeepSpeed flattens as many gradients at once; no setting changes it.
STAGE_0_ELEMENTS = 500_000_000
#: DeepSpeed wants an even number; the parts of a bucket are aligned too.
_ALIGNMENT = 1024


class ZeroSettings(Protocol):
    """The settings of `EngineConfig` that are about ZeRO."""

    @property
    def zero_stage(self) -> int:
        """0 to 3."""

    @property
    def bucket_mb(self) -> float | None:
        """Size of a bucket."""

    @property
    def overlap_comm(self) -> bool | None:
        """Whether gradients travel while others are computed."""

    @property
    def offload_optimizer(self) -> bool:
        """Whether the optimizer works in the host's memory."""

    @property
    def offload_parameters(self) -> bool:
        """Whether weights rest in the host's memory."""


def bucket_elements(settings: ZeroSettings, num_trained: int, *, width: int) -> int:
    """Elements of a bucket: never more than the gradients that there are.

    Args:
        settings: settings of the engine.
        num_trained: elements of all parameters that are trained.
        width: bytes of an element.
    """
    if settings.zero_stage == 0:
        return min(num_trained, STAGE_0_ELEMENTS)
    asked = DEFAULT_ELEMENTS if settings.bucket_mb is None else settings.bucket_mb * 1e6 / width
    capacity = max(1, min(int(asked), num_trained))
    return -(-capacity // _ALIGNMENT) * _ALIGNMENT


def num_buckets(settings: ZeroSettings) -> int:
    """Buckets that are held at once: one is filled while the other travels."""
    return 2 if settings.overlap_comm and settings.zero_stage in (1, 2) else 1


def zero_section(
    settings: ZeroSettings, num_trained: int, *, width: int, device_type: str
) -> dict[str, Any]:
    """The section ``zero_optimization`` of DeepSpeed's configuration.

    Raises:
        ConfigError: something is to be offloaded from a device whose memory is the host's.
    """
    section: dict[str, Any] = {"stage": settings.zero_stage}
    if settings.zero_stage == 0:
        return section
    elements = bucket_elements(settings, num_trained, width=width)
    section |= {"reduce_bucket_size": elements, "allgather_bucket_size": elements}
    if settings.zero_stage == 3:
        section["stage3_prefetch_bucket_size"] = elements
    if settings.overlap_comm is not None:
        section["overlap_comm"] = settings.overlap_comm
    for name, key in _OFFLOADS:
        if not getattr(settings, name):
            continue
        if device_type == "cpu":
            raise ConfigError(
                f"engine.{name} moves memory from a GPU to the host, and the run is on the CPU; "
                f"set engine.{name} to false"
            )
        section[key] = {"device": "cpu", "pin_memory": True}
    return section


_OFFLOADS = (("offload_optimizer", "offload_optimizer"), ("offload_parameters", "offload_param"))


def zero_faults(settings: ZeroSettings) -> Iterator[str]:
    """Settings that would do nothing, or cannot be carried out."""
    stage = settings.zero_stage
    for name in ("bucket_mb", "overlap_comm", "offload_optimizer", "offload_parameters"):
        if stage == 0 and getattr(settings, name) not in (None, False):
            yield (
                f"engine.{name} does nothing with engine.zero_stage 0; leave it out, or use stage "
                "1, 2 or 3"
            )
    if stage in (1, 2) and settings.offload_parameters:
        yield (
            f"engine.offload_parameters needs parameters that are divided, and engine.zero_stage "
            f"is {stage}; use stage 3"
        )
