"""A run of the writer that brings a collection up to date with its sources.

sources --> records --> Embedder --commits--> pruning --> small segments joined, index renewed
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from clipsys.errors import DataError, PruningRefusedError
from clipsys.progress import progress
from clipsys.retrieval.encoders.pinned import PinnedEncoder
from clipsys.retrieval.ingest.embedding import Embedder, EmbeddingOptions, retry_entry
from clipsys.retrieval.ingest.pruning import find_vanished, prune
from clipsys.retrieval.ingest.report import AddReport
from clipsys.retrieval.ingest.sources import Corpus, Entry, count_records
from clipsys.retrieval.storage.store import Store
from clipsys.retrieval.writing.writer import Writer


@dataclass(frozen=True)
class Target:
    """What records are put into.

    Attributes:
        name: what the progress bar calls it.
        store: its items.
        encoder: makes their vectors.
        writing: takes the writer's lock; what is raised inside ends the turn.
    """

    name: str
    store: Store
    encoder: PinnedEncoder
    writing: Callable[[], AbstractContextManager[Writer]]


def add_sources(
    target: Target,
    sources: Sequence[str | Path],
    options: EmbeddingOptions,
    *,
    prune_limit: float | None,
    show_progress: bool,
) -> AddReport:
    """Adds what is new in the sources, updates what changed; see `Collection.add`.

    Args:
        target: the collection.
        sources: folders, tables or shards.
        options: how to encode.
        prune_limit: the largest share of a source that pruning removes; None: nothing is pruned.
        show_progress: draws a bar on stderr.
    """
    total = count_records(sources, show_progress=show_progress)
    corpus = Corpus(sources)

    def prune_after(report: AddReport) -> None:
        if prune_limit is not None:
            vanished = find_vanished(target.store, corpus.seen, limit=prune_limit)
            report.pruned = prune(target.store, vanished)

    return _embed(target, corpus, options, prune_after, total=total, show_progress=show_progress)


def retry_failures(target: Target, options: EmbeddingOptions, *, show_progress: bool) -> AddReport:
    """Tries every file of the failure ledger again, changed or not."""
    entries = [retry_entry(failure) for failure in target.store.failures()]
    return _embed(target, entries, options, total=len(entries), show_progress=show_progress)


def _embed(
    target: Target,
    entries: Iterable[Entry],
    options: EmbeddingOptions,
    then: Callable[[AddReport], None] = lambda _: None,
    *,
    total: int | None,
    show_progress: bool,
) -> AddReport:
    started = time.monotonic()
    with target.writing() as writer:
        embedder = Embedder(
            target.store, target.encoder.turns(), writer.commit, target.encoder.pin.dim, options
        )
        shown = progress(f"indexing into {target.name}", total) if show_progress else None
        try:
            with shown or nullcontext(lambda _: None) as advance:
                embedder.run(entries, advance)
            then(embedder.report)
        except (DataError, PruningRefusedError):
            # A source that breaks off again at every run must not keep the rest from the index.
            # After an interruption, or on a full disk, no index is made.
            writer.tidy_up()
            raise
        writer.tidy_up()
        target.encoder.remember_light_tower()
    embedder.report.seconds = time.monotonic() - started
    return embedder.report
