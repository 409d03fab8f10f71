"""A run of the writer that brings a collection up to date with its sources.

paths set right --> sources --> records --> Embedder --commits--> what sources no longer give
                                                      --> small segments joined, index renewed
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from clipsys.corpora.real_paths import real_source
from clipsys.corpora.tables import TABLE_SUFFIXES, Columns
from clipsys.errors import DataError, PruningRefusedError
from clipsys.progress import progress_if
from clipsys.retrieval.encoders.pinned import PinnedEncoder
from clipsys.retrieval.ingest.embedding import Embedder, EmbeddingOptions
from clipsys.retrieval.ingest.healing import Places, heal_paths, places_of_items
from clipsys.retrieval.ingest.loading import retry_entry
from clipsys.retrieval.ingest.moving import is_gone
from clipsys.retrieval.ingest.pruning import find_vanished, prune, withdraw_removed_rows
from clipsys.retrieval.ingest.report import AddReport
from clipsys.retrieval.ingest.sources import Corpus, Entry, Source, check_sources, count_records
from clipsys.retrieval.storage.sources import (
    KnownSource,
    forget_empty_sources,
    known_sources,
    remember_settings,
)
from clipsys.retrieval.storage.store import Store
from clipsys.retrieval.writing.writer import Writer

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """What records are put into.

    Attributes:
        path: the collection's folder, for messages.
        store: its items.
        encoder: makes their vectors.
        writing: takes the writer's lock; what is raised inside ends the turn.
    """

    path: Path
    store: Store
    encoder: PinnedEncoder
    writing: Callable[[], AbstractContextManager[Writer]]


@dataclass(frozen=True)
class Reading:
    """How sources are read; what is empty is as it was when a source was indexed last."""

    exclude: tuple[str, ...] = ()
    columns: Columns = field(default_factory=Columns)


def add_sources(
    target: Target,
    sources: Sequence[str | Path],
    reading: Reading,
    options: EmbeddingOptions,
    *,
    prune_limit: float | None,
    show_progress: bool,
) -> AddReport:
    """Adds what is new in the sources, updates what changed; see `Collection.add`.

    Args:
        target: the collection.
        sources: folders, tables, shards or images; none: all that the collection knows.
        reading: how they are read.
        options: how to encode.
        prune_limit: the largest share of a source that pruning removes; None: nothing is pruned.
        show_progress: draws a bar on stderr.
    """
    chosen, missing = choose_sources(target.path, target.store, sources, reading)
    total = count_records(chosen, show_progress=show_progress)
    places = Places()
    corpus = Corpus(chosen, places.uri)

    def before(report: AddReport) -> None:
        report.doubles = heal_paths(target.store)
        known = {one.name: one for one in known_sources(target.store)}
        if any(source.name not in known for source in chosen):
            places.learn(places_of_items(target.store))
        for source in chosen:
            if source.settings() != (
                dict(known[source.name].settings) if source.name in known else {}
            ):
                remember_settings(target.store, source.name, source.settings())

    def after(report: AddReport) -> None:
        withdraw_removed_rows(target.store, corpus.seen)
        if prune_limit is not None:
            vanished = find_vanished(target.store, corpus.seen, limit=prune_limit)
            report.pruned = prune(target.store, vanished)
        forget_empty_sources(target.store, keep=set(corpus.seen))

    report = _embed(
        target, corpus, options, before, after, total=total, show_progress=show_progress
    )
    if missing:
        raise DataError(f"{'; '.join(missing)}; the other sources are up to date")
    return report


def choose_sources(
    path: Path, store: Store | None, sources: Sequence[str | Path], reading: Reading
) -> tuple[list[Source], list[str]]:
    """The sources of a run, each looked at, and why known ones are missing from it.

    Args:
        path: the collection's folder, for messages.
        store: what it knows; None: it is still to be made.
        sources: those that are named; none: all that are known, the latest first, since its texts
            count where several give the same image.
        reading: how they are read.

    Raises:
        DataError: one that is named, or each that is known, is missing or empty.
    """
    # Names of before paths were set right (`healing`) are known by what they are called now.
    listed = known_sources(store) if store is not None else []
    known = {real_source(one.name): one for one in listed}
    if not sources and not known:
        raise DataError("nothing to add; name a folder, a table, shards or an image")
    if not sources:
        return _refreshed(path, list(known.values()), reading)
    chosen = []
    for named in sources:
        source = Source.of(named, reading.exclude, reading.columns)
        if source.name in known and not source.settings():
            source = Source.of_known(known[source.name])
            if source.settings():
                _logger.info("%s: read as before, with %s", source.name, source.settings())
        try:
            check_sources([source])
        except DataError as error:
            raise DataError(_with_remedy(path, error, known.get(source.name))) from error
        chosen.append(source)
    return chosen, []


def _refreshed(
    path: Path, known: Sequence[KnownSource], reading: Reading
) -> tuple[list[Source], list[str]]:
    chosen, missing = [], []
    for one in reversed(known):
        source = Source.of_known(one)
        if reading != Reading():
            source = Source.of(one.name, reading.exclude, reading.columns)
        try:
            check_sources([source])
            chosen.append(source)
        except DataError as error:
            missing.append(_with_remedy(path, error, one))
    if not chosen:
        raise DataError("; ".join(missing))
    return chosen, missing


def _with_remedy(path: Path, error: DataError, known: KnownSource | None) -> str:
    if known is None or not known.num_uris:
        return str(error)
    if Path(known.name).suffix.lower() in TABLE_SUFFIXES and not is_gone(known.name):
        return str(error)  # the table is there, and to be mended
    return (
        f"{error} (the collection has {known.num_uris:,} images of it: bring it back, or say where "
        f"it is with `clipsys sources {path} --rename {known.name} NEW`, or let its images go with "
        f"`clipsys sources {path} --forget {known.name}`)"
    )


def retry_failures(target: Target, options: EmbeddingOptions, *, show_progress: bool) -> AddReport:
    """Tries every file of the failure ledger again, changed or not."""
    entries = [retry_entry(failure) for failure in target.store.failures()]
    return _embed(target, entries, options, total=len(entries), show_progress=show_progress)


def _embed(
    target: Target,
    entries: Iterable[Entry],
    options: EmbeddingOptions,
    before: Callable[[AddReport], None] = lambda _: None,
    after: Callable[[AddReport], None] = lambda _: None,
    *,
    total: int | None,
    show_progress: bool,
) -> AddReport:
    started = time.monotonic()
    with target.writing() as writer:
        embedder = Embedder(
            target.store, target.encoder.turns(), writer.commit, target.encoder.pin.dim, options
        )
        before(embedder.report)
        bar = progress_if(show_progress, f"indexing into {target.path.name}", total)
        try:
            with bar as advance:
                embedder.run(entries, advance)
            after(embedder.report)
        except (DataError, PruningRefusedError):
            # A source that breaks off again at every run must not keep the rest from the index.
            # After an interruption, or on a full disk, no index is made.
            writer.tidy_up()
            raise
        writer.tidy_up()
        writer.calibrator.refresh(target.encoder.turns())
        target.encoder.remember_light_tower()
    embedder.report.seconds = time.monotonic() - started
    return embedder.report
