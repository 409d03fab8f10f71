"""From records to a committed batch: reading and decoding ahead of the encoder, in threads.

    records --plan--> unchanged: nothing to read
                 '--> decode workers (read, hash, decode, resize) --in order--> encoder --> Batch

Pillow and hashlib release the interpreter lock, so threads keep the processors busy without copying
pixels between processes. The queue between workers and encoder is bounded: memory depends on the
batch size, not on the number of images. Every record ends in exactly one tally of the report.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipsys.corpora.records import Record
from clipsys.corpora.sources import read_uri
from clipsys.errors import DataError, ImageDecodeError
from clipsys.retrieval.encoders.encoding import ImageTextEncoder
from clipsys.retrieval.ingest.report import AddReport
from clipsys.retrieval.ingest.sources import Entry
from clipsys.retrieval.storage.items import (
    Batch,
    Failure,
    Item,
    ItemUpdate,
    Location,
    NewItem,
    plain_text,
    to_json,
)
from clipsys.retrieval.storage.segments import Floats
from clipsys.retrieval.storage.store import Store

#: A batch of the encoder is committed at once if the last commit is this many seconds ago. On a
#: CPU, where a batch takes longer than that, a kill loses the batch in flight; on a fast GPU it
#: loses the batches of the last second, and segments do not become needlessly small.
COMMIT_INTERVAL_S = 1.0
COMMIT_ITEMS = 4_096
#: Records read ahead of the encoder, in batches.
_BATCHES_AHEAD = 2
_FAILURES_SHOWN = 5


@dataclass(frozen=True)
class _Loaded:
    """What a worker made of a record: pixels to encode; None where the vector is there already."""

    content_hash: str
    pixels_CHW: npt.NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class _Job:
    entry: Entry
    known: Item | None
    future: Future[_Loaded]


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
        self._encoder = encoder
        self._commit = commit
        self._dim = dim
        self._batch_size = options.batch_size
        self._num_workers = options.num_workers or min(16, os.cpu_count() or 1)
        self._retry_failures = options.retry_failures
        self._batch = Batch()
        #: New items with their vectors, which enter in one step: an interrupt may fall between any
        #: two.
        self._encoded: list[tuple[list[NewItem], Floats]] = []
        self._waiting: list[tuple[NewItem, npt.NDArray[np.uint8]]] = []
        self._last_commit = time.monotonic()
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
        pool = ThreadPoolExecutor(self._num_workers, thread_name_prefix="clipsys-decode")
        try:
            for job in self._jobs_ahead(entries, pool, advance):
                self._finish(job)
                advance(1)
            self._encode_waiting()
            if self._source_error is not None:
                raise self._source_error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            self._flush()

    def _jobs_ahead(
        self, entries: Iterable[Entry], pool: ThreadPoolExecutor, advance: Callable[[int], Any]
    ) -> Iterator[_Job]:
        """Starts jobs ahead of their use and yields them in the order of the entries."""
        ahead: deque[_Job] = deque()
        limit = _BATCHES_AHEAD * self._batch_size + self._num_workers
        try:
            for entry in entries:
                self._note_origin(entry)
                if entry.repeated:
                    advance(1)
                    continue
                record = entry.record
                known = self._store.find(record.uri)
                if self._settle_without_reading(record, known):
                    advance(1)
                    if self._num_uncommitted() >= COMMIT_ITEMS:
                        self._flush()
                    continue
                ahead.append(_Job(entry, known, pool.submit(self._load, record, known)))
                if len(ahead) >= limit:
                    yield ahead.popleft()
        except DataError as error:  # a shard that breaks off: what it gave so far still counts
            self._source_error = error
        while ahead:
            yield ahead.popleft()

    def _note_origin(self, entry: Entry) -> None:
        source, uri = entry.source, entry.record.uri
        if source is not None and not self._store.has_origin(source, uri):
            self._batch.origins.append((source, uri))

    def _settle_without_reading(self, record: Record, known: Item | None) -> bool:
        if record.mtime_ns is None:
            return False
        facts = (record.size_bytes, record.mtime_ns)
        if known is not None and (known.size_bytes, known.mtime_ns) == facts:
            self._update(record, known)
            return True
        failure = None if self._retry_failures else self._store.find_failure(record.uri)
        if failure is not None and (failure.size_bytes, failure.mtime_ns) == facts:
            self.report.known_failures += 1
            return True
        return False

    def _load(self, record: Record, known: Item | None, *, encode: bool = False) -> _Loaded:
        """Reads, hashes and, if its content is new, decodes a record. Runs in a worker.

        ``encode``: decodes it in any case.
        """
        data = record.read()
        content_hash = hashlib.blake2b(data, digest_size=20).hexdigest()
        is_known = known is not None and known.content_hash == content_hash
        if not encode and (is_known or self._store.find_vector(content_hash) is not None):
            return _Loaded(content_hash)
        return _Loaded(content_hash, self._encoder.read_pixels(data, uri=record.uri))

    def _loaded(self, job: _Job) -> tuple[_Loaded, Location | None]:
        """What the worker made of a record, and where its vector lies if that is known already.

        The place is looked up here, in the thread that commits: joining segments, which follows a
        commit, moves vectors, and a place that a worker saw may be gone before the next one.
        """
        loaded, known = job.future.result(), job.known
        if known is not None and loaded.content_hash == known.content_hash:
            return loaded, None
        location = (
            None if loaded.pixels_CHW is not None else self._store.find_vector(loaded.content_hash)
        )
        if loaded.pixels_CHW is None and location is None:  # its owner went meanwhile
            loaded = self._load(job.entry.record, known, encode=True)
        return loaded, location

    def _finish(self, job: _Job) -> None:
        record, known = job.entry.record, job.known
        try:
            loaded, location = self._loaded(job)
        except DataError as error:
            self._record_failure(record, known, error)
            return
        if known is not None and loaded.content_hash == known.content_hash:
            self._update(record, known)
            return
        captions, metadata = _texts(record, known)
        item = NewItem(
            uri=record.uri,
            content_hash=loaded.content_hash,
            size_bytes=record.size_bytes,
            mtime_ns=record.mtime_ns,
            captions=captions,
            metadata=metadata,
            location=location,
            replaces=known.id if known is not None else None,
            id=job.entry.item_id,
        )
        if loaded.pixels_CHW is None:
            self._batch.new.append(item)
            self.report.reused += 1
            return
        self._waiting.append((item, loaded.pixels_CHW))
        if len(self._waiting) >= self._batch_size:
            self._encode_waiting()
            if self._commit_is_due():
                self._flush()

    def _update(self, record: Record, known: Item) -> None:
        captions, metadata = _texts(record, known)
        update = ItemUpdate(known.id, record.size_bytes, record.mtime_ns, captions, metadata)
        same_file = (known.size_bytes, known.mtime_ns) == (record.size_bytes, record.mtime_ns)
        if same_file and (known.captions, known.metadata) == (captions, metadata):
            self.report.unchanged += 1
            return
        self._batch.updates.append(update)
        self.report.updated += 1

    def _record_failure(self, record: Record, known: Item | None, error: DataError) -> None:
        reason = error.reason if isinstance(error, ImageDecodeError) else "unreadable"
        # A file that could not even be read has no facts to recognise it by: it is tried again.
        facts = (None, None) if reason == "unreadable" else (record.size_bytes, record.mtime_ns)
        captions, metadata = _texts(record, known)
        failure = Failure(
            record.uri, reason, str(error), *facts, captions=captions, metadata=metadata
        )
        self._batch.failures.append(failure)
        if len(self.report.first_failures) < _FAILURES_SHOWN:
            self.report.first_failures.append(failure)
        self.report.failed += 1
        self.report.reasons[reason] += 1

    def _encode_waiting(self) -> None:
        if not self._waiting:
            return
        items = [item for item, _ in self._waiting]
        vectors_ND = self._encoder.encode_pixels(np.stack([pixels for _, pixels in self._waiting]))
        self._waiting.clear()
        self._encoded.append((items, np.asarray(vectors_ND, np.float32)))
        replaced = sum(item.replaces is not None for item in items)
        self.report.changed += replaced
        self.report.added += len(items) - replaced

    def _commit_is_due(self) -> bool:
        late = time.monotonic() - self._last_commit >= COMMIT_INTERVAL_S
        return late or self._num_uncommitted() >= COMMIT_ITEMS

    def _num_uncommitted(self) -> int:
        return len(self._batch) + sum(len(items) for items, _ in self._encoded)

    def _flush(self) -> None:
        batch, encoded = self._batch, self._encoded
        self._batch, self._encoded = Batch(), []
        parts = [np.empty((0, self._dim), np.float32)]
        for items, vectors_ND in encoded:
            batch.new += items
            parts.append(vectors_ND)
        if len(batch):
            self._commit(batch, np.concatenate(parts))
        self._last_commit = time.monotonic()


def _texts(record: Record, known: Item | None) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Captions and metadata after this record, in the form in which they will be read back.

    A source that knows none leaves those that another source gave: indexing a table of a folder's
    images and then the folder itself does not strip them.
    """
    captions = tuple(plain_text(caption) for caption in record.captions)
    metadata = dict(record.metadata)
    if record.label is not None:
        metadata.setdefault("label", record.label)
    if known is not None:
        captions = captions or known.captions
        if not record.metadata:
            metadata = {**known.metadata, **metadata}
        elif "label" in known.metadata:
            metadata.setdefault("label", known.metadata["label"])
    return captions, json.loads(to_json(metadata))


def retry_entry(failure: Failure) -> Entry:
    """A ledger entry as a record, to be tried again."""
    status = None
    with contextlib.suppress(OSError):
        status = Path(failure.uri).stat()
    return Entry(
        Record(
            uri=failure.uri,
            read=partial(read_uri, failure.uri),
            captions=failure.captions,
            metadata=dict(failure.metadata),
            size_bytes=status.st_size if status else None,
            mtime_ns=status.st_mtime_ns if status else None,
        )
    )
