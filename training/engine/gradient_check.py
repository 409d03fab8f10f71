"""Gradients that are not finite stop a run before they reach the weights.

The norm is taken for clipping in any case, over all ranks; looking at it costs nothing. DeepSpeed
(0.19.8) has its own ways with a norm that is not finite: without ZeRO it steps, with ZeRO it leaves
the step out and goes on. Only fp16 has a use for that: it is how its loss scale is found.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from clipsys.errors import TrainingError


class NonFiniteGradientError(TrainingError):
    """A gradient is NaN or infinite; weights and optimizer are as they were."""


def watch_norm(optimizer: Any, module: nn.Module, *, zero_stage: int) -> None:
    """Makes a ZeRO optimizer raise in its ``step``, once it has the norm, if that is not finite.

    Every rank raises: the norm is that of the gradients of all ranks.

    Args:
        optimizer: DeepSpeed's, of stage 1, 2 or 3.
        module: the module whose parameters are named.
        zero_stage: decides which method of DeepSpeed's takes the norm.
    """
    from deepspeed.runtime.utils import combine_grad_norm_groups

    name = "_get_norm_groups" if zero_stage == 3 else "scaled_global_norm"
    take_norm = getattr(optimizer, name)

    def watched(*arguments: Any, **options: Any) -> Any:
        norm = take_norm(*arguments, **options)
        refuse_unless_finite(combine_grad_norm_groups(norm) if zero_stage == 3 else norm, module)
        return norm

    setattr(optimizer, name, watched)


def refuse_unless_finite(norm: torch.Tensor | float, module: nn.Module) -> None:
    """Checks the norm of all gradients, before they are applied. Every rank calls it.

    Raises:
        NonFiniteGradientError: it names the parameters.
    """
    from deepspeed.runtime.utils import is_invalid_grad_norm

    if not is_invalid_grad_norm(norm):
        return
    raise NonFiniteGradientError(describe(module))


def describe(module: nn.Module) -> str:
    """Which gradients are not finite, as the beginning of a sentence. Every rank calls it."""
    names = list(_not_finite(module))
    if not names:
        return "the norm of the gradient is not finite, though each of its values is"
    more = f" and of {len(names) - 3} more parameters" if len(names) > 3 else ""
    return f"the gradient of {', '.join(names[:3])}{more} is not finite"


def _not_finite(module: nn.Module) -> Iterator[str]:
    from deepspeed.utils import safe_get_full_grad

    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        gradient = safe_get_full_grad(parameter)  # with ZeRO a collective
        if gradient is not None and not bool(torch.isfinite(gradient).all()):
            yield name.removeprefix("clip.")
