"""Decoded images of a training set that is small enough, stored so that each is decoded once.

A file in the temporary folder, mapped by the ranks of a machine and by their worker processes: the
system's page cache decides what is in memory. It has a name only until all ranks have opened it, so
its space is free again when the last process is gone, even if it was killed. An image is written
before its flag, by the process that decodes it first; two that do so at once write the same.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import platform
import tempfile
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import numpy as np

from clipsys.training.data.samples import DecodedImage
from clipsys.training.distributed.collectives import gather_objects, rank

_logger = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 20
_PREFIX = "clipsys-pixels-"


class PixelCache:
    """N decoded images: (N,) groups, (N,) flags of those that are there, (N, 3, H, W) pixels."""

    def __init__(self, descriptor: int, num_samples: int, size: tuple[int, int]) -> None:
        """
        Args:
            descriptor: descriptor of a file of `cache_bytes`, zeros at first; the cache closes it.
            num_samples: N.
            size: (H, W).
        """
        self._shape = (num_samples, 3, *size)
        self._map(descriptor)

    def _map(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._memory = mmap.mmap(descriptor, cache_bytes(self._shape[0], self._shape[2:]))
        count = self._shape[0]
        self._groups = np.frombuffer(self._memory, dtype=np.int64, count=count)
        rest = np.frombuffer(self._memory, dtype=np.uint8, offset=self._groups.nbytes)
        self._flags, self._rows = rest[:count], rest[count:].reshape(self._shape)

    def __getstate__(self) -> dict[str, Any]:
        # Works while a process is being started, which is when a dataset goes to its workers.
        return {"shape": self._shape, "descriptor": reduction.DupFd(self._descriptor)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._shape = state["shape"]
        self._map(state["descriptor"].detach())

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def get(self, number: int) -> DecodedImage | None:
        """Image ``number``, to be read only; None if it is not there yet."""
        if not self._flags[number]:
            return None
        return DecodedImage(self._rows[number], int(self._groups[number]))

    def put(self, number: int, image: DecodedImage) -> None:
        """Stores image ``number``."""
        self._rows[number] = image.pixels
        self._groups[number] = image.group
        self._flags[number] = 1


def cache_bytes(num_samples: int, size: tuple[int, ...]) -> int:
    """Size of a cache."""
    height, width = size
    return num_samples * (8 + 1 + 3 * height * width)


def make_cache(num_samples: int, size: tuple[int, int], *, limit_bytes: int) -> PixelCache | None:
    """The cache of this machine, or None where it would pass the limit or find no space.

    Every rank calls it; ranks of one machine share a file.
    """
    size_bytes = cache_bytes(num_samples, size)
    if not 0 < size_bytes <= limit_bytes:
        return None
    # Containers of one machine may have the same name and different temporary folders.
    machines = gather_objects((platform.node(), tempfile.gettempdir()))
    makers = [machines.index(machine) for machine in machines]
    own: tuple[int, Path] | None = None
    reason = ""
    if makers[rank()] == rank():
        try:
            own = _make_file(size_bytes)
        except OSError as error:
            reason = error.strerror or str(error)
    try:
        return _join(own, makers, reason, num_samples, size)
    finally:
        if own is not None:  # every rank has opened it by now
            own[1].unlink(missing_ok=True)


def _join(
    own: tuple[int, Path] | None,
    makers: list[int],
    reason: str,
    num_samples: int,
    size: tuple[int, int],
) -> PixelCache | None:
    """This machine's cache, once all of its ranks have opened the file that one has made."""
    number = own[1].stat().st_ino if own else 0
    offers = gather_objects((own[1] if own else None, number, reason))
    path, number, reason = offers[makers[rank()]]
    descriptor: int | None = None
    if own is not None:
        descriptor = own[0]
    elif path is not None:
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDWR)
            if os.fstat(descriptor).st_ino != number:  # that of another container
                os.close(descriptor)
                descriptor = None
    gather_objects(None)  # from here on no rank needs the file's name
    if descriptor is None:  # this rank decodes again; others of its machine may share all the same
        reason = reason or "the file of another rank cannot be opened"
        _logger.info("decoded images are not kept: %s (%s)", reason, tempfile.gettempdir())
        return None
    return PixelCache(descriptor, num_samples, size)


def _make_file(size_bytes: int) -> tuple[int, Path]:
    """A file of zeros that has its space on the drive: its descriptor and name.

    Raises:
        OSError: the temporary folder has not as much space.
    """
    descriptor, name = tempfile.mkstemp(prefix=_PREFIX)
    try:
        # Now, rather than a SIGBUS when a page is first written to a full drive.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size_bytes)
        else:  # macOS
            _write_zeros(descriptor, size_bytes)
    except OSError:
        os.close(descriptor)
        Path(name).unlink(missing_ok=True)
        raise
    return descriptor, Path(name)


def _write_zeros(descriptor: int, size_bytes: int) -> None:
    zeros = bytes(_BLOCK_BYTES)
    left = size_bytes
    while left:
        left -= os.write(descriptor, zeros[: min(left, _BLOCK_BYTES)])
