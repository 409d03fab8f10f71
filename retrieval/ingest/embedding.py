"""From records to a committed batch: reading and decoding ahead of the encoder, in threads.

    records --plan--> unchanged: nothing to read
                 '--> decode workers (read, hash, decode, resize) --in order--> encoder --> Batch

Pillow and hashlib release the interpreter lock, so threads keep the processors busy without copying
pixels between processes. The queue between workers and encoder is bounded: memory depends on the
batch size, not on the number of images. Every record ends in exactly one tally of the report.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from clipsys.errors import DataError, ImageDecodeError
from clipsys.processes.interruption import bounded_threads
from clipsys.retrieval.encoders.encoding import ImageTextEncoder
from clipsys.retrieval.ingest.loading import Job, Loader
from clipsys.retrieval.ingest.moving import MovedFiles
from clipsys.retrieval.ingest.pending import Pending
from clipsys.retrieval.ingest.report import AddReport
from clipsys.retrieval.ingest.sources import Entry
from clipsys.retrieval.ingest.texts import Texts, annotations_of, merge
from clipsys.retrieval.storage.annotations import annotated_keys
from clipsys.retrieval.storage.items import Batch, Failure, Item, ItemUpdate, NewItem
from clipsys.retrieval.storage.segments import Floats
from clipsys.retrieval.storage.sources import Claim, origins_of
from clipsys.retrieval.storage.store import Store

#: Records read ahead of the encoder, in batches.
_BATCHES_AHEAD = 2
#: Records of a second source for the same images that wait until those are committed.
_FILLS_WAITING = 10_000
_FAILURES_SHOWN = 5


@dataclass(frozen=True)
class EmbeddingOptions:
    """How records are encoded.

    Attributes:
        batch_size: images encoded at once.
        num_workers: decoding threads; None: one a processor, at most 16.
        retry_failures: try files again that failed before and have not changed.
    """

    batch_size: int = 64
    num_workers: int | None = None
    retry_failures: bool = False


class Embedder:
    """Turns records into committed batches.

    Args:
        store: looked up for what is known already.
        encoder: makes the vectors; not touched when there is nothing to encode.
        commit: takes a batch and the vectors (N, D) of its new items that have no location.
        dim: embedding width D.
        options: how to encode.
    """

    def __init__(
        self,
        store: Store,
        encoder: ImageTextEncoder,
        commit: Callable[[Batch, Floats], None],
        dim: int,
        options: EmbeddingOptions = EmbeddingOptions(),
    ) -> None:
        self.report = AddReport()
        self._store = store
        self._pending = Pending(
            encoder,
            commit,
            dim=dim,
            batch_size=options.batch_size,
            encoded=self._count_encoded,
        )
        self._batch_size = options.batch_size
        self._num_workers = options.num_workers or min(16, os.cpu_count() or 1)
        self._retry_failures = options.retry_failures
        self._loader = Loader(store, encoder)
        self._annotated = annotated_keys(store)
        self._moved = MovedFiles(store, self._annotated.keys)
        self._fills: list[Entry] = []
        self._source_error: DataError | None = None

    def run(self, entries: Iterable[Entry], advance: Callable[[int], Any]) -> None:
        """Works through all entries, committing as it goes.

        When it is interrupted, or the source breaks off, what is encoded by then is committed.

        Args:
            entries: none with the uri of an earlier one, unless it says so.
            advance: called with the number of records done.

        Raises:
            DataError: the source broke off; raised after what it gave is committed.
        """
        try:
            with bounded_threads(self._num_workers, "clipsys-decode") as pool:
                for job in self._jobs_ahead(entries, pool, advance):
                    self._finish(job)
                    advance(1)
                self._settle_fills()
                if self._source_error is not None:
                    raise self._source_error
        finally:
            self._pending.commit()

    def _jobs_ahead(
        self, entries: Iterable[Entry], pool: ThreadPoolExecutor, advance: Callable[[int], Any]
    ) -> Iterator[Job]:
        """Starts jobs ahead of their use and yields them in the order of the entries."""
        ahead: deque[Job] = deque()
        limit = _BATCHES_AHEAD * self._batch_size + self._num_workers
        try:
            for entry in entries:
                if entry.repeated:
                    advance(1)
                    self._fills.append(entry)
                    if len(self._fills) >= _FILLS_WAITING:
                        while ahead:
                            yield ahead.popleft()
                        self._settle_fills()
                    continue
                known = self._store.find(entry.record.uri)
                if self._settle_without_reading(entry, known):
                    advance(1)
                    self._pending.commit_if_large()
                    continue
                load = pool.submit(self._loader.load, entry.record, known)
                ahead.append(Job(entry, known, load))
                if len(ahead) >= limit:
                    yield ahead.popleft()
        except DataError as error:  # a shard that breaks off: what it gave so far still counts
            self._source_error = error
        while ahead:
            yield ahead.popleft()

    def _settle_without_reading(self, entry: Entry, known: Item | None) -> bool:
        record = entry.record
        if record.mtime_ns is None:
            return False
        facts = (record.size_bytes, record.mtime_ns)
        if known is not None and (known.size_bytes, known.mtime_ns) == facts:
            self._update(entry, known)
            return True
        failure = None if self._retry_failures else self._store.find_failure(record.uri)
        if failure is not None and (failure.size_bytes, failure.mtime_ns) == facts:
            self._merge(entry, Texts(failure.captions, failure.metadata))
            self.report.known_failures += 1
            return True
        return False

    def _merge(
        self, entry: Entry, known: Texts | None, *, fills: bool = False, is_new_image: bool = False
    ) -> Texts:
        """The texts that a record's item has from now on; notes who gave what.

        ``is_new_image``: what describes the image that was there before goes.
        """
        given, source, uri = Texts.of_record(entry.record), entry.source, entry.record.uri
        origins = origins_of(self._store, uri) if source is not None else {}
        if source is not None and source not in origins:
            self._pending.batch.origins.append((source, uri))
        known, keys = known or Texts(), self._annotated
        if is_new_image:
            stale = annotations_of(known, origins, keys.of_image)
            known = known.without(Claim(keys=frozenset(stale)))
        texts, claims = merge(given, known, source, origins, fills=fills, annotated=keys.keys)
        self._note_claims(uri, claims)
        return texts

    def _note_claims(self, uri: str, claims: dict[str, Claim]) -> None:
        self._pending.batch.claims += [
            (source, uri, claim.captions, claim.keys) for source, claim in claims.items()
        ]

    def _settle_fills(self) -> None:
        """Adds what a second source of this run says of images that an earlier one gave."""
        self._pending.encode_waiting()
        self._pending.commit()
        fills, self._fills = self._fills, []
        for entry in fills:
            known = self._store.find(entry.record.uri)
            texts = self._merge(entry, Texts.of_item(known) if known else None, fills=True)
            if known is not None and Texts.of_item(known) != texts:
                facts = (known.id, known.size_bytes, known.mtime_ns)
                self._pending.batch.updates.append(
                    ItemUpdate(*facts, texts.captions, texts.metadata)
                )
                self.report.filled += 1
            self._pending.commit_if_large()
        self._pending.commit()

    def _finish(self, job: Job) -> None:
        record, known = job.entry.record, job.known
        try:
            loaded, location = self._loader.finish(job)
        except DataError as error:
            self._record_failure(job.entry, known, error)
            return
        if known is not None and loaded.content_hash == known.content_hash:
            self._update(job.entry, known)
            return
        if known is None and location is not None and job.entry.item_id is None:
            moved = self._moved.find(record.uri, loaded.content_hash)
            if moved is not None:
                self._move(job.entry, moved)
                return
        before = Texts.of_item(known) if known else self._left_by_failure(record.uri)
        texts = self._merge(job.entry, before, is_new_image=known is not None)
        item = NewItem(
            uri=record.uri,
            content_hash=loaded.content_hash,
            size_bytes=record.size_bytes,
            mtime_ns=record.mtime_ns,
            captions=texts.captions,
            metadata=texts.metadata,
            location=location,
            replaces=known.id if known is not None else None,
            id=job.entry.item_id,
        )
        if loaded.pixels_CHW is None:
            self._pending.batch.new.append(item)
            self.report.reused += 1
            return
        self._pending.add(item, loaded.pixels_CHW)

    def _left_by_failure(self, uri: str) -> Texts:
        """The annotations of an item whose vector was lost; the ledger remembers them."""
        failure = self._store.find_failure(uri) if self._annotated.keys else None
        known = Texts(metadata=failure.metadata) if failure is not None else Texts()
        origins = origins_of(self._store, uri) if failure is not None else {}
        return Texts(metadata=annotations_of(known, origins, self._annotated.keys))

    def _update(self, entry: Entry, known: Item) -> None:
        record = entry.record
        texts = self._merge(entry, Texts.of_item(known))
        facts = (record.size_bytes, record.mtime_ns)
        if (known.size_bytes, known.mtime_ns) == facts and Texts.of_item(known) == texts:
            self.report.unchanged += 1
            return
        self._pending.batch.updates.append(
            ItemUpdate(known.id, *facts, texts.captions, texts.metadata)
        )
        self.report.updated += 1

    def _move(self, entry: Entry, item: Item) -> None:
        """Gives an item the new place of its file."""
        record, source = entry.record, entry.source
        kept = self._moved.kept_claims(item, source) if source is not None else {}
        given = Texts.of_record(record)
        texts, claims = merge(
            given, Texts.of_item(item), source, kept, annotated=self._annotated.keys
        )
        if source is not None:
            self._pending.batch.origins += [(name, record.uri) for name in (*kept, source)]
        self._note_claims(record.uri, {**kept, **claims})
        self._pending.batch.updates.append(
            ItemUpdate(
                item.id,
                record.size_bytes,
                record.mtime_ns,
                texts.captions,
                texts.metadata,
                moved_from=item.uri,
                moved_to=record.uri,
            )
        )
        self.report.moved += 1

    def _record_failure(self, entry: Entry, known: Item | None, error: DataError) -> None:
        record = entry.record
        reason = error.reason if isinstance(error, ImageDecodeError) else "unreadable"
        # A file that could not even be read has no facts to recognise it by: it is tried again.
        facts = (None, None) if reason == "unreadable" else (record.size_bytes, record.mtime_ns)
        texts = self._merge(entry, Texts.of_item(known) if known else None)
        failure = Failure(
            record.uri,
            reason,
            str(error),
            *facts,
            captions=texts.captions,
            metadata=texts.metadata,
        )
        self._pending.batch.failures.append(failure)
        if len(self.report.first_failures) < _FAILURES_SHOWN:
            self.report.first_failures.append(failure)
        self.report.failed += 1
        self.report.reasons[reason] += 1

    def _count_encoded(self, items: list[NewItem]) -> None:
        replaced = sum(item.replaces is not None for item in items)
        self.report.changed += replaced
        self.report.added += len(items) - replaced
