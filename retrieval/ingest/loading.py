"""Reading, hashing and decoding records in threads, ahead of the encoder."""

from __future__ import annotations

import contextlib
import hashlib
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clipsys.corpora.records import Record
from clipsys.corpora.sources import read_uri
from clipsys.retrieval.encoders.encoding import ImageTextEncoder
from clipsys.retrieval.ingest.sources import Entry
from clipsys.retrieval.storage.items import Failure, Item, Location
from clipsys.retrieval.storage.store import Store


@dataclass(frozen=True)
class Loaded:
    """What a worker made of a record: pixels to encode; None where the vector is there already."""

    content_hash: str
    pixels_CHW: npt.NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Job:
    """A record on its way: what the collection has under its uri, and what a worker makes of it."""

    entry: Entry
    known: Item | None
    future: Future[Loaded]


class Loader:
    """Makes pixels of records whose content is new."""

    def __init__(self, store: Store, encoder: ImageTextEncoder) -> None:
        self._store = store
        self._encoder = encoder

    def load(self, record: Record, known: Item | None, *, encode: bool = False) -> Loaded:
        """Reads, hashes and, if its content is new, decodes a record. Runs in a worker.

        ``encode``: decode it even if its content is known.
        """
        data = record.read()
        content_hash = hashlib.blake2b(data, digest_size=20).hexdigest()
        is_known = known is not None and known.content_hash == content_hash
        if not encode and (is_known or self._store.find_vector(content_hash) is not None):
            return Loaded(content_hash)
        return Loaded(content_hash, self._encoder.read_pixels(data, uri=record.uri))

    def finish(self, job: Job) -> tuple[Loaded, Location | None]:
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
            loaded = self.load(job.entry.record, known, encode=True)
        return loaded, location


def retry_entry(failure: Failure) -> Entry:
    """A ledger entry as a record, to be tried again."""
    status = None
    with contextlib.suppress(OSError, ValueError):
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
