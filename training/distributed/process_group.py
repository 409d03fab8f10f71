"""Joining the process group of a run, and importing DeepSpeed so that it needs no compiler."""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from clipsys.errors import TrainingError
from clipsys.models.devices import choose_device, compute_in_full_float32
from clipsys.processes.allocation import keep_freed_memory
from clipsys.training.distributed.collectives import local_rank
from clipsys.training.distributed.launch import free_port

#: A collective that waits longer than this for another rank fails.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


def start_processes(asked_device: str) -> torch.device:
    """Joins the process group that the launcher's environment describes; a group of one without.

    Returns:
        This rank's device.

    Raises:
        ConfigError: the requested device is not there.
        TrainingError: the ranks do not meet.
    """
    device = choose_device(asked_device)
    if device.type == "cuda":
        device = torch.device("cuda", local_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
        compute_in_full_float32()
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        keep_freed_memory()
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    if os.environ["WORLD_SIZE"] == "1" and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ:
        # A world of one: the address that an earlier launch has left may be in use.
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    if not dist.is_initialized():
        _join("nccl" if device.type == "cuda" else "gloo")
    return device


def _join(backend: str) -> None:
    deepspeed = import_deepspeed()
    try:
        deepspeed.init_distributed(
            dist_backend=backend,
            auto_mpi_discovery=False,
            verbose=False,
            timeout=COLLECTIVE_TIMEOUT,
        )
    except (RuntimeError, ValueError) as error:  # torch's DistNetworkError and DistStoreError too
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        remedy = (
            "that port is in use: set MASTER_PORT to a free one, the same for every rank"
            if "EADDRINUSE" in str(error)
            else "check that every rank was started, by one launcher, and that this address is "
            "the first machine's; unset RANK and WORLD_SIZE if an earlier launch has left them"
        )
        raise TrainingError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} cannot meet the others at "
            f"{place} ({str(error).splitlines()[0]}); {remedy}"
        ) from error


def import_deepspeed() -> Any:
    """DeepSpeed, quiet, and without its compiled extension for shared-memory collectives.

    That extension only serves inference, yet DeepSpeed compiles it at every first start on a CPU,
    and fails where there is no C++ compiler (`build_shm_op` in deepspeed/comm/torch.py, 0.19.8).
    """
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    log = logging.getLogger("DeepSpeed")
    for handler in list(log.handlers):  # it writes to stdout, which is for results
        log.removeHandler(handler)
    log.propagate = True
    return deepspeed
