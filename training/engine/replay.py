"""Forward passes that leave no trace, and their repetition with the same random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

#: The state of the random generators of the CPU and, if the rank has one, of its GPU.
RandomState = tuple[torch.Tensor, torch.Tensor | None]


def uncompiled(compiled: bool) -> AbstractContextManager[Any]:
    """Runs compiled towers uncompiled: a forward pass or two are not worth compiling."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


@contextmanager
def kept_statistics(module: torch.nn.Module) -> Iterator[None]:
    """Undoes what forward passes inside do to running statistics: only pass 2 counts."""
    kept = [
        (buffer, buffer.clone())
        for name, buffer in module.named_buffers()
        if "running_" in name or "num_batches_tracked" in name
    ]
    yield
    for buffer, value in kept:
        buffer.copy_(value)


def random_state(device: torch.device) -> RandomState:
    """The random state before a forward pass, for `set_random_state`."""
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_device


def set_random_state(state: RandomState, device: torch.device) -> None:
    """Makes the next forward pass draw the random numbers of the one before."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
