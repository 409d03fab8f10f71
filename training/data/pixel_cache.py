"""Decoded images of a training set that is small enough, kept so that each is decoded once.

A file without a name, mapped into the trainer and its worker processes: the system's page cache
decides what is in memory, and the space is free again when the last process is gone, however it
went. An image is written before its flag, by whoever decodes it first; two that do so at once write
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

from clipsys.training.data.samples import DecodedImage

_logger = logging.getLogger(__name__)


class PixelCache:
    """N decoded images: (N,) groups, (N,) flags of those that are there, (N, 3, H, W) pixels."""

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
        """Keeps image ``number``."""
        self._rows[number] = image.pixels
        self._groups[number] = image.group
        self._flags[number] = 1


def cache_bytes(num_samples: int, size: tuple[int, ...]) -> int:
    """Size of a cache."""
    height, width = size
    return num_samples * (8 + 1 + 3 * height * width)


def make_cache(num_samples: int, size: tuple[int, int], *, limit_bytes: int) -> PixelCache | None:
    """A cache, or None where it would pass the limit or find no space."""
    if not 0 < cache_bytes(num_samples, size) <= limit_bytes:
        return None
    try:
        return PixelCache(num_samples, size)
    except OSError as error:
        _logger.info("decoded images are not kept: %s (%s)", error.strerror, tempfile.gettempdir())
        return None
