"""Blocks of features on disk, each complete or absent.

FOLDER/00012.npy    features of the samples of block 12: float16 (rows, F)
FOLDER/00012.npz    what belongs to them; written last, so that a block with it is complete

Any process may write any block: two that write the same one write the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from clipsys.errors import TrainingError

Halves = npt.NDArray[np.float16]
Array = npt.NDArray[Any]

#: Samples of a block: small ones let a run that was stopped repeat little; large data sets have
#: larger ones, since each is a file.
SMALL_BLOCK, LARGE_BLOCK = 256, 4_096
_MANY_SAMPLES = 65_536


def block_size(num_samples: int) -> int:
    """Samples of a block of a data set."""
    return SMALL_BLOCK if num_samples <= _MANY_SAMPLES else LARGE_BLOCK


class BlockStore:
    """The blocks of one tower over one data set."""

    def __init__(self, folder: Path, num_blocks: int) -> None:
        self.folder = folder
        self.num_blocks = num_blocks

    def missing(self) -> list[int]:
        """Numbers of the blocks that are not there yet."""
        return [number for number in range(self.num_blocks) if not self._info(number).is_file()]

    def write(self, number: int, features_RF: Halves, info: Mapping[str, Array]) -> None:
        """Writes a block."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self._features(number), lambda file: np.save(file, features_RF))
        _write(self._info(number), lambda file: np.savez(file, allow_pickle=False, **info))

    def features(self, number: int) -> Halves:
        """(rows, F), mapped from the file: read when it is used.

        Raises:
            TrainingError: the block is damaged, or was removed.
        """
        path = self._features(number)
        try:
            mapped: Halves = np.load(path, mmap_mode="r", allow_pickle=False)
            return mapped
        except (OSError, ValueError, EOFError) as error:
            raise self._damaged(path, error) from error

    def info(self, number: int) -> dict[str, Array]:
        """What belongs to the features of a block.

        Raises:
            TrainingError: the block is damaged, or was removed.
        """
        path = self._info(number)
        try:
            with np.load(path, allow_pickle=False) as stored:
                return dict(stored)
        except (OSError, ValueError, EOFError, KeyError) as error:
            raise self._damaged(path, error) from error

    def _damaged(self, path: Path, error: Exception) -> TrainingError:
        return TrainingError(
            f"{path}: stored features cannot be read ({str(error).splitlines()[0]}); remove "
            f"{self.folder} to compute them again"
        )

    def _features(self, number: int) -> Path:
        return self.folder / f"{number:05d}.npy"

    def _info(self, number: int) -> Path:
        return self.folder / f"{number:05d}.npz"


def _write(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    # Named by the process: ranks that lack the same block may write it at once.
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
