"""Sets of item ids that FAISS can test while it searches."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from clipsys.retrieval.indexes.faiss_library import faiss_library
from clipsys.retrieval.storage.segments import Ints


class IdSet:
    """A set of ids for FAISS: a bitmap, one bit an id ever given, constant time a test."""

    def __init__(self, ids_N: Ints) -> None:
        """``ids_N``: ascending."""
        bits = np.zeros(int(ids_N[-1]) + 1 if len(ids_N) else 1, bool)
        bits[ids_N] = True
        self._bitmap = np.packbits(bits, bitorder="little")  # the selector does not own the bytes
        self.selector = faiss_library().IDSelectorBitmap(self._bitmap)
        self._count = len(ids_N)

    def __len__(self) -> int:
        return self._count

    def contains(self, ids: Ints) -> npt.NDArray[np.bool_]:
        """Which of some ids, of any shape, are in the set; -1 is not."""
        known = (ids >= 0) & (ids < 8 * len(self._bitmap))
        within = np.where(known, ids, 0)
        bits = self._bitmap[within >> 3] >> (within & 7).astype(np.uint8)
        found: npt.NDArray[np.bool_] = known & (bits & 1).astype(bool)
        return found
