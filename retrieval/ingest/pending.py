"""What is read and not yet committed: images that wait for the encoder, and the next batch."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from clipsys.retrieval.encoders.encoding import ImageTextEncoder
from clipsys.retrieval.storage.items import Batch, NewItem
from clipsys.retrieval.storage.segments import Floats

#: A batch of the encoder is committed at once if the last commit is this many seconds ago. On a
#: CPU, where a batch takes longer than that, a kill loses the batch in flight; on a fast GPU it
#: loses the batches of the last second, and segments do not become needlessly small.
COMMIT_INTERVAL_S = 1.0
COMMIT_ITEMS = 4_096


class Pending:
    """Encodes waiting images in batches and commits what is complete.

    Args:
        encoder: makes the vectors; not touched while nothing waits.
        commit: takes a batch and the vectors (N, D) of its new items that have no location.
        dim: embedding width D.
        batch_size: images encoded at once.
        encoded: called with the items of each encoded batch.

    Attributes:
        batch: Everything of the next commit except the items that `encode_waiting` adds.
    """

    def __init__(
        self,
        encoder: ImageTextEncoder,
        commit: Callable[[Batch, Floats], None],
        *,
        dim: int,
        batch_size: int,
        encoded: Callable[[list[NewItem]], None],
    ) -> None:
        self.batch = Batch()
        self._encoder = encoder
        self._commit = commit
        self._dim = dim
        self._batch_size = batch_size
        self._count_encoded = encoded
        #: New items with their vectors, which enter in one step: an interrupt may fall between any
        #: two.
        self._encoded: list[tuple[list[NewItem], Floats]] = []
        self._waiting: list[tuple[NewItem, npt.NDArray[np.uint8]]] = []
        self._last_commit = time.monotonic()

    def add(self, item: NewItem, pixels_CHW: npt.NDArray[np.uint8]) -> None:
        """Lets an image wait for the encoder; encodes and commits where that is due."""
        self._waiting.append((item, pixels_CHW))
        if len(self._waiting) >= self._batch_size:
            self.encode_waiting()
            late = time.monotonic() - self._last_commit >= COMMIT_INTERVAL_S
            if late or self._num_uncommitted() >= COMMIT_ITEMS:
                self.commit()

    def encode_waiting(self) -> None:
        """Encodes all images that wait."""
        if not self._waiting:
            return
        items = [item for item, _ in self._waiting]
        vectors_ND = self._encoder.encode_pixels(np.stack([pixels for _, pixels in self._waiting]))
        self._waiting.clear()
        self._encoded.append((items, np.asarray(vectors_ND, np.float32)))
        self._count_encoded(items)

    def commit_if_large(self) -> None:
        """Commits once `COMMIT_ITEMS` are waiting for it."""
        if self._num_uncommitted() >= COMMIT_ITEMS:
            self.commit()

    def commit(self) -> None:
        """Commits everything except the images that wait for the encoder."""
        batch, encoded = self.batch, self._encoded
        self.batch, self._encoded = Batch(), []
        parts = [np.empty((0, self._dim), np.float32)]
        for items, vectors_ND in encoded:
            batch.new += items
            parts.append(vectors_ND)
        if len(batch):
            self._commit(batch, np.concatenate(parts))
        self._last_commit = time.monotonic()

    def _num_uncommitted(self) -> int:
        return len(self.batch) + sum(len(items) for items, _ in self._encoded)
