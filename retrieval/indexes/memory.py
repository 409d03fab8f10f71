"""How much memory there is for this process: the machine's, or a container's where that is less.

A process that takes more than its control group allows is killed without a word, whatever the
machine has; one that takes more than its own limits (``ulimit``) is ended by FAISS, whose threads
cannot pass on that an allocation failed. Linux tells all of that; elsewhere the machine's total and
the limits are what is known.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path

_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
#: Limit, use, and what of the use is cached files, which make way: versions 2 and 1.
_FILES = (
    ("memory.max", "memory.current", ("active_file", "inactive_file")),
    (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_active_file", "total_inactive_file"),
    ),
)


def total_bytes() -> int:
    """What the machine has, or what the process's control group allows if that is less."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *(limit for limit, _ in _limits())])


def available_bytes() -> int:
    """What can be taken now without swapping or being killed; cached files make way."""
    machine = _kilobytes(_PROC / "meminfo", "MemAvailable")
    if machine is None:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(0, min([machine, *(limit - used for limit, used in _limits())]))


def _kilobytes(path: Path, name: str) -> int | None:
    """A line such as ``VmData:  1234 kB``, in bytes; None where there is none."""
    for line in _lines(path):
        key, _, value = line.partition(":")
        if key == name:
            return 1024 * int(value.split()[0])
    return None


def _limits() -> Iterator[tuple[int, int]]:
    """Limit and use, wherever this process or a control group that it is in has a limit."""
    yield from _own_limits()
    yield from _group_limits()


def _own_limits() -> Iterator[tuple[int, int]]:
    try:
        resource = importlib.import_module("resource")
    except ImportError:  # Windows
        return
    for kind, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY:
            yield limit, _kilobytes(_PROC / "self" / "status", name) or 0


def _group_limits() -> Iterator[tuple[int, int]]:
    for line in _lines(_PROC / "self" / "cgroup"):
        _, controllers, name = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = _CGROUP / controllers
        own = root / name.lstrip("/")
        # In a container the path may be the host's; then the root is the container's own group.
        for folder in [own, *(parent for parent in own.parents if parent.is_relative_to(root))]:
            for limit_file, use_file, cached in _FILES:
                limit, used = _number(folder / limit_file), _number(folder / use_file)
                if limit is not None and used is not None:
                    statistics = dict(line.split() for line in _lines(folder / "memory.stat"))
                    yield limit, used - sum(int(statistics.get(key, 0)) for key in cached)


def _number(path: Path) -> int | None:
    """The number in a file; None where there is none, or the word ``max``."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:
        return []


def default_memory_bytes() -> int:
    """Half of the memory that there is: the other half is the encoder's and everybody else's."""
    return total_bytes() // 2
