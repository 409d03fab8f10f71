"""Decoded images of a training set that is small enough, kept so that each is decoded once.

A file without a name, mapped into the trainer and its worker processes: the system's page cache
decides what is in memory, and the space is free again when the last process is gone, however it
went. A row is written before its flag, by whoever decodes it first; two that do so at once write
the same.
"""

from __future__ import annotations

import logging
import mmap
import os
import tempfile
from multiprocessing import reduction
from typing import Any

import numpy as np
import numpy.typing as npt

_logger = logging.getLogger(__name__)


class PixelCache:
    """(N, 3, H, W) of uint8 pixels, with a flag for each row that is there."""

    def __init__(self, num_samples: int, size: tuple[int, int]) -> None:
        """
        Args:
            num_samples: N.
            size: (H, W).

        Raises:
            OSError: the temporary folder has not as much space.
        """
        self._shape = (num_samples, 3, *size)
        with tempfile.TemporaryFile(prefix="clipsys-pixels-") as file:
            # Now, rather than a SIGBUS when a page is first written to a full disc.
            os.posix_fallocate(file.fileno(), 0, cache_bytes(num_samples, size))
            self._map(os.dup(file.fileno()))

    def _map(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._memory = mmap.mmap(descriptor, cache_bytes(self._shape[0], self._shape[2:]))
        both = np.frombuffer(self._memory, dtype=np.uint8)
        self._flags, pixels = both[: self._shape[0]], both[self._shape[0] :]
        self._rows = pixels.reshape(self._shape)

    def __getstate__(self) -> dict[str, Any]:
        # Works while a process is being started, which is when a dataset goes to its workers.
        return {"shape": self._shape, "descriptor": reduction.DupFd(self._descriptor)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._shape = state["shape"]
        self._map(state["descriptor"].detach())

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def get(self, number: int) -> npt.NDArray[np.uint8] | None:
        """Row ``number``, (3, H, W), to be read only; None if it is not there yet."""
        return self._rows[number] if self._flags[number] else None

    def put(self, number: int, pixels: npt.NDArray[np.uint8]) -> None:
        """Keeps row ``number``."""
        self._rows[number] = pixels
        self._flags[number] = 1


def cache_bytes(num_samples: int, size: tuple[int, ...]) -> int:
    """Size of a cache."""
    height, width = size
    return num_samples * (1 + 3 * height * width)


def make_cache(num_samples: int, size: tuple[int, int], *, limit_bytes: int) -> PixelCache | None:
    """A cache, or None where it would pass the limit or find no space."""
    if not 0 < cache_bytes(num_samples, size) <= limit_bytes:
        return None
    try:
        return PixelCache(num_samples, size)
    except OSError as error:
        _logger.info("decoded images are not kept: %s (%s)", error.strerror, tempfile.gettempdir())
        return None
