"""The view of a reader: an index generation and a snapshot, following the writer.

The order matters: the index is taken before the items, so the items are never older than the index
and every id that the index was built over is known, as live or as gone.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from pathlib import Path

from clipsys.errors import CollectionError
from clipsys.retrieval.indexes.generation import LoadedIndex, load_index
from clipsys.retrieval.search.calibration import Background, sample_background
from clipsys.retrieval.search.ranking import Coverage, cover
from clipsys.retrieval.search.text_relevance import FILE_NAME as RELEVANCE_NAME
from clipsys.retrieval.search.text_relevance import TextRelevance, read_text_relevance
from clipsys.retrieval.storage.creation import INDEXES, SEGMENTS
from clipsys.retrieval.storage.manifest import FILE_NAME, IndexGeneration, Manifest, read_manifest
from clipsys.retrieval.storage.segments import SegmentReader
from clipsys.retrieval.storage.snapshot import Snapshot, empty_snapshot, follow
from clipsys.retrieval.storage.store import Store

_logger = logging.getLogger(__name__)

_MISSING = "the index file is missing; `clipsys index` on this collection builds it again"


class View:
    """Keeps up with a collection's database and manifest. Thread-safe."""

    def __init__(
        self, folder: Path, manifest: Manifest, store: Store, *, few_searches: bool = False
    ) -> None:
        # few_searches: an exact index is left aside, since comparing what it holds takes
        # milliseconds, and reading and checking it takes more.
        self._folder = folder
        self._data = folder / manifest.edition
        self._pin = manifest.encoder
        self._store = store
        self._few_searches = few_searches
        self._dim = manifest.encoder.dim
        self._lock = threading.RLock()
        self._snapshot = empty_snapshot(SegmentReader(self._data / SEGMENTS, self._dim))
        self._index: LoadedIndex | None = None
        self._tried: IndexGeneration | None = None  # loaded, or found to be unusable
        self._manifest_stamp: tuple[int, int] | None = None
        self._covered: tuple[LoadedIndex, Snapshot, Coverage] | None = None
        self._background: tuple[Snapshot, Background] | None = None
        self._text_relevance: tuple[tuple[int, int], TextRelevance | None] | None = None

    def check_segments(self) -> None:
        """Looks at the size and the time of every vector file; hashes one that has another time.

        Raises:
            CollectionError: one is missing, cut off or altered.
        """
        segments = self._snapshot.vectors
        segments.register(self._store.segments())
        segments.check()

    def note_segment_times(self) -> None:
        """Records the times of files that were found to be right, as of a copied collection.

        The next opening need not hash them again. Call with the writer lock held.
        """
        known = self._store.segments()
        hashed = self._snapshot.vectors.hashed()
        news = {
            segment_id: mtime_ns
            for segment_id, mtime_ns in hashed.items()
            if segment_id in known and known[segment_id].mtime_ns != mtime_ns
        }
        if news:
            self._store.note_segment_times(news)

    def snapshot(self) -> Snapshot:
        """The items as of the last commit."""
        with self._lock:
            self._snapshot = follow(self._snapshot, self._store)
            return self._snapshot

    def current(self) -> tuple[LoadedIndex | None, Snapshot]:
        """The published index, None where there is no sound one, and the items."""
        with self._lock:
            self._follow_manifest()
            return self._index, self.snapshot()

    def coverage(self, index: LoadedIndex | None, snapshot: Snapshot) -> Coverage | None:
        """How the two fit together, worked out once a commit; None where there is no index."""
        if index is None:
            return None
        covered = self._covered  # one read: another thread may replace it
        if covered is None or covered[0] is not index or covered[1] is not snapshot:
            covered = self._covered = (index, snapshot, cover(snapshot, index))
        return covered[2]

    def background(self, snapshot: Snapshot) -> Background:
        """The items that queries are compared with, taken once a commit."""
        taken = self._background
        if taken is None or taken[0] is not snapshot:
            taken = self._background = (snapshot, sample_background(snapshot))
        return taken[1]

    def text_relevance(self) -> TextRelevance | None:
        """What text queries are judged by, as it was last written; None where there is nothing."""
        try:
            status = (self._data / RELEVANCE_NAME).stat()
        except OSError:
            return None
        stamp = (status.st_mtime_ns, status.st_ino)
        read = self._text_relevance
        if read is None or read[0] != stamp:
            made = read_text_relevance(self._data, self._pin)
            read = self._text_relevance = (stamp, made)
        return read[1]

    def _follow_manifest(self) -> None:
        status = (self._folder / FILE_NAME).stat()
        stamp = (status.st_mtime_ns, status.st_ino)
        if stamp == self._manifest_stamp:
            return
        manifest = read_manifest(self._folder)
        if not manifest.encoder.makes_same_vectors(self._pin):
            _logger.warning(
                "%s: its vectors are now of model %s; this search still sees those of %s: "
                "open it again",
                self._folder,
                manifest.encoder.name,
                self._pin.name,
            )
            self._manifest_stamp = stamp
            return
        published = manifest.index
        if published is not None and published.kind == "flat" and self._few_searches:
            self._index, published = None, None
        while published is not None and published != self._tried:
            try:
                self._index = self._load(published)
                self._tried = published
            except FileNotFoundError:
                latest = read_manifest(self._folder).index
                if latest != published:  # a writer published the next one meanwhile
                    published = latest
                    continue
                self._search_without_index(published, f"{published.file}: {_MISSING}")
            except CollectionError as error:
                self._search_without_index(published, str(error))
        self._manifest_stamp = stamp

    def _load(self, published: IndexGeneration) -> LoadedIndex:
        loaded = load_index(self._data / INDEXES, published, self._dim)
        if self._few_searches:  # copying to a GPU takes longer than they do
            return loaded
        if self._index is not None and self._index.on_gpus is not None:
            self._index.on_gpus.release()  # else there may be no room for its successor
        from clipsys.retrieval.indexes.gpu import copy_to_gpus

        size_bytes = (self._data / INDEXES / published.file).stat().st_size
        on_gpus = copy_to_gpus(loaded.generation, loaded.faiss_index, size_bytes)
        return replace(loaded, on_gpus=on_gpus)

    def _search_without_index(self, generation: IndexGeneration, reason: str) -> None:
        # The index is derived: without it every search scans the vectors, exactly but more slowly.
        self._index, self._tried = None, generation
        _logger.warning("%s; until then every vector is compared", reason)
