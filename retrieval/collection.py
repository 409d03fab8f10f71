"""A collection: a corpus of images that can be searched by text and by image, kept in one folder.

    photos/
        manifest.json     which model, which index generation            replaced atomically
        items.sqlite      items, failures, names of the segments         the truth
        segments/*.npy    float16 vectors, one file a commit             immutable
        indexes/*.faiss   one FAISS generation                           derived, may be deleted
        thumbnails/       the app's cache                                derived, may be deleted
        writer.lock       held by the one process that writes

One writer at a time, any number of readers, in this process or others. A reader follows the writer
commit by commit: a search that starts after `Collection.add` returned finds what was added.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from clipsys.errors import QueryError
from clipsys.light_text import LightTextTower
from clipsys.progress import progress
from clipsys.retrieval import filters, light
from clipsys.retrieval.corpora import count_records, iterate_once
from clipsys.retrieval.creation import create_folder
from clipsys.retrieval.embedding import AddReport, Embedder
from clipsys.retrieval.encoding import (
    ImageTextEncoder,
    TurnTakingEncoder,
    check_encoder,
    load_encoder,
)
from clipsys.retrieval.grammar import compose, parse_query
from clipsys.retrieval.info import CollectionInfo, describe
from clipsys.retrieval.items import Failure, Item
from clipsys.retrieval.manifest import EncoderPin, IndexGeneration, Manifest, read_manifest
from clipsys.retrieval.planning import DEFAULT_RECALL, IndexPlan
from clipsys.retrieval.query import Hit, ImageSource, Query, embed_queries
from clipsys.retrieval.searching import NEAR_DUPLICATE, Options, Searcher, Sought
from clipsys.retrieval.segments import Floats
from clipsys.retrieval.snapshot import Snapshot
from clipsys.retrieval.store import FILE_NAME as DATABASE_NAME
from clipsys.retrieval.store import Store
from clipsys.retrieval.view import View
from clipsys.retrieval.writing import Writer, writing

if TYPE_CHECKING:
    from clipsys.retrieval.tuning import TuningQueries


class Collection:
    """An open collection. Made by `create` or `open`; close it, or use it as a context manager.

    Thread-safe: searches run concurrently, the encoder takes one call at a time.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        store: Store,
        encoder: ImageTextEncoder | None,
        *,
        few_searches: bool = False,
    ) -> None:
        """Use `create` or `open`."""
        self.path = path
        #: Held around each call of the encoder; hold it to call the same encoder from elsewhere.
        self.encoder_lock = threading.Lock()
        self._pin = manifest.encoder
        self._store = store
        self._encoder = encoder
        self._view = View(path, manifest, store, few_searches=few_searches)
        self._searcher = Searcher(store, self._view)
        self._light: LightTextTower | None = None
        self._light_remembered = False

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
            encoder=EncoderPin(
                name=encoder.name,
                model=model or encoder.spec or encoder.name,
                fingerprint=encoder.fingerprint,
                dim=encoder.dim,
            ),
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
    ) -> Collection:
        """Opens a collection.

        Args:
            path: its folder.
            encoder: checked against the manifest; None: the manifest's model is loaded when a
                search or an addition first needs it.
            few_searches: it is opened for one search or two: what pays only later is left out.

        Raises:
            CollectionError: there is none, it is damaged, or it belongs to another model.
        """
        folder = Path(path).expanduser().absolute()
        manifest = read_manifest(folder)
        if encoder is not None:
            check_encoder(folder, manifest.encoder, encoder)
        store = Store(folder / DATABASE_NAME)
        return cls(folder, manifest, store, encoder, few_searches=few_searches)

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

    def __len__(self) -> int:
        return self._store.count_items()

    def __repr__(self) -> str:
        return f"Collection({str(self.path)!r}, model={self._pin.name!r})"

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
                    self._encoder = load_encoder(self.path, self._pin)
        return self._encoder

    # ---- writing ---------------------------------------------------------------------------

    def add(
        self,
        *sources: str | Path,
        batch_size: int = 64,
        num_workers: int | None = None,
        show_progress: bool = True,
    ) -> AddReport:
        """Brings the collection up to date with folders, tables or shards.

        Files that are known and unchanged are recognised by size and modification time without
        being read; changed ones are encoded again; new ones are added. What a source no longer has
        stays: it may be an unmounted drive. Images that cannot be used go to the failure ledger.
        Interrupted at any moment, it loses at most the batch in flight, and a second call resumes.

        Args:
            sources: see `clipsys.sources.iterate_source`.
            batch_size: images encoded at once.
            num_workers: decoding threads; None: one a processor.
            show_progress: draws a bar on stderr.

        Raises:
            CollectionError: another writer is at work, or the disk is full.
            DataError: a source is missing, empty or unreadable; said before anything is written,
                except for a shard that turns out to be cut off.
        """
        total = count_records(sources)
        started = time.monotonic()
        with self._writing() as writer:
            embedder = Embedder(
                self._store,
                self._turns(),
                writer.commit,
                dim=self._pin.dim,
                batch_size=batch_size,
                num_workers=num_workers,
            )
            records = iterate_once(sources)
            if show_progress:
                with progress(f"indexing into {self.path.name}", total) as advance:
                    embedder.run(records, advance)
            else:
                embedder.run(records, lambda _: None)
            writer.refresh_index()
            if self._encoder is not None:
                self._remember_light_tower()
        embedder.report.seconds = time.monotonic() - started
        return embedder.report

    def remove(self, ids: Sequence[int]) -> int:
        """Deletes items; they are never returned again. Returns how many there were."""
        with self._writing() as writer:
            num_removed = writer.delete(ids)
            writer.refresh_index()
        return num_removed

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
        from clipsys.retrieval.tuning import NUM_QUERIES, text_queries

        captions = [item.caption for item in self.sample(NUM_QUERIES) if item.caption]
        return text_queries(self._turns(), captions)

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
        where: filters.Where = None,
        min_score: float | None = None,
        relevant_only: bool = False,
        diverse: bool | float = False,
    ) -> list[Hit]:
        """Finds the items nearest to a text, an image, both, or a composed query.

        Args:
            query: a line as `clipsys.retrieval.grammar` reads it (``"a dog + beach - snow"``), or a
                `Query` of parts with weights.
            image: a path, the file's bytes or a decoded image; adds to the query.
            negative: a text that the hits should be unlike.
            words: words of captions (``'"on the beach" dog -brown'``), searched for beside the
                query and fused with it, or alone.
            k: how many hits; fewer come back only if fewer items match.
            offset: how many of the best are left out, for the next page.
            where: a filter on metadata, applied before ranking: ``{"year": 2024}`` or
                ``["year>=2020", "colour in red,blue"]``; see `clipsys.retrieval.filters`.
            min_score: cosine below which nothing is a hit.
            relevant_only: leaves out what does not stand out from the collection at large.
            diverse: folds near-duplicates into one hit; a number is the cosine from which on two
                items are duplicates.

        Returns:
            Hits, best first; equal scores in the order of their ids.

        Raises:
            QueryError: there is nothing to search for, a number is out of its range, or the query
                or the filter is malformed.
            ImageDecodeError: the image does not decode.
        """
        if not isinstance(query, Query):
            query = compose(query, image=image, negative=negative, words=words)
        elif image is not None or negative is not None or words is not None:
            raise QueryError("give image, negative and words as parts of the Query")
        options = Options(
            k, offset, filters.parse_where(where), min_score, relevant_only, _cosine(diverse)
        )
        return self.search_batch([query], options)[0]

    def search_batch(
        self, queries: Sequence[str | Query], options: Options | None = None
    ) -> list[list[Hit]]:
        """Several searches in one pass over the model and the index: hits of each query.

        Raises:
            QueryError: see `search`.
            ImageDecodeError: an image does not decode.
        """
        options = options or Options()
        read = [query if isinstance(query, Query) else parse_query(query) for query in queries]
        if len(self) == 0 or not read:
            return [[] for _ in read]
        sought = [
            Sought(vector_D, query.words, query.items)
            for query, vector_D in zip(read, self.embed_batch(read), strict=True)
        ]
        return self._searcher.search(sought, options)

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
        tower = self._light_tower(queries)
        if tower is not None:
            return embed_queries(queries, self._turns(), self.vector, encode_text=tower.encode_text)
        vectors = embed_queries(queries, self._turns(), self.vector)
        if self._encoder is not None:
            self._remember_light_tower()  # the next process needs no torch
        return vectors

    def _light_tower(self, queries: Sequence[Query]) -> LightTextTower | None:
        """The text tower in numpy, where it saves loading the model for these queries."""
        if self._encoder is not None:
            return None
        parts = [part for query in queries for part in query.parts]
        num_texts = sum(part.text is not None for part in parts)
        if any(part.image is not None for part in parts) or not 0 < num_texts <= light.MAX_TEXTS:
            return None
        if self._light is None:
            self._light = light.open_light(self.path, self._pin)
        return self._light

    def _remember_light_tower(self) -> None:
        if not self._light_remembered:
            self._light_remembered = True
            if light.open_light(self.path, self._pin) is None:
                with self.encoder_lock:
                    light.remember(self.path, self._pin, self._encoder)

    def _turns(self) -> TurnTakingEncoder:
        return TurnTakingEncoder(lambda: self.encoder, self.encoder_lock)

    def search_vector(
        self, query_D: Floats, *, k: int = 10, where: filters.Where = None
    ) -> list[Hit]:
        """Finds the items nearest to a vector (D,); its length does not matter.

        Raises:
            QueryError: the vector is of another width, not finite or zero, or see `search`.
        """
        query_D = np.asarray(query_D, np.float32)
        norm = float(np.linalg.norm(query_D))
        if query_D.shape != (self._pin.dim,) or not 0 < norm < np.inf:
            raise QueryError(
                f"the query vector has shape {query_D.shape} and norm {norm:.4g}; expected shape "
                f"({self._pin.dim},) and a finite norm that is not zero"
            )
        options = Options(k, conditions=filters.parse_where(where))
        return self._searcher.search([Sought(query_D / norm)], options)[0]

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

    def sample(self, count: int) -> list[Item]:
        """Live items spread evenly over the collection, in the order of their ids."""
        ids = self._view.snapshot().ids_N
        chosen = ids[np.linspace(0, len(ids) - 1, min(count, len(ids))).astype(int)]
        return list(self._store.items(chosen.tolist()).values())

    def failures(self, limit: int | None = None) -> list[Failure]:
        """The failure ledger: every file that could not be used, with its reason."""
        return self._store.failures(limit)

    def metadata_keys(self) -> list[str]:
        """Every metadata key that an item has, for building filters."""
        return self._store.metadata_keys()

    def verify(self) -> list[str]:
        """Checks every invariant, reading every file. Returns what is wrong; empty when sound."""
        from clipsys.retrieval.verification import verify

        return verify(self.path)

    @property
    def index(self) -> IndexGeneration | None:
        """The published index, with its kind and the recall that was measured."""
        return read_manifest(self.path).index

    def info(self) -> CollectionInfo:
        """Counts, model, index and size."""
        return describe(self.path, self._store)


def _cosine(diverse: bool | float) -> float | None:
    if isinstance(diverse, bool):
        return NEAR_DUPLICATE if diverse else None
    return diverse
