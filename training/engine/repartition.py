"""Optimizer state of ZeRO stages 1 and 2, divided anew for another number of ranks.

DeepSpeed flattens each parameter group, pads it and gives every rank an equal part; its
``load_checkpoint`` (0.19.8) refuses parts of another number. The parts joined are the padded group,
so they are joined here and cut again. fp32 weights need none of this: they are in the module.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from clipsys.errors import ConfigError
from clipsys.training.distributed.collectives import rank, world_size

_PART = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt$")


def parts_to_divide(checkpoint: Path, *, zero_stage: int) -> list[Path]:
    """The ranks' files of optimizer state, where they must be divided anew; else none.

    Raises:
        ConfigError: they must, but the stage is 3, whose parts are cut parameter by parameter.
    """
    numbered = {
        int(found[1]): path for path in checkpoint.iterdir() if (found := _PART.search(path.name))
    }
    if len(numbered) in (0, world_size()):  # none: stage 0, the whole state is on every rank
        return []
    if zero_stage == 3:
        raise ConfigError(
            f"{checkpoint}: was saved by {len(numbered)} processes, and ZeRO stage 3 cannot "
            "divide it anew; resume with as many, or start a new run from its model "
            "(model.pretrained)"
        )
    return [numbered[number] for number in sorted(numbered)]


def load_parts(optimizer: Any, parts: list[Path]) -> None:
    """Gives this rank its part of an optimizer state that another number of ranks has saved.

    Args:
        optimizer: DeepSpeed's, whose fp32 weights are loaded already.
        parts: what `parts_to_divide` found.
    """
    # mmap: of each old part only what is cut out is read.
    saved = [_base_state(path) for path in parts]
    state: dict[int, dict[str, Any]] = {}
    for group, weights in enumerate(optimizer.single_partition_of_fp32_groups):
        state[group] = {}
        for name, first in saved[0][group].items():
            if not torch.is_tensor(first) or first.dim() == 0:  # the step, equal on every rank
                state[group][name] = first
                continue
            whole = torch.cat([part[group][name] for part in saved])
            start, size = rank() * weights.numel(), weights.numel()
            own = torch.zeros(size, dtype=whole.dtype)
            kept = whole[start : start + size]
            own[: len(kept)] = kept
            state[group][name] = own
    base = optimizer.optimizer
    base.load_state_dict({"state": state, "param_groups": base.state_dict()["param_groups"]})


def _base_state(path: Path) -> dict[int, dict[str, Any]]:
    loaded = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
    state: dict[int, dict[str, Any]] = loaded["optimizer_state_dict"]["base_optimizer_state"][
        "state"
    ]
    return state
