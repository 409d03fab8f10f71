"""What changes a collection and what checks it: everything but opening and searching.

`clipsys.retrieval.Collection` is one of these.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipsys.errors import DataError, PruningRefusedError, QueryError
from clipsys.progress import progress
from clipsys.retrieval.encoders import light
from clipsys.retrieval.encoders.encoding import (
    ImageTextEncoder,
    TurnTakingEncoder,
    load_encoder,
    pin_of,
)
from clipsys.retrieval.indexes.planning import DEFAULT_RECALL, IndexPlan
from clipsys.retrieval.search.searching import NEAR_DUPLICATE
from clipsys.retrieval.search.view import View
from clipsys.retrieval.storage import filters
from clipsys.retrieval.storage.manifest import Manifest
from clipsys.retrieval.storage.store import Store
from clipsys.retrieval.upkeep.compaction import CompactionReport
from clipsys.retrieval.upkeep.corpora import Corpus, Entry, count_records
from clipsys.retrieval.upkeep.embedding import Embedder, retry_entry
from clipsys.retrieval.upkeep.pruning import PRUNE_LIMIT, find_vanished, prune
from clipsys.retrieval.upkeep.report import AddReport
from clipsys.retrieval.upkeep.writing import Writer, writing

if TYPE_CHECKING:
    from clipsys.retrieval.indexes.tuning import TuningQueries
    from clipsys.retrieval.upkeep.duplicates import DuplicateGroup
    from clipsys.retrieval.upkeep.migration import MigrationOptions
    from clipsys.retrieval.upkeep.repairing import RepairReport
    from clipsys.retrieval.upkeep.verification import Fault


class KeptCollection:
    """A collection that can be brought up to date, mended and checked."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        store: Store,
        encoder: ImageTextEncoder | None,
        *,
        few_searches: bool = False,
        precision: str = "fast",
    ) -> None:
        """Use `clipsys.retrieval.Collection.create` or ``open``."""
        self.path = path
        #: Held around each call of the encoder; hold it to call the same encoder from elsewhere.
        self.encoder_lock = threading.Lock()
        self._data = path / manifest.edition
        self._pin = manifest.encoder
        self._store = store
        self._encoder = encoder
        self._precision = precision
        self._light_remembered = False
        self._view = View(path, manifest, store, few_searches=few_searches)

    def __len__(self) -> int:
        return self._store.count_items()

    @property
    def encoder(self) -> ImageTextEncoder:
        """The encoder, loaded now if it was not yet.

        Raises:
            ModelError: the manifest's model cannot be loaded.
            CollectionError: what lies there now is another model.
        """
        if self._encoder is None:
            with self.encoder_lock:
                if self._encoder is None:
                    self._encoder = load_encoder(self.path, self._pin, precision=self._precision)
        return self._encoder

    def add(
        self,
        *sources: str | Path,
        batch_size: int = 64,
        num_workers: int | None = None,
        show_progress: bool = True,
        prune_vanished: bool = False,
        prune_limit: float = PRUNE_LIMIT,
    ) -> AddReport:
        """Brings the collection up to date with folders, tables or shards.

        Files that are known and unchanged are recognised by size and modification time without
        being read, others by a hash of their content; changed ones are encoded again, moved ones
        keep their vector, new ones are added. What a source no longer has stays, unless pruning is
        asked for: it may be an unmounted drive. Images that cannot be used go to the failure
        ledger. Interrupted at any moment, it loses at most the batch in flight and ends without
        making an index of what it added, which is searched exactly until then; a second call
        resumes.

        Args:
            sources: see `clipsys.corpora.sources.iterate_source`.
            batch_size: images encoded at once.
            num_workers: decoding threads; None: one a processor.
            show_progress: draws a bar on stderr.
            prune_vanished: removes items that these sources gave once and no source gives now.
            prune_limit: the largest share of a source that pruning may remove.

        Raises:
            CollectionError: another writer is at work, the disk is full, or more has vanished than
                ``prune_limit`` allows; what was added until then stays.
            DataError: a source is missing, empty or unreadable; said before anything is written,
                except for a shard that turns out to be cut off.
        """
        total = count_records(sources, show_progress=show_progress)
        corpus = Corpus(sources)

        def prune_after(report: AddReport) -> None:
            if prune_vanished:
                vanished = find_vanished(self._store, corpus.seen, limit=prune_limit)
                report.pruned = prune(self._store, vanished)

        return self._embed(
            corpus,
            prune_after,
            total=total,
            batch_size=batch_size,
            num_workers=num_workers,
            show_progress=show_progress,
        )

    def _embed(
        self,
        entries: Iterable[Entry],
        then: Callable[[AddReport], None] = lambda _: None,
        *,
        total: int | None,
        show_progress: bool,
        **options: Any,
    ) -> AddReport:
        started = time.monotonic()
        with self._writing() as writer:
            embedder = Embedder(
                self._store,
                self._turns(),
                writer.commit,
                dim=self._pin.dim,
                **options,
            )
            shown = progress(f"indexing into {self.path.name}", total) if show_progress else None
            try:
                with shown or nullcontext(lambda _: None) as advance:
                    embedder.run(entries, advance)
                then(embedder.report)
            except (DataError, PruningRefusedError):
                # A source that breaks off again at every run must not keep the rest from the index.
                # Whoever interrupts a run, or has no room on the disk, is not kept waiting for one.
                writer.tidy_up()
                raise
            writer.tidy_up()
            if self._encoder is not None:
                self._remember_light_tower()
        embedder.report.seconds = time.monotonic() - started
        return embedder.report

    def remove(self, ids: Sequence[int]) -> int:
        """Deletes items; they are never returned again. Returns how many there were.

        A file that is still in its source comes back, under a new id, when that is indexed again.
        """
        with self._writing() as writer:
            num_removed = writer.delete(ids)
            writer.refresh_index()
        return num_removed

    def select(self, where: filters.Where) -> list[int]:
        """Ids of the items whose metadata match a filter, ascending.

        Raises:
            QueryError: the filter is malformed, or empty.
        """
        conditions = filters.parse_where(where)
        if not conditions:
            raise QueryError("an empty filter selects nothing; give a condition such as year<2020")
        ids: list[int] = self._store.select_ids(conditions).tolist()
        return ids

    def compact(self) -> CompactionReport:
        """Drops the vectors of deleted items, joins small segments, renews the index.

        Replaced files are deleted by the writer that comes after, a minute later at the earliest:
        searches that are under way, in other processes too, read them to their end.

        Raises:
            CollectionError: another writer is at work, a segment is damaged, or the disk is full.
        """
        with self._writing() as writer:
            return writer.compact()

    def repair(self) -> RepairReport:
        """Mends what `verify` finds, as far as it can be mended without a backup.

        Items whose vector is lost go to the failure ledger; `retry_failures` encodes them again.

        Raises:
            CollectionError: another writer is at work, or the database itself is damaged.
        """
        from clipsys.retrieval.upkeep.repairing import index_is_unsound, repair_data

        with self._writing() as writer:
            report = repair_data(self.path, writer.manifest, self._store)
            if index_is_unsound(self.path, writer.manifest, self._store):
                writer.publish_index()
                report.index_rebuilt = True
        report.remaining = [str(fault) for fault in self.verify()]
        return report

    def retry_failures(
        self,
        *,
        batch_size: int = 64,
        num_workers: int | None = None,
        show_progress: bool = True,
    ) -> AddReport:
        """Tries every file of the failure ledger again, changed or not; see `add`."""
        entries = [retry_entry(failure) for failure in self._store.failures()]
        return self._embed(
            entries,
            total=len(entries),
            batch_size=batch_size,
            num_workers=num_workers,
            show_progress=show_progress,
            retry_failures=True,
        )

    def migrate(
        self,
        encoder: ImageTextEncoder,
        *,
        model: str | None = None,
        options: MigrationOptions | None = None,
        show_progress: bool = True,
    ) -> AddReport:
        """Encodes every image anew with another model, beside the old vectors, then swaps.

        Items keep their ids. Readers, this object too, go on with the old vectors: open the
        collection again to search the new ones. A migration that was killed goes on when it is
        called again.

        Args:
            encoder: the new model.
            model: what `clipsys.load` takes to load it again; `encoder.spec` if None.
            options: how to encode, and what may be lost.
            show_progress: draws a bar on stderr.

        Raises:
            CollectionError: another writer is at work, the collection has this model already, or
                too many images cannot be read; the collection is as it was.
        """
        from clipsys.retrieval.upkeep.migration import MigrationOptions, migrate

        shown = progress(f"migrating {self.path.name}", len(self)) if show_progress else None
        with shown or nullcontext(lambda _: None) as advance:
            return migrate(
                self.path,
                encoder,
                pin_of(encoder, model),
                options=options or MigrationOptions(),
                advance=advance,
            )

    def build_index(
        self, *, memory_bytes: int | None = None, recall: float = DEFAULT_RECALL
    ) -> IndexPlan:
        """Builds a new index generation over all live items and publishes it.

        Args:
            memory_bytes: what building and holding it may take; None: half of the machine's.
            recall: recall@10 that is to be reached on held-out queries; 1 for an exact index.

        Returns:
            What was built, and why.

        Raises:
            CollectionError: the memory does not suffice, or the recall is not reached.
        """
        with self._writing() as writer:
            return writer.publish_index(memory_bytes=memory_bytes, recall=recall)

    def _writing(self) -> AbstractContextManager[Writer]:
        return writing(self.path, self._store, self._view, self._pin, self._tuning_queries)

    def _tuning_queries(self) -> TuningQueries:
        from clipsys.retrieval.indexes.tuning import caption_queries

        return caption_queries(self._turns(), self._store, self._view.snapshot())

    def _turns(self) -> TurnTakingEncoder:
        return TurnTakingEncoder(lambda: self.encoder, self.encoder_lock)

    def _remember_light_tower(self) -> None:
        if not self._light_remembered:
            self._light_remembered = True
            if light.open_light(self._data, self._pin) is None:
                with self.encoder_lock:
                    light.remember(self._data, self._pin, self._encoder)

    # ---- checking --------------------------------------------------------------------------

    def verify(self) -> list[Fault]:
        """Checks every invariant, reading every file. Returns what is wrong; empty when sound."""
        from clipsys.retrieval.upkeep.verification import verify

        return verify(self.path)

    def duplicates(
        self, threshold: float | None = None, *, show_progress: bool = True
    ) -> list[DuplicateGroup]:
        """Groups of items that are nearly the same; see `clipsys.retrieval.upkeep.duplicates`.

        Args:
            threshold: cosine from which two count as nearly the same; None: 0.95.
            show_progress: draws a bar on stderr.

        Raises:
            QueryError: the threshold is not a cosine above 0.
        """
        from clipsys.retrieval.upkeep import duplicates

        snapshot = self._view.snapshot()
        threshold = NEAR_DUPLICATE if threshold is None else threshold
        shown = progress(f"comparing {self.path.name}", len(snapshot)) if show_progress else None
        with shown or nullcontext(lambda _: None) as advance:
            groups = duplicates.find_groups(snapshot, threshold, advance=advance)
        found = []
        for group in groups:
            ids = snapshot.ids_N[group].tolist()
            items = self._store.items(ids)
            scores = duplicates.scores_with_first(snapshot, group)
            found.append(
                duplicates.DuplicateGroup(tuple(items[number] for number in ids), tuple(scores))
            )
        return found
