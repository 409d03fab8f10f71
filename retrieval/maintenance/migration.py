"""Moving a collection to another model: its images are encoded again beside it, then one swap.

    photos/manifest.json ------ edition ""        items.sqlite, segments/, indexes/   (readers)
                        '- - -> edition-1/        building.json, items.sqlite, ...    (being built)

The new edition is a collection's data of its own. Items keep their ids, captions and metadata; each
commit of the new edition is whole, so a killed migration goes on where it stopped. When every image
is encoded and indexed, the manifest swaps model and edition at once. Readers that are open go on
with the old edition, which a later writer deletes after a grace period.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from clipsys.corpora.records import Record
from clipsys.corpora.sources import read_uri
from clipsys.errors import CollectionError
from clipsys.retrieval.encoders import light
from clipsys.retrieval.encoders.encoding import ImageTextEncoder
from clipsys.retrieval.ingest.embedding import Embedder, EmbeddingOptions
from clipsys.retrieval.ingest.report import AddReport
from clipsys.retrieval.ingest.sources import Entry
from clipsys.retrieval.search.text_relevance import FILE_NAME as RELEVANCE_NAME
from clipsys.retrieval.storage import durable
from clipsys.retrieval.storage.creation import INDEXES, LOCK_NAME, SEGMENTS
from clipsys.retrieval.storage.items import Batch, ItemUpdate
from clipsys.retrieval.storage.manifest import EncoderPin, Manifest, read_manifest, write_manifest
from clipsys.retrieval.storage.segments import Floats, SegmentReader, write_segment
from clipsys.retrieval.storage.snapshot import empty_snapshot, follow
from clipsys.retrieval.storage.store import FILE_NAME as DATABASE_NAME
from clipsys.retrieval.storage.store import Store
from clipsys.retrieval.storage.upgrading import upgrade_database
from clipsys.retrieval.writing.compaction import compact
from clipsys.retrieval.writing.relevance import Calibrator
from clipsys.retrieval.writing.writer import clear_leftovers, clear_superseded

#: The share of the images that may be gone or unreadable without confirmation.
LOSS_LIMIT = 0.1
_BUILDING = "building.json"
#: Tables of notes on where texts are from; see `clipsys.retrieval.storage.sources`, `annotations`.
_NOTES = ("claims", "source_settings", "annotations")


@dataclass(frozen=True)
class MigrationOptions:
    """How to encode, and what may be lost.

    Attributes:
        batch_size: images encoded at once.
        num_workers: decoding threads; None: one a processor.
        loss_limit: the largest share of the items that may be left behind, in the failure ledger,
            because their files are gone or damaged.
    """

    batch_size: int = 64
    num_workers: int | None = None
    loss_limit: float = LOSS_LIMIT


def migrate(
    folder: Path,
    encoder: ImageTextEncoder,
    pin: EncoderPin,
    *,
    options: MigrationOptions = MigrationOptions(),
    advance: Callable[[int], object] = lambda _: None,
) -> AddReport:
    """Encodes a collection's images with another model and swaps to it.

    Args:
        folder: the collection.
        encoder: the new model.
        pin: what the manifest will say of it.
        options: how to encode.
        advance: called with the number of images done.

    Raises:
        CollectionError: another writer is at work, the collection has this model already, or too
            many images cannot be read; what is encoded stays for another attempt.
    """
    with durable.writer_lock(folder / LOCK_NAME, holder=str(folder)):
        manifest = clear_superseded(folder, read_manifest(folder))
        if manifest.encoder.fingerprint == pin.fingerprint:
            raise CollectionError(_nothing_to_migrate(folder, manifest.encoder, pin))
        building = _prepare(folder, manifest, pin)
        for data in (folder / manifest.edition, building):
            upgrade_database(data / DATABASE_NAME)
        with (
            closing(Store(folder / manifest.edition / DATABASE_NAME)) as old,
            closing(Store(building / DATABASE_NAME)) as new,
        ):
            new.add_later_tables()
            clear_leftovers(building, new)
            _drop_what_is_gone(old, new)
            report = _encode(old, new, building, encoder, pin, options, advance)
            _check_losses(folder, old, report, options)
            _carry_over(old, new)
            compact(building / SEGMENTS, new, pin.dim)
            _swap(folder, manifest, building, new, pin, encoder)
    return report


def _nothing_to_migrate(folder: Path, present: EncoderPin, pin: EncoderPin) -> str:
    message = f"{folder}: its vectors are of model {pin.name} already, there is nothing to encode"
    if present.model == pin.model:
        return message
    return (
        f"{message}; the collection has it from {present.model}: "
        f"`clipsys index {folder} --model {pin.model}`, without --migrate, records the new place"
    )


def _prepare(folder: Path, manifest: Manifest, pin: EncoderPin) -> Path:
    """The edition that is being built: the one of a killed migration to this model, or a new one.

    An edition counts once its ``building.json`` is there, which is written last.
    """
    number = int(manifest.edition.rpartition("-")[2] or 0) + 1
    building = folder / f"edition-{number}"
    description = pin.model_dump_json().encode("utf-8")
    if (building / _BUILDING).exists() and (building / _BUILDING).read_bytes() == description:
        return building
    try:
        shutil.rmtree(building, ignore_errors=True)
        for part in (SEGMENTS, INDEXES):
            (building / part).mkdir(parents=True)
        Store.create(building / DATABASE_NAME).close()
        durable.write_new(building / _BUILDING, description)
        durable.sync_folder(folder)
    except OSError as error:
        raise CollectionError(
            f"{building}: cannot be made ({error.strerror}); the collection is as it was"
        ) from error
    return building


def _entries(old: Store, new: Store, advance: Callable[[int], object]) -> Iterator[Entry]:
    """The items that the new edition does not have yet."""
    start_after = 0
    while page := old.live_items(start_after=start_after):
        marks = ",".join(str(item.id) for item in page)
        done = {number for (number,) in new.read(f"SELECT id FROM items WHERE id IN ({marks})")}
        advance(len(done))
        for item in page:
            record = Record(
                uri=item.uri,
                read=partial(read_uri, item.uri),
                captions=item.captions,
                metadata=item.metadata,
                size_bytes=item.size_bytes,
                mtime_ns=item.mtime_ns,
            )
            if item.id not in done:
                yield Entry(record, item_id=item.id)
        start_after = page[-1].id


def _drop_what_is_gone(old: Store, new: Store) -> None:
    """Forgets what an earlier attempt encoded and the collection has deleted or replaced since."""
    with _attached(old, new), new.changing() as (connection, change):
        connection.execute(
            f"UPDATE items SET state = 'deleted', change = {change} WHERE state = 'live' AND "
            "NOT EXISTS (SELECT 1 FROM old.items o WHERE o.id = items.id AND o.state = 'live')"
        )
        connection.execute("DELETE FROM failures")


@contextmanager
def _attached(old: Store, new: Store) -> Iterator[None]:
    new.read("ATTACH DATABASE ? AS old", (f"{old.path.resolve().as_uri()}?mode=ro",))
    try:
        yield
    finally:
        new.read("DETACH DATABASE old")


def _encode(
    old: Store,
    new: Store,
    building: Path,
    encoder: ImageTextEncoder,
    pin: EncoderPin,
    options: MigrationOptions,
    advance: Callable[[int], object],
) -> AddReport:
    def commit(batch: Batch, vectors_ND: Floats) -> None:
        segment = write_segment(building / SEGMENTS, vectors_ND) if len(vectors_ND) else None
        new.commit(batch, segment)

    embedder = Embedder(
        new,
        encoder,
        commit,
        pin.dim,
        EmbeddingOptions(options.batch_size, options.num_workers, retry_failures=True),
    )
    embedder.run(_entries(old, new, advance), advance)
    return embedder.report


def _check_losses(folder: Path, old: Store, report: AddReport, options: MigrationOptions) -> None:
    total = old.count_items()
    if report.failed > options.loss_limit * total:
        raise CollectionError(
            f"{folder}: {report.failed:,} of {total:,} images cannot be read for the new model, "
            f"more than {options.loss_limit:.0%}, for example: {report.first_failures[0].message}; "
            "the collection is as it was. Bring them back and migrate again, or say --yes to go on "
            "without them"
        )


def _carry_over(old: Store, new: Store) -> None:
    """What is not vectors: the ledger, where items came from, which ids were given."""
    with _attached(old, new):
        changed = new.read(
            "SELECT id FROM items JOIN old.items o USING (id) WHERE items.state = 'live' AND "
            "(items.captions, items.metadata) IS NOT (o.captions, o.metadata)"
        )
        latest = old.items([item_id for (item_id,) in changed]).values()
        updates = [
            ItemUpdate(item.id, item.size_bytes, item.mtime_ns, item.captions, item.metadata)
            for item in latest
        ]
        if updates:
            new.commit(Batch(updates=updates), None)
        with new.changing() as (connection, _):
            connection.execute("INSERT OR IGNORE INTO failures SELECT * FROM old.failures")
            for table in (*_NOTES, "origins", "sources"):
                connection.execute(f"DELETE FROM {table}")
            names = connection.execute("SELECT name FROM old.sqlite_master").fetchall()
            for table in ("sources", "origins", *_NOTES):
                if (table,) in names:  # those of notes came later
                    connection.execute(f"INSERT INTO {table} SELECT * FROM old.{table}")
            connection.execute("DELETE FROM sqlite_sequence WHERE name = 'items'")
            connection.execute(
                "INSERT INTO sqlite_sequence SELECT name, seq FROM old.sqlite_sequence "
                "WHERE name = 'items'"
            )


def _swap(
    folder: Path,
    manifest: Manifest,
    building: Path,
    new: Store,
    pin: EncoderPin,
    encoder: ImageTextEncoder,
) -> None:
    from clipsys.retrieval.indexes.building import build_planned  # imports faiss
    from clipsys.retrieval.indexes.tuning import caption_queries

    snapshot = follow(empty_snapshot(SegmentReader(building / SEGMENTS, pin.dim)), new)
    _, generation = build_planned(
        building / INDEXES,
        snapshot,
        generation=manifest.index.generation + 1 if manifest.index else 1,
        queries=partial(caption_queries, encoder, new, snapshot),
    )
    light.remember(building, pin, encoder)
    Calibrator(building, pin, lambda: (None, snapshot)).refresh(encoder)
    database = (DATABASE_NAME, f"{DATABASE_NAME}-wal", f"{DATABASE_NAME}-shm")
    data = (*database, SEGMENTS, INDEXES, light.FILE_NAME, RELEVANCE_NAME)
    replaced = (manifest.edition,) if manifest.edition else data
    swapped = manifest.model_copy(
        update={
            "encoder": pin,
            "edition": building.name,
            "index": generation,
            "superseded": (*manifest.superseded, *replaced),
            "superseded_at": time.time(),
        }
    )
    write_manifest(folder, swapped)
    (building / _BUILDING).unlink()
