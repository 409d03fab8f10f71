"""A writer's turn at a collection: commits of items, and index generations that follow them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from clipsys.errors import CollectionError
from clipsys.retrieval import durable
from clipsys.retrieval.creation import INDEXES, LOCK_NAME, SEGMENTS
from clipsys.retrieval.index import build_index, delete_stale, is_sound
from clipsys.retrieval.items import Batch
from clipsys.retrieval.manifest import EncoderPin, Manifest, read_manifest, write_manifest
from clipsys.retrieval.segments import Floats, delete_orphans, write_segment
from clipsys.retrieval.store import Store
from clipsys.retrieval.view import View

#: A new index generation is built once this many items, or this share of those covered, are not in
#: the current one or were deleted since. Up to then they are searched exactly beside it.
REBUILD_ITEMS = 1_000
REBUILD_SHARE = 0.1

_logger = logging.getLogger(__name__)


@contextmanager
def writing(folder: Path, store: Store, view: View, pin: EncoderPin) -> Iterator[Writer]:
    """Holds the writer's lock, clears what a killed writer left, and yields the means to write.

    Raises:
        CollectionError: another writer is at work, or the collection was given to another model.
    """
    with durable.writer_lock(folder / LOCK_NAME, holder=str(folder)):
        manifest = read_manifest(folder)  # another process may have written since ours was read
        if manifest.encoder != pin:
            raise CollectionError(
                f"{folder}: its vectors are of model {manifest.encoder.name} by now, not of "
                f"{pin.name}; open it again"
            )
        delete_orphans(folder / SEGMENTS, [segment.name for segment in store.segments().values()])
        delete_stale(folder / INDEXES, manifest.index)
        yield Writer(folder, store, view, manifest)


class Writer:
    """Changes a collection. Made by `writing`, for as long as the lock is held."""

    def __init__(self, folder: Path, store: Store, view: View, manifest: Manifest) -> None:
        self._folder = folder
        self._store = store
        self._view = view
        self._manifest = manifest

    def commit(self, batch: Batch, vectors_ND: Floats) -> None:
        """Commits a batch: first its vectors, durably, then the transaction that names them."""
        segment = write_segment(self._folder / SEGMENTS, vectors_ND) if len(vectors_ND) else None
        self._store.commit(batch, segment)

    def delete(self, ids: Sequence[int]) -> int:
        """Marks items as deleted. Returns how many were live."""
        return self._store.delete(ids)

    def refresh_index(self) -> None:
        """Builds a new generation if the current one is damaged or covers too little."""
        snapshot, current = self._view.snapshot(), self._manifest.index
        if current is not None and is_sound(self._folder / INDEXES, current):
            num_covered = int(np.searchsorted(snapshot.ids_N, current.last_id, side="right"))
            num_outdated = (len(snapshot) - num_covered) + (current.num_items - num_covered)
            if num_outdated < max(REBUILD_ITEMS, REBUILD_SHARE * current.num_items):
                return
        self.publish_index()

    def publish_index(self) -> None:
        """Builds a generation over all live items and swaps the manifest to it."""
        previous = self._manifest.index
        number = previous.generation + 1 if previous else 1
        generation = build_index(self._folder / INDEXES, self._view.snapshot(), generation=number)
        self._manifest = self._manifest.model_copy(update={"index": generation})
        write_manifest(self._folder, self._manifest)
        delete_stale(self._folder / INDEXES, generation)
        _logger.debug("%s: published index generation %d", self._folder, number)
