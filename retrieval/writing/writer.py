"""A writer's turn at a collection: commits of items, and index generations that follow them."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clipsys.errors import CollectionError
from clipsys.retrieval.indexes.generation import delete_stale, is_sound
from clipsys.retrieval.indexes.planning import DEFAULT_RECALL, IndexPlan, plan_upkeep
from clipsys.retrieval.search.view import View
from clipsys.retrieval.storage import durable
from clipsys.retrieval.storage.creation import INDEXES, LOCK_NAME, SEGMENTS
from clipsys.retrieval.storage.items import Batch
from clipsys.retrieval.storage.manifest import (
    EncoderPin,
    IndexGeneration,
    Manifest,
    read_manifest,
    write_manifest,
)
from clipsys.retrieval.storage.segments import Floats, delete_orphans, write_segment
from clipsys.retrieval.storage.store import Store
from clipsys.retrieval.writing.compaction import (
    GRACE_S,
    SEGMENTS_PER_TIER,
    CompactionReport,
    compact,
    due,
    join_small,
    retired,
)
from clipsys.retrieval.writing.relevance import Calibrator

if TYPE_CHECKING:
    from clipsys.retrieval.indexes.tuning import TuningQueries

_logger = logging.getLogger(__name__)


@contextmanager
def writing(
    folder: Path,
    store: Store,
    view: View,
    pin: EncoderPin,
    tuning_queries: Callable[[], TuningQueries] | None = None,
) -> Iterator[Writer]:
    """Holds the writer's lock, clears what a killed writer left, and yields the means to write.

    ``tuning_queries`` is asked only where an index has to be tuned.

    Raises:
        CollectionError: another writer is at work, or the collection was given to another model.
    """
    with durable.writer_lock(folder / LOCK_NAME, holder=str(folder)):
        manifest = read_manifest(folder)  # another process may have written since ours was read
        if not manifest.encoder.makes_same_vectors(pin):
            raise CollectionError(
                f"{folder}: its vectors are now of model {manifest.encoder.name}, not of "
                f"{pin.name}; open it again"
            )
        data = folder / manifest.edition
        store.add_later_tables()
        clear_leftovers(data, store)
        view.note_segment_times()
        delete_stale(data / INDEXES, manifest.index)
        manifest = clear_superseded(folder, manifest)
        yield Writer(folder, store, view, manifest, tuning_queries)


def clear_leftovers(data: Path, store: Store) -> None:
    """Deletes segments that no commit names, and those that were replaced a grace ago."""
    gone = due(store)
    if gone:
        for path in gone:
            (data / path).unlink(missing_ok=True)
        with store.changing() as (connection, _):
            connection.executemany("DELETE FROM retired WHERE path = ?", [(path,) for path in gone])
    known = [segment.name for segment in store.segments().values()]
    delete_orphans(data / SEGMENTS, [*known, *(Path(path).name for path in retired(store))])


def clear_superseded(folder: Path, manifest: Manifest) -> Manifest:
    """Deletes the edition before a migration, once its readers have had their grace."""
    if not manifest.superseded or time.time() - manifest.superseded_at < GRACE_S:
        return manifest
    for name in manifest.superseded:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    manifest = manifest.model_copy(update={"superseded": (), "superseded_at": 0.0})
    write_manifest(folder, manifest)
    return manifest


class Writer:
    """Changes a collection. Made by `writing`, for as long as the lock is held."""

    def __init__(
        self,
        folder: Path,
        store: Store,
        view: View,
        manifest: Manifest,
        tuning_queries: Callable[[], TuningQueries] | None = None,
    ) -> None:
        self._folder = folder
        self._data = folder / manifest.edition
        self._store = store
        self._view = view
        self._manifest = manifest
        self._tuning_queries = tuning_queries
        self._num_segments = 0

    @property
    def calibrator(self) -> Calibrator:
        """Makes what the relevance of text queries is measured by."""
        return Calibrator(self._data, self._manifest.encoder, self._view.current)

    @property
    def manifest(self) -> Manifest:
        """The manifest as it is now."""
        return self._manifest

    def commit(self, batch: Batch, vectors_ND: Floats) -> None:
        """Commits a batch: first its vectors, durably, then the transaction that names them."""
        segment = write_segment(self._data / SEGMENTS, vectors_ND) if len(vectors_ND) else None
        self._store.commit(batch, segment)
        self._num_segments += segment is not None
        if self._num_segments >= SEGMENTS_PER_TIER:
            self.join_small()

    def join_small(self) -> None:
        """Joins small segments where there are many."""
        self._num_segments = 0
        join_small(self._data / SEGMENTS, self._store, self._manifest.encoder.dim)

    def record_model(self, model: str) -> None:
        """Records in the manifest where the model lies."""
        pin = self._manifest.encoder.model_copy(update={"model": model})
        self._manifest = self._manifest.model_copy(update={"encoder": pin})
        write_manifest(self._folder, self._manifest)

    def tidy_up(self) -> None:
        """What follows a run of commits: small segments joined, the index brought up to date."""
        self.join_small()
        self.refresh_index()

    def compact(self) -> CompactionReport:
        """Drops the vectors of deleted items, and makes an index without them."""
        dim = self._manifest.encoder.dim
        report = compact(self._data / SEGMENTS, self._store, dim)
        self.refresh_index(at_once=True)
        return report

    def delete(self, ids: Sequence[int]) -> int:
        """Marks items as deleted. Returns how many were live."""
        return self._store.delete(ids)

    def refresh_index(self, *, at_once: bool = False) -> None:
        """Extends or replaces the current generation if it is damaged or covers too little.

        ``at_once``: a single item that it lacks, or a deleted one that it has, is too much.
        """
        from clipsys.retrieval.indexes.building import extend_index  # imports faiss

        snapshot, current = self._view.snapshot(), self._manifest.index
        if current is None or not is_sound(self._data / INDEXES, current):
            self.publish_index()
            return
        num_live = int(np.searchsorted(snapshot.ids_N, current.last_id, side="right"))
        upkeep = plan_upkeep(
            current.kind,
            num_trained=current.num_trained,
            num_covered=current.num_items,
            num_new=len(snapshot) - num_live,
            num_gone=current.num_items - num_live,
            at_once=at_once,
        )
        if upkeep == "extend":
            self._publish(extend_index(self._data / INDEXES, snapshot, current))
        elif upkeep == "build":
            self.publish_index()

    def publish_index(
        self, *, memory_bytes: int | None = None, recall: float = DEFAULT_RECALL
    ) -> IndexPlan:
        """Builds a generation over all live items and swaps the manifest to it.

        Args:
            memory_bytes: what building and holding it may take; None: half of the machine's.
            recall: recall@10 to be reached on held-out queries.

        Returns:
            What was planned and built.

        Raises:
            CollectionError: the memory does not suffice, or the recall is not reached.
        """
        from clipsys.retrieval.indexes.building import build_planned

        previous = self._manifest.index
        plan, generation = build_planned(
            self._data / INDEXES,
            self._view.snapshot(),
            generation=previous.generation + 1 if previous else 1,
            memory_bytes=memory_bytes,
            recall=recall,
            queries=self._tuning_queries,
        )
        self._publish(generation)
        return plan

    def _publish(self, generation: IndexGeneration) -> None:
        self._manifest = self._manifest.model_copy(update={"index": generation})
        write_manifest(self._folder, self._manifest)
        delete_stale(self._data / INDEXES, generation)
        _logger.debug("%s: published index generation %d", self._folder, generation.generation)
