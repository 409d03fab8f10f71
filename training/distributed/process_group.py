"""Joining the process group of a run, and importing DeepSpeed so that it needs no compiler."""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from clipsys.models.devices import choose_device
from clipsys.training.distributed.collectives import local_rank
from clipsys.training.distributed.launch import free_port

#: A collective that waits longer than this for another rank fails.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


def start_processes(asked_device: str) -> torch.device:
    """Joins the process group that the launcher's environment describes; a group of one without.

    Returns:
        This rank's device.

    Raises:
        ConfigError: the device asked for is not there.
    """
    device = choose_device(asked_device)
    if device.type == "cuda":
        device = torch.device("cuda", local_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
        # Else cuDNN takes the products of convolutions in TF32, whose 10 bits are not the fp32 that
        # a recipe asks for; matrix products are float32 already. Other precisions do not notice.
        torch.backends.cudnn.allow_tf32 = False
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    deepspeed = import_deepspeed()
    if not dist.is_initialized():
        deepspeed.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=COLLECTIVE_TIMEOUT,
        )
    return device


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
