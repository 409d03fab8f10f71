"""Whether a launcher has started this process as one of several ranks, seen from the environment.

    RANK, WORLD_SIZE, MASTER_ADDR    torchrun, the deepspeed launcher, clipsys itself
    OMPI_COMM_WORLD_*                mpirun (Open MPI)
    SLURM_PROCID, SLURM_STEP_*       srun; an allocation has variables too, but no tasks
    PMI_*                            mpiexec (MPICH, Intel MPI), outside SLURM

Variables outlive what has set them: a shell inside an allocation, a notebook, a script that sbatch
runs without srun, an earlier launch whose variables were exported. One process is taken for one,
unless the variables say how many were started *beside it*; the decision is logged with its reason.
"""

from __future__ import annotations

import logging
import os
import subprocess
from typing import NamedTuple

from clipsys.errors import ConfigError

_logger = logging.getLogger(__name__)


class _Launch(NamedTuple):
    """What a launcher says of this process."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    host: str | None = None
    port: int | None = None


def join_environment(nproc: int | None = None) -> bool:
    """Whether a launcher has started this process as a rank; completes the variables of torch.

    Args:
        nproc: the number of processes that the user wants started here, if any.

    Raises:
        ConfigError: the variables contradict each other, or what the user wants.
    """
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        launch = _from_torch(nproc)
    elif nproc is not None:
        return False
    else:
        found = _from_mpirun() or _from_slurm() or _from_mpiexec()
        if found is None:
            return False
        launch = found
    os.environ |= {
        "RANK": str(launch.rank),
        "WORLD_SIZE": str(launch.world_size),
        "LOCAL_RANK": str(launch.local_rank),
    }
    if launch.host is not None:
        os.environ.setdefault("MASTER_ADDR", launch.host)
    if launch.port is not None:
        os.environ.setdefault("MASTER_PORT", str(launch.port))
    if launch.rank:  # what is decided is the same on every rank
        log = logging.getLogger("clipsys")
        log.setLevel(max(log.getEffectiveLevel(), logging.WARNING))
    elif launch.world_size > 1 and "CLIPSYS_LAUNCHER_PID" not in os.environ:
        _logger.info(
            "rank 0 of %d, as %s says; meeting at %s:%s",
            launch.world_size,
            launch.launcher,
            os.environ.get("MASTER_ADDR", "?"),
            os.environ.get("MASTER_PORT", "?"),
        )
    return True


def _from_torch(nproc: int | None) -> _Launch:
    advice = "unset RANK and WORLD_SIZE if an earlier launch has left them"
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if name not in os.environ:
            raise ConfigError(
                f"{other} is {os.environ[other]!r}, but {name} is not set: a launcher sets both; "
                f"{advice}"
            )
    launch = _Launch("RANK", _number("RANK"), _number("WORLD_SIZE"), _number("LOCAL_RANK", 0))
    _check(launch, "RANK", "WORLD_SIZE")
    _number("MASTER_PORT", 0)
    if launch.world_size > 1 and "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            f"WORLD_SIZE is {launch.world_size}, but MASTER_ADDR is not set: a launcher sets it; "
            f"{advice}"
        )
    if nproc is not None:
        raise ConfigError(
            f"--nproc {nproc} starts processes, but RANK and WORLD_SIZE say that this one is rank "
            f"{launch.rank} of {launch.world_size}; leave --nproc out, or {advice}"
        )
    return launch


def _from_slurm() -> _Launch | None:
    if "SLURM_JOB_ID" not in os.environ and "SLURM_PROCID" not in os.environ:
        return None
    # SLURM_NTASKS is the allocation's; the number of processes that srun has started is the step's.
    tasks = _number("SLURM_STEP_NUM_TASKS", 1)
    if "SLURM_PROCID" not in os.environ or "SLURM_STEP_ID" not in os.environ or tasks < 2:
        _say_one("SLURM variables are set, but srun has not started several tasks")
        return None
    if "SLURM_PTY_PORT" in os.environ:
        _say_one("srun --pty has started an interactive shell")
        return None
    launch = _Launch(
        "SLURM's step", _number("SLURM_PROCID"), tasks, _number("SLURM_LOCALID", 0),
        os.environ.get("MASTER_ADDR") or _first_host(),
        20000 + _number("SLURM_JOB_ID", 0) % 20000,
    )  # fmt: skip
    _check(launch, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    return launch


def _from_mpirun() -> _Launch | None:
    prefix = "OMPI_COMM_WORLD_"
    return _from_mpi("mpirun", f"{prefix}RANK", f"{prefix}SIZE", f"{prefix}LOCAL_RANK",
                     f"{prefix}LOCAL_SIZE")  # fmt: skip


def _from_mpiexec() -> _Launch | None:
    if "SLURM_STEP_ID" in os.environ:  # srun sets PMI's variables too, also for one shell
        return None
    return _from_mpi("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")


def _from_mpi(
    launcher: str, rank: str, size: str, local_rank: str, local_size: str
) -> _Launch | None:
    if rank not in os.environ or _number(size, 1) < 2:
        return None
    launch = _Launch(launcher, _number(rank), _number(size), _number(local_rank, 0))
    _check(launch, rank, size)
    if "MASTER_ADDR" in os.environ:
        return launch._replace(port=29500)
    if _number(local_size, 0) != launch.world_size:
        raise ConfigError(
            f"{launcher} has started {launch.world_size} processes on several machines; set "
            "MASTER_ADDR to the name of the first one and MASTER_PORT to a free port, for all"
        )
    # Ranks of one machine have one parent.
    return launch._replace(host="127.0.0.1", port=20000 + os.getppid() % 20000)


def _say_one(reason: str) -> None:
    _logger.info("no rank of several: %s", reason)


def _check(launch: _Launch, rank: str, size: str) -> None:
    if not 0 <= launch.rank < launch.world_size:
        raise ConfigError(
            f"{rank} is {launch.rank}, which is no rank of {size} {launch.world_size}; unset both "
            "if an earlier launch has left them"
        )


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise ConfigError(
            f"the environment variable {name} is {text!r}, which is not a number; unset it, or let "
            "the launcher set it"
        ) from None


def _first_host() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        found = subprocess.run(command, check=True, capture_output=True, text=True)
        return found.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise ConfigError(
            f"cannot expand the SLURM node list {nodes!r} ({error}); "
            "set MASTER_ADDR to the first node"
        ) from error
