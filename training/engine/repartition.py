"""ZeRO's state of stages 1 and 2, divided again for another number of ranks.

DeepSpeed flattens each parameter group, pads it and gives every rank an equal part; its
``load_checkpoint`` (0.19.8) refuses parts of another number. The parts joined are the group, so
each rank cuts its own piece out of them: of the optimizer's moments, and of the float32 masters,
which are exact where the weights have 16 bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from clipsys.errors import ConfigError, TrainingError
from clipsys.training.distributed.collectives import rank, world_size

_MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")

#: Sections of DeepSpeed's configuration, and the precision that enables them.
_SIXTEEN_BITS = (("bf16", "bf16_params"), ("fp16", "fp16"))


class SavedBy(NamedTuple):
    """Who saved a checkpoint: the number of ranks, the ZeRO stage and the precision.

    Without a manifest, the precision of weights of 32 bits is not known: it is empty.
    """

    world_size: int
    zero_stage: int
    precision: str


def read_saved_by(checkpoint: Path) -> SavedBy:
    """Reads who saved a checkpoint from DeepSpeed's own file.

    For checkpoints without a manifest, which clipsys wrote before it had one.

    Raises:
        TrainingError: the file is missing or damaged, or the part of a rank is missing.
    """
    path = next((p for name in _MODEL_FILES if (p := checkpoint / name).is_file()), None)
    if path is None:
        raise TrainingError(f"{checkpoint}: {_MODEL_FILES[0]} is missing")
    try:
        state = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
        config = state["ds_config"]
        saved = SavedBy(
            int(state["world_size"]),
            int(config["zero_optimization"]["stage"]),
            next((precision for name, precision in _SIXTEEN_BITS if config[name]["enabled"]), ""),
        )
    except Exception as error:  # pickle and zip raise nearly anything on damaged bytes
        raise TrainingError(f"{path}: cannot be read ({type(error).__name__})") from error
    if saved.zero_stage:
        rank_files(checkpoint, saved.world_size)
    return saved


def rank_files(checkpoint: Path, saved_world_size: int) -> list[Path]:
    """The ranks' files of optimizer state, in the order of the ranks that saved them.

    Raises:
        TrainingError: one is missing.
    """
    found = []
    for number in range(saved_world_size):
        name = f"zero_pp_rank_{number}_mp_rank_00_optim_states.pt"
        # With bf16 enabled DeepSpeed puts this before the name.
        path = next((p for p in (checkpoint / name, checkpoint / f"bf16_{name}") if p.is_file()),
                    None)  # fmt: skip
        if path is None:
            raise TrainingError(f"{checkpoint}: {name} is missing")
        found.append(path)
    return found


def parts_to_divide(checkpoint: Path, saved: SavedBy) -> list[Path]:
    """The ranks' files of optimizer state, where they must be divided again; else none.

    Raises:
        ConfigError: they must, but the stage is 3, whose parts are cut parameter by parameter.
        TrainingError: one is missing.
    """
    if saved.zero_stage == 0 or saved.world_size == world_size():
        return []  # stage 0: the whole state is on every rank
    if saved.zero_stage == 3:
        raise ConfigError(
            f"{checkpoint}: was saved by {saved.world_size} processes, and ZeRO stage 3 cannot "
            "divide it again; resume with as many, or start a new run from its model "
            "(model.pretrained)"
        )
    return rank_files(checkpoint, saved.world_size)


def load_parts(optimizer: Any, parts: list[Path]) -> None:
    """Gives this rank its part of an optimizer state that another number of ranks has saved.

    Args:
        optimizer: DeepSpeed's, of stage 1 or 2, whose module has its weights already.
        parts: what `parts_to_divide` found.
    """
    # mmap: of each old part only what is cut out is read.
    saved = [
        torch.load(path, map_location="cpu", weights_only=False, mmap=True)["optimizer_state_dict"]
        for path in parts
    ]
    states = [part["base_optimizer_state"]["state"] for part in saved]
    own: dict[int, dict[str, Any]] = {}
    for group, master in enumerate(optimizer.single_partition_of_fp32_groups):
        own[group] = {}
        for name, first in states[0][group].items():
            if not torch.is_tensor(first) or first.dim() == 0:  # the step, equal on every rank
                own[group][name] = first
            else:
                own[group][name] = _cut([state[group][name] for state in states], master.numel())
        masters = [part["single_partition_of_fp32_groups"][group] for part in saved]
        master.data.copy_(_cut(masters, master.numel()))
    base = optimizer.optimizer
    base.load_state_dict({"state": own, "param_groups": base.state_dict()["param_groups"]})
    # What fp16 has learnt of its loss scale is the same on every rank.
    for name in ("loss_scaler", "dynamic_loss_scale"):
        setattr(optimizer, name, saved[0][name])


def _cut(parts: list[torch.Tensor], size: int) -> torch.Tensor:
    """This rank's ``size`` elements of the parts joined; zeros beyond their end."""
    own = torch.zeros(size, dtype=parts[0].dtype)
    start, offset = rank() * size, 0
    for part in parts:
        first, last = max(start, offset), min(start + size, offset + part.numel())
        if first < last:
            own[first - start : last - start] = part.flatten()[first - offset : last - offset]
        offset += part.numel()
    return own
