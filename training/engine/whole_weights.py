"""Whole weights of a model that ZeRO divides, or whose weights of 16 bits have float32 masters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from clipsys.training.distributed.collectives import rank, world_size
from clipsys.training.distributed.process_group import import_deepspeed
from clipsys.training.model.trained import MOMENTUM_PREFIX


def exact_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Float32 copies of the parameters on the CPU, without those of the momentum towers."""
    return {
        name: parameter.detach().float().cpu().clone()
        for name, parameter in model.named_parameters()
        if not name.startswith(MOMENTUM_PREFIX)
    }


def set_masters(
    module: nn.Module,
    values: dict[str, torch.Tensor],
    device: torch.device,
    *,
    is_partitioned: bool,
) -> None:
    """Gives masters the exact values: DeepSpeed makes them from weights of 16 bits.

    Args:
        module: inside the engine.
        values: exact values by the name of the parameter; emptied, to free the memory.
        device: device of the masters.
        is_partitioned: whether parameters are divided among ranks (ZeRO stage 3).
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    for name, parameter in module.named_parameters():
        if name not in values or not parameter.requires_grad:
            continue
        value = values.pop(name).to(device)
        if is_partitioned:
            # The call for whole values fails where they do not divide among the ranks (0.19.8).
            padded = F.pad(value.flatten(), (0, -value.numel() % world_size()))
            safe_set_local_fp32_param(parameter, padded.chunk(world_size())[rank()])
        else:
            safe_set_full_fp32_param(parameter, value)


def exact_scalars(scalars: Iterable[tuple[str, nn.Parameter]]) -> dict[str, torch.Tensor]:
    """The float32 masters of a few parameters, such as the temperature."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(parameter) for name, parameter in scalars}


def gathered(part: nn.Module, *, is_partitioned: bool) -> AbstractContextManager[Any]:
    """A context in which divided parameters are whole. Every rank enters it."""
    parameters = list(part.parameters()) if is_partitioned else []
    if not parameters:
        return nullcontext()
    whole: AbstractContextManager[Any] = import_deepspeed().zero.GatheredParameters(parameters)
    return whole


def masters_of(part: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The float32 masters of a state dict's trained parameters. Every rank calls it."""
    from deepspeed.utils import safe_get_full_fp32_param

    masters = {}
    for name, parameter in part.named_parameters():
        master = safe_get_full_fp32_param(parameter)
        if parameter.requires_grad and master is not None:
            masters[name] = master.detach().cpu().reshape(state[name].shape).clone()
    return masters


def copied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict on the CPU, its floating-point tensors in float32."""
    return {
        name: tensor.detach().float().cpu().clone().contiguous()
        if tensor.is_floating_point()
        else tensor.detach().cpu().clone()
        for name, tensor in state.items()
    }


@contextmanager
def discovering_parameters(module: nn.Module, *, is_partitioned: bool) -> Iterator[None]:
    """Lets ZeRO-3 gather what a module reads of its children without calling them.

    DeepSpeed notices such parameters (the output projection of `nn.MultiheadAttention`) in the
    first forward of its engine, as ``DeepSpeedEngine._forward_prologue`` (0.19.8) has it; before
    the first training step a forward of the module alone would find them empty.
    """
    tables: list[Any] = [part._parameters for part in module.modules() if is_partitioned]
    tables = [table for table in tables if hasattr(table, "_in_forward")]
    for table in tables:
        table._in_forward = True
    try:
        yield
    finally:
        for table in tables:
            table._in_forward = False
