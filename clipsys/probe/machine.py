"""The machine as far as it decides how fast products are: what measurements are stored under."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import platform
from functools import cache
from pathlib import Path

#: The launcher of ranks sets it beside the OMP_NUM_THREADS that it chose itself.
SHARED_CORES = "CLIPSYS_SHARED_CORES"
#: Settings that limit which instructions the libraries use.
_LIMITS = (
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "MKL_ENABLE_INSTRUCTIONS",
)
_CONTROL_GROUPS = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """Cores that this process may use: those of the machine, its affinity and its quota."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = _quota_cores(_CONTROL_GROUPS)
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _quota_cores(root: Path) -> float | None:
    """Cores' worth of time that a container's control group may take; None: not limited."""
    try:
        limit, period = (root / "cpu.max").read_text(encoding="ascii").split()[:2]
    except (OSError, ValueError):
        try:  # version 1
            limit = (root / "cpu" / "cpu.cfs_quota_us").read_text(encoding="ascii").strip()
            period = (root / "cpu" / "cpu.cfs_period_us").read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return None
    try:
        cores = float(limit) / float(period)
    except (ValueError, ZeroDivisionError):  # "max"
        return None
    return cores if cores > 0 else None


def threads_are_set() -> bool:
    """Whether the user said how many threads there are, in which case no other number is tried."""
    return "OMP_NUM_THREADS" in os.environ and SHARED_CORES not in os.environ


def waiting_s() -> float:
    """Seconds that this process's threads were ready to run while others had the cores.

    Linux tells; elsewhere it is 0.
    """
    waited_ns = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # a thread that has ended
            waited_ns += int(path.read_text(encoding="ascii").split()[1])
    return waited_ns / 1e9


@cache
def processor() -> str:
    """The processor's name and generation."""
    fields = _cpuinfo()
    name = fields.get("model name") or platform.processor() or platform.machine()
    numbers = [fields[key] for key in ("cpu family", "model", "stepping") if key in fields]
    return f"{name} ({'/'.join(numbers)})" if numbers else name


@cache
def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    lines = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in lines}


def describe() -> dict[str, str]:
    """Everything that a measurement depends on beside the tower, for people to read too."""
    import torch

    from clipsys import __version__

    flags = _cpuinfo().get("flags", "")
    return {
        "processor": processor(),
        # A virtual machine may hide some of what its processor can do.
        "flags": hashlib.sha256(flags.encode()).hexdigest()[:12],
        "cores": str(available_cores()),
        "threads": str(torch.get_num_threads()),
        "limits": ",".join(f"{name}={os.environ[name]}" for name in _LIMITS if name in os.environ),
        "torch": torch.__version__,
        "clipsys": __version__,
    }
