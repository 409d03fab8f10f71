"""A collection: a corpus of images that can be searched by text and by image, kept in one folder.

    photos/
        manifest.json     which model, which index generation            replaced atomically
    (the next four lie in edition-N/ after the Nth migration to another model)
        items.sqlite      items, failures, names of the segments         the truth
        segments/*.npy    float16 vectors, one file a commit             immutable
        indexes/*.faiss   one FAISS generation                           derived, may be deleted
        text_tower.json   that texts may be encoded without torch        derived, may be deleted
        thumbnails/       the app's cache                                derived, may be deleted
        writer.lock       held by the one process that writes

One writer at a time, any number of readers, in this process or others. A reader follows the writer
commit by commit: a search that starts after `Collection.add` returned finds what was added.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np

from clipsys.errors import QueryError
from clipsys.inference.numpy_text_tower import LightTextTower
from clipsys.retrieval.encoders import light
from clipsys.retrieval.encoders.encoding import ImageTextEncoder, check_encoder, pin_of
from clipsys.retrieval.search.grammar import compose, parse_query
from clipsys.retrieval.search.query import Hit, ImageSource, Query, embed_queries
from clipsys.retrieval.search.searching import NEAR_DUPLICATE, Options, Searcher, Sought
from clipsys.retrieval.storage import filters
from clipsys.retrieval.storage.creation import create_folder
from clipsys.retrieval.storage.items import Failure, Item
from clipsys.retrieval.storage.manifest import IndexGeneration, Manifest, read_manifest
from clipsys.retrieval.storage.segments import Floats
from clipsys.retrieval.storage.snapshot import Snapshot
from clipsys.retrieval.storage.store import FILE_NAME as DATABASE_NAME
from clipsys.retrieval.storage.store import Store
from clipsys.retrieval.storage.upgrading import upgrade_database
from clipsys.retrieval.upkeep.info import CollectionInfo, describe
from clipsys.retrieval.upkeep.keeping import KeptCollection


class Collection(KeptCollection):
    """An open collection. Made by `create` or `open`; close it, or use it as a context manager.

    Thread-safe: searches run concurrently, the encoder takes one call at a time.
    """

    _light: LightTextTower | None = None

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
            to_repair: opens it although vector files are damaged.

        Raises:
            CollectionError: there is none, it is damaged, or it belongs to another model.
        """
        folder = Path(path).expanduser().absolute()
        manifest = read_manifest(folder)
        if encoder is not None:
            check_encoder(folder, manifest.encoder, encoder)
        database = folder / manifest.edition / DATABASE_NAME
        upgraded = upgrade_database(database)
        store = Store(database)
        opened = cls(
            folder, manifest, store, encoder, few_searches=few_searches, precision=precision
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
        return f"Collection({str(self.path)!r}, model={self._pin.name!r})"

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
            query: a line as ``"a dog + beach - snow"`` (`clipsys.retrieval.search.grammar`), or a
                `Query` of parts with weights.
            image: a path, the file's bytes or a decoded image; adds to the query.
            negative: a text that the hits should be unlike.
            words: words of captions (``'"on the beach" dog -brown'``), searched for beside the
                query and fused with it, or alone.
            k: how many hits; fewer come back only if fewer items match.
            offset: how many of the best are left out, for the next page.
            where: a filter on metadata, applied before ranking: ``{"year": 2024}`` or
                ``["year>=2020", "colour in red,blue"]``; see `clipsys.retrieval.storage.filters`.
            min_score: cosine below which nothing is a hit.
            relevant_only: leaves out hits that unrelated items would match by chance.
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
            self._light = light.open_light(self._data, self._pin)
        return self._light

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
        return list(self._store.items(self._view.snapshot().spread(count).tolist()).values())

    def failures(self, limit: int | None = None) -> list[Failure]:
        """The failure ledger: every file that could not be used, with its reason."""
        return self._store.failures(limit)

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


def _cosine(diverse: bool | float) -> float | None:
    if isinstance(diverse, bool):
        return NEAR_DUPLICATE if diverse else None
    return diverse
