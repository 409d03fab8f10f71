"""A collection: a corpus of images that can be searched by text and by image, in one folder.

    photos/
        manifest.json     which model, which index generation            replaced atomically
    (the next four lie in edition-N/ after the Nth migration to another model)
        items.sqlite      items, failures, names of the segments         the truth
        segments/*.npy    float16 vectors, one file a commit             immutable
        indexes/*.faiss   one FAISS generation                           derived, may be deleted
        text_tower.json   that texts may be encoded without torch        derived, may be deleted
        relevance.npz     what text queries are judged by                derived, may be deleted
        thumbnails/       the app's cache                                derived, may be deleted
        writer.lock       held by the one process that writes

One writer at a time, any number of readers, in this process or others. A reader follows the writer
commit by commit: a search that starts after `Collection.add` returned finds what was added.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from clipsys.corpora.tables import Columns
from clipsys.errors import QueryError
from clipsys.progress import progress_if
from clipsys.retrieval.encoders.encoding import (
    ImageTextEncoder,
    check_encoder,
    pin_of,
    place_of,
)
from clipsys.retrieval.encoders.pinned import PinnedEncoder
from clipsys.retrieval.indexes.planning import DEFAULT_RECALL, IndexPlan
from clipsys.retrieval.ingest import adding, annotating, relocation
from clipsys.retrieval.ingest.embedding import EmbeddingOptions
from clipsys.retrieval.ingest.pruning import PRUNE_LIMIT
from clipsys.retrieval.ingest.report import AddReport
from clipsys.retrieval.maintenance.info import CollectionInfo, describe
from clipsys.retrieval.maintenance.moved_model import record_model
from clipsys.retrieval.search import stored
from clipsys.retrieval.search.encoding import (
    combine,
    embed_with_pinned,
    encode,
    encode_vector,
    read_queries,
    texts_of,
)
from clipsys.retrieval.search.options import (
    NEAR_DUPLICATE,
    Options,
    doubt_of,
    duplicate_cosine,
)
from clipsys.retrieval.search.query import Hit, ImageSource, Query
from clipsys.retrieval.search.searching import Searcher
from clipsys.retrieval.search.text_relevance import Cuts
from clipsys.retrieval.search.view import View
from clipsys.retrieval.storage.annotations import annotated_keys
from clipsys.retrieval.storage.conditions import Where, parse_where
from clipsys.retrieval.storage.creation import check_name, create_folder
from clipsys.retrieval.storage.items import Failure, Item
from clipsys.retrieval.storage.manifest import (
    EncoderPin,
    IndexGeneration,
    Manifest,
    read_manifest,
)
from clipsys.retrieval.storage.segments import Floats, Ints
from clipsys.retrieval.storage.snapshot import Snapshot
from clipsys.retrieval.storage.sources import KnownSource, known_sources
from clipsys.retrieval.storage.store import FILE_NAME as DATABASE_NAME
from clipsys.retrieval.storage.store import Store
from clipsys.retrieval.storage.upgrading import upgrade_database
from clipsys.retrieval.writing.compaction import CompactionReport
from clipsys.retrieval.writing.writer import Writer, writing

if TYPE_CHECKING:
    from clipsys.background.captions import TrainingCaptions
    from clipsys.retrieval.indexes.tuning import TuningQueries
    from clipsys.retrieval.maintenance.duplicates import DuplicateGroup
    from clipsys.retrieval.maintenance.migration import MigrationOptions
    from clipsys.retrieval.maintenance.repair import RepairReport
    from clipsys.retrieval.maintenance.verification import Fault


class Collection:
    """An open collection. Made by `create` or `open`; close it, or use it as a context manager.

    Thread-safe: searches run concurrently, the encoder takes one call at a time. What each method
    does is done by a function of the package that it belongs to; here stands what they share.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        store: Store,
        encoder: ImageTextEncoder | None,
        *,
        few_searches: bool = False,
        precision: str = "fast",
        model: str | None = None,
    ) -> None:
        """Use `create` or `open`."""
        self.path = path
        self._store = store
        place = manifest.encoder.model if model is None else place_of(model)
        pin = manifest.encoder.model_copy(update={"model": place})
        self._encoder = PinnedEncoder(
            path, path / manifest.edition, pin, encoder, precision=precision
        )
        self._view = View(path, manifest, store, few_searches=few_searches)

    def __len__(self) -> int:
        return self._store.count_items()

    @property
    def encoder(self) -> ImageTextEncoder:
        """The encoder, loaded now if it was not yet.

        Raises:
            ModelError: the manifest's model cannot be loaded.
            CollectionError: another model lies there now.
        """
        return self._encoder.get()

    @property
    def encoder_lock(self) -> threading.Lock:
        """Held around each call of the encoder; hold it to call the same encoder from elsewhere."""
        return self._encoder.lock

    @property
    def encoder_pin(self) -> EncoderPin:
        """The model of the vectors: name, place, fingerprint, width. Loads nothing."""
        return self._encoder.pin

    @cached_property
    def _searcher(self) -> Searcher:
        return Searcher(self._store, self._view)

    # ---- life ------------------------------------------------------------------------------

    @classmethod
    def create(
        cls, path: str | Path, encoder: ImageTextEncoder, *, model: str | None = None
    ) -> Collection:
        """Makes an empty collection; it appears whole or not at all.

        Args:
            path: a folder that does not exist yet, or is empty.
            encoder: the only one whose vectors the collection will hold.
            model: what `clipsys.load` takes to load this encoder again; `encoder.spec` if None.

        Raises:
            CollectionError: the folder is in use, or cannot be made.
        """
        folder = Path(path).expanduser().absolute()
        manifest = Manifest(
            collection_id=str(uuid.uuid4()),
            created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            encoder=pin_of(encoder, model),
        )
        create_folder(folder, manifest)
        return cls.open(folder, encoder)

    @classmethod
    def open(
        cls,
        path: str | Path,
        encoder: ImageTextEncoder | None = None,
        *,
        few_searches: bool = False,
        precision: str = "fast",
        to_repair: bool = False,
        model: str | None = None,
    ) -> Collection:
        """Opens a collection.

        Vector files are looked at: one whose size is not right is refused, one whose time is not
        the recorded one is hashed first, as all are after copying a collection. What is written
        notes the new times.

        Args:
            path: its folder.
            encoder: checked against the manifest; None: the manifest's model is loaded when a
                search or an addition first needs it.
            few_searches: it is opened for one search or two: what pays only later is left out.
            precision: in which the manifest's model encodes images; see `clipsys.load`.
            model: where the manifest's model lies now, as `clipsys.load` takes it; None: where
                the manifest says.
            to_repair: opens it although vector files are damaged.

        Raises:
            CollectionError: there is none, it is damaged, or it belongs to another model.
        """
        folder = Path(path).expanduser().absolute()
        check_name(folder)
        manifest = read_manifest(folder)
        if encoder is not None:
            check_encoder(folder, manifest.encoder, encoder)
        database = folder / manifest.edition / DATABASE_NAME
        upgraded = upgrade_database(database)
        store = Store(database)
        opened = cls(
            folder,
            manifest,
            store,
            encoder,
            few_searches=few_searches,
            precision=precision,
            model=model,
        )
        if not to_repair:
            try:
                opened._view.check_segments()
                if upgraded:
                    opened._view.note_segment_times()
            except BaseException:
                store.close()
                raise
        return opened

    def close(self) -> None:
        """Closes the database."""
        self._store.close()

    def __enter__(self) -> Collection:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Collection({str(self.path)!r}, model={self.encoder_pin.name!r})"

    # ---- reading ---------------------------------------------------------------------------

    def search(
        self,
        query: str | Query | None = None,
        *,
        image: ImageSource | None = None,
        negative: str | None = None,
        words: str | None = None,
        k: int = 10,
        offset: int = 0,
        where: Where = None,
        min_score: float | None = None,
        relevant_only: bool = False,
        diverse: bool | float = False,
        sort: str | None = None,
    ) -> list[Hit]:
        """Finds the items nearest to a text, an image, both, or a composed query.

        With a filter or a sort alone it lists what passes, the items added last first.

        Args:
            query: a line as ``"a dog + beach - snow"`` (`clipsys.retrieval.search.grammar`), or a
                `Query` of parts with weights.
            image: a path, the file's bytes or a decoded image; adds to the query.
            negative: a text that the hits should be unlike.
            words: words of captions and file names (``'"on the beach" dog -brown'``), searched for
                beside the query and fused with it, or alone.
            k: how many hits; fewer come back only if fewer items match.
            offset: how many of the best are left out, for the next page.
            where: a filter on metadata, applied before ranking: ``{"year": 2024}`` or
                ``["year>=2020", "colour in red,blue"]``; see
                `clipsys.retrieval.storage.conditions`.
            min_score: cosine below which nothing is a hit.
            relevant_only: leaves out hits that chance explains; see
                `clipsys.retrieval.search.text_relevance` and `calibration`.
            diverse: folds near-duplicates into one hit; a number is the cosine from which on two
                items are duplicates.
            sort: a metadata key to put the hits in order by, or ``-key`` for descending; also
                ``uri``, ``caption``, ``added``, ``modified``. See `Options` for what is sorted.

        Returns:
            Hits, best first; equal scores in the order of their ids.

        Raises:
            QueryError: there is nothing to search for, a number is out of its range, or the query
                or the filter is malformed.
            ImageDecodeError: the image does not decode.
        """
        query = combine(query, image=image, negative=negative, words=words)
        cosine = duplicate_cosine(diverse)
        options = Options(k, offset, parse_where(where), min_score, relevant_only, cosine, sort)
        return self.search_batch([query], options)[0]

    def search_batch(
        self, queries: Sequence[str | Query | None], options: Options | None = None
    ) -> list[list[Hit]]:
        """Several searches in one pass over the model and the index: hits of each query.

        Args:
            queries: None asks for all that passes the filter of the options.
            options: which hits come back, and in which order.

        Raises:
            QueryError: see `search`.
            ImageDecodeError: an image does not decode.
        """
        options = options or Options()
        read = read_queries(queries, options)
        if len(self) == 0 or not read:
            return [[] for _ in read]
        return self._searcher.search(encode(read, self.embed_batch), options)

    def doubt(self, query: str | Query | None, hits: Sequence[Hit], options: Options) -> str | None:
        """What `Options.relevant_only` cannot tell about an answer; None where it can.

        Args:
            query: what was asked.
            hits: the answer.
            options: how it was asked.
        """
        unknown: Sequence[str] = ()
        judge = self._view.text_relevance()
        if judge is not None and query is not None:
            unknown = judge.unknown_words(texts_of(*read_queries([query], options)))
        return doubt_of(hits, options, num_items=len(self), unknown=unknown)

    def embed(self, query: Query) -> Floats:
        """Encodes a query: (D,) float32 of unit norm.

        Raises:
            QueryError: it has words alone, or its parts cancel out.
        """
        (vector_D,) = self.embed_batch([query])
        if vector_D is None:
            raise QueryError("words alone have no vector; add something to look for")
        return vector_D

    def embed_batch(self, queries: Sequence[Query]) -> list[Floats | None]:
        """Encodes queries: (D,) of unit norm each, None where there are words alone."""
        return embed_with_pinned(queries, self._encoder, self.vector)

    def search_vector(self, query_D: Floats, *, k: int = 10, where: Where = None) -> list[Hit]:
        """Finds the items nearest to a vector (D,); its length does not matter.

        Raises:
            QueryError: the vector is of another width, not finite or zero, or see `search`.
        """
        query = encode_vector(query_D, self.encoder_pin.dim)
        return self._searcher.search([query], Options(k, conditions=parse_where(where)))[0]

    def item(self, item_id: int) -> Item:
        """A live item by its id.

        Raises:
            QueryError: there is none.
        """
        self._position(item_id)
        return self._store.items([item_id])[item_id]

    def items_of(self, hits: Sequence[Hit]) -> dict[int, Item]:
        """The items behind hits, by id; also those that were deleted since the search."""
        return self._store.items([hit.id for hit in hits])

    def vector(self, item_id: int) -> Floats:
        """The stored vector of a live item: (D,) float32, of unit norm to float16 accuracy.

        Raises:
            QueryError: there is none.
        """
        snapshot, position = self._position(item_id)
        vector_D: Floats = snapshot.take(np.array([position]))[0]
        return vector_D

    def _position(self, item_id: int) -> tuple[Snapshot, int]:
        snapshot = self._view.snapshot()
        positions = snapshot.positions(np.array([item_id]))
        if len(positions) == 0:
            raise QueryError(f"{self.path}: there is no item {item_id}")
        return snapshot, int(positions[0])

    def items(self) -> Iterator[Item]:
        """All live items in the order of their ids, read page by page."""
        page = self._store.live_items()
        while page:
            yield from page
            page = self._store.live_items(start_after=page[-1].id)

    def stored_vectors(
        self, where: Where = None, block: int = stored.BLOCK_ITEMS
    ) -> Iterator[tuple[list[Item], Floats]]:
        """The items of this moment in the order of their ids, with their vectors, in blocks.

        Vectors are (B, D) float32 of unit norm, to the accuracy of float16. No model is loaded and
        no image read.

        Args:
            where: only items whose metadata match.
            block: items at once.

        Raises:
            QueryError: the filter is malformed.
        """
        return stored.item_blocks(self._view, self._store, self._ids(where), block)

    def vector_blocks(
        self, where: Where = None, block: int = stored.BLOCK_ITEMS
    ) -> Iterator[tuple[Ints, Floats]]:
        """As `stored_vectors`, with ids (B,) int64 in place of the items, which is faster."""
        return stored.vector_blocks(self._view, self._ids(where), block)

    def _ids(self, where: Where) -> Ints:
        return stored.chosen_ids(self._view, self._store, parse_where(where))

    def sample(self, count: int) -> list[Item]:
        """Live items spread evenly over the collection, in the order of their ids."""
        return list(self._store.items(self._view.snapshot().spread(count).tolist()).values())

    def failures(self, limit: int | None = None) -> list[Failure]:
        """The failure ledger: every file that could not be used, with its reason."""
        return self._store.failures(limit)

    def explain_filter(self, where: Where) -> str | None:
        """Why no item passes a filter, with the nearest key or value; None if some do.

        Raises:
            QueryError: the filter is malformed.
        """
        return self._store.explain_nothing(parse_where(where))

    def metadata_keys(self) -> list[str]:
        """Every metadata key that an item has, for building filters."""
        return self._store.metadata_keys()

    @property
    def index(self) -> IndexGeneration | None:
        """The published index, with its kind and the recall that was measured."""
        return read_manifest(self.path).index

    def info(self) -> CollectionInfo:
        """Counts, model, index and size."""
        return describe(self.path, self._store)

    # ---- changing --------------------------------------------------------------------------

    def add(
        self,
        *sources: str | Path,
        batch_size: int = 64,
        num_workers: int | None = None,
        show_progress: bool = True,
        prune_vanished: bool = False,
        prune_limit: float = PRUNE_LIMIT,
        exclude: Sequence[str] = (),
        columns: Columns = Columns(),
    ) -> AddReport:
        """Brings the collection up to date with folders, tables, shards or images.

        Files that are known and unchanged are recognised by size and modification time without
        being read, others by a hash of their content; changed ones are encoded again, moved ones
        keep their id, new ones are added. Captions and metadata follow the sources. What a source
        no longer has stays, unless pruning is asked for: it may be an unmounted drive. Images that
        cannot be used go to the failure ledger. Interrupted at any moment, it loses at most the
        batch in flight and ends without making an index of what it added, which is searched exactly
        until then; a second call resumes.

        Args:
            sources: see `clipsys.corpora.sources.iterate_source`; none: all that it knows.
            batch_size: images encoded at once.
            num_workers: decoding threads; None: one a processor.
            show_progress: draws a bar on stderr.
            prune_vanished: removes items that these sources gave once and no source gives now.
            prune_limit: the largest share of a source that pruning may remove.
            exclude: patterns of names, or of paths, that folders leave out; remembered.
            columns: what the columns of tables mean; remembered.

        Raises:
            CollectionError: another writer is at work, the disk is full, or more has vanished than
                ``prune_limit`` allows; what was added until then stays.
            DataError: a source is missing, empty or unreadable; said before anything is written,
                except for a shard that turns out to be cut off.
        """
        return adding.add_sources(
            self._target(),
            sources,
            adding.Reading(tuple(exclude), columns),
            EmbeddingOptions(batch_size, num_workers),
            prune_limit=prune_limit if prune_vanished else None,
            show_progress=show_progress,
        )

    def retry_failures(
        self,
        *,
        batch_size: int = 64,
        num_workers: int | None = None,
        show_progress: bool = True,
    ) -> AddReport:
        """Tries every file of the failure ledger again, changed or not; see `add`."""
        options = EmbeddingOptions(batch_size, num_workers, retry_failures=True)
        return adding.retry_failures(self._target(), options, show_progress=show_progress)

    def remove(self, ids: Sequence[int]) -> int:
        """Deletes items; they are never returned again. Returns how many there were.

        A file that is still in its source comes back, under a new id, when that is indexed again.
        """
        with self._writing() as writer:
            num_removed = writer.delete(ids)
            writer.refresh_index()
        return num_removed

    def annotate(self, values: annotating.Values, *, of_image: bool = False) -> int:
        """Writes metadata of items that no source gives. Returns how many items there were.

        The values can be filtered and sorted by like any others. A later `add` keeps them, except
        where a source gives their key for the item; so do migration, compaction and repair.
        Committed 20,000 items at a time.

        Args:
            values: metadata keys with their values, by id: a mapping, or pairs in any order, which
                may be made while they are written. None takes a key away from an item. Ids of no
                live item are left out.
            of_image: the values describe the image's content: they go when that changes.

        Raises:
            DataError: a source gives one of the keys, or one cannot be a key.
            CollectionError: another writer is at work, or the disk is full.
        """
        with self._writing():
            return annotating.annotate(self._store, values, of_image=of_image)

    def check_annotations(self, *keys: str) -> None:
        """Raises the `DataError` that `annotate` would for these keys."""
        annotating.check_keys(self._store, keys)

    def annotations(self) -> list[str]:
        """The metadata keys that `annotate` wrote."""
        return sorted(annotated_keys(self._store).keys)

    def forget_annotation(self, key: str) -> int:
        """Takes a key that `annotate` wrote away from all items. Returns how many had it.

        Raises:
            DataError: no such key was written.
            CollectionError: another writer is at work.
        """
        with self._writing():
            return annotating.forget(self._store, key)

    def sources(self) -> list[KnownSource]:
        """The sources that it was filled from, in the order in which they were first indexed."""
        return known_sources(self._store)

    def rename_source(self, old: str | Path, new: str | Path) -> int:
        """Records where a source is now. Its images keep their ids. Returns how many moved along.

        Raises:
            DataError: there is no such source, or nothing usable at the new place.
            CollectionError: another writer is at work.
        """
        with self._writing():
            return relocation.rename(self._store, str(old), str(new))

    def forget_source(self, name: str | Path, *, limit: float = PRUNE_LIMIT) -> int:
        """Forgets a source and removes what no other one gives. Returns how many items went.

        Raises:
            DataError: there is no such source.
            PruningRefusedError: more than this share of the collection's items would go.
            CollectionError: another writer is at work.
        """
        with self._writing() as writer:
            num_removed = relocation.forget(self._store, str(name), limit=limit)
            writer.refresh_index()
        return num_removed

    def select(self, where: Where) -> list[int]:
        """Ids of the items whose metadata match a filter, ascending.

        Raises:
            QueryError: the filter is malformed, or empty.
        """
        conditions = parse_where(where)
        if not conditions:
            raise QueryError("an empty filter selects nothing; give a condition such as year<2020")
        ids: list[int] = self._store.select_ids(conditions).tolist()
        return ids

    def compact(self) -> CompactionReport:
        """Drops the vectors of deleted items, joins small segments, renews the index.

        Replaced files are deleted by a later writer, after a minute at the earliest:
        searches that are under way, in other processes too, read them to their end.

        Raises:
            CollectionError: another writer is at work, a segment is damaged, or the disk is full.
        """
        with self._writing() as writer:
            return writer.compact()

    def calibrate(self, captions: TrainingCaptions | None = None) -> Cuts:
        """Makes anew what the relevance of text queries is measured by.

        `add` does it for a model whose folder has the captions that it was trained with.

        Args:
            captions: such as the model was trained with (`clipsys.background.captions`); None:
                those of the model's folder, else the collection's own, else generic ones.

        Returns:
            What a query has to reach, and whether the model's scores tell anything here.

        Raises:
            DataError: there are fewer than 50 captions, or fewer than 20 items.
            CollectionError: another writer is at work.
        """
        from clipsys.retrieval.writing.relevance import best_known_captions

        with self._writing() as writer:
            source = "given"
            if captions is None:
                snapshot = self._view.snapshot()
                captions, source = best_known_captions(self.encoder_pin, self._store, snapshot)
            made = writer.calibrator.make(self._encoder.turns(), captions, source)
        return made.cuts

    def record_model(self, model: str) -> None:
        """Records where the collection's model lies now.

        Args:
            model: what `clipsys.load` takes; a folder's path becomes absolute.

        Raises:
            CollectionError: another model lies there, or another writer is at work.
        """
        record_model(self.path, self._encoder, model, self._writing)

    def migrate(
        self,
        encoder: ImageTextEncoder,
        *,
        model: str | None = None,
        options: MigrationOptions | None = None,
        show_progress: bool = True,
    ) -> AddReport:
        """Encodes every image again with another model, beside the old vectors, then swaps.

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
        from clipsys.retrieval.maintenance.migration import MigrationOptions, migrate

        with progress_if(show_progress, f"migrating {self.path.name}", len(self)) as advance:
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

    def _target(self) -> adding.Target:
        return adding.Target(self.path, self._store, self._encoder, self._writing)

    def _writing(self) -> AbstractContextManager[Writer]:
        return writing(self.path, self._store, self._view, self.encoder_pin, self._tuning_queries)

    def _tuning_queries(self) -> TuningQueries:
        from clipsys.retrieval.indexes.tuning import caption_queries

        return caption_queries(self._encoder.turns(), self._store, self._view.snapshot())

    # ---- checking --------------------------------------------------------------------------

    def verify(self) -> list[Fault]:
        """Checks every invariant, reading every file. Returns what is wrong; empty when sound."""
        from clipsys.retrieval.maintenance.verification import verify

        return verify(self.path)

    def repair(self) -> RepairReport:
        """Mends what `verify` finds, as far as it can be mended without a backup.

        Items whose vector is lost go to the failure ledger; `retry_failures` encodes them again.

        Raises:
            CollectionError: another writer is at work, or the database itself is damaged.
        """
        from clipsys.retrieval.maintenance.repair import repair

        with self._writing() as writer:
            return repair(self.path, self._store, writer)

    def duplicates(
        self, threshold: float | None = None, *, show_progress: bool = True
    ) -> list[DuplicateGroup]:
        """Groups of items that are nearly the same; see `clipsys.retrieval.maintenance.duplicates`.

        Args:
            threshold: cosine from which two count as nearly the same; None: 0.95.
            show_progress: draws a bar on stderr.

        Raises:
            QueryError: the threshold is not a cosine above 0.
        """
        from clipsys.retrieval.maintenance.duplicates import list_groups

        snapshot = self._view.snapshot()
        threshold = NEAR_DUPLICATE if threshold is None else threshold
        with progress_if(show_progress, f"comparing {self.path.name}", len(snapshot)) as advance:
            return list_groups(snapshot, self._store, threshold, advance=advance)
