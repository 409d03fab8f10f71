"""A collection: a corpus of images that can be searched by text and by image, kept in one folder.

    photos/
        manifest.json     which model, which index generation            replaced atomically
    (the next three lie in edition-N/ after the Nth migration to another model)
        items.sqlite      items, failures, names of the segments         the truth
        segments/*.npy    float16 vectors, one file a commit             immutable
        indexes/*.faiss   one FAISS generation                           derived, may be deleted
        thumbnails/       the app's cache                                derived, may be deleted
        writer.lock       held by the one process that writes

One writer at a time, any number of readers, in this process or others. A reader follows the writer
commit by commit: a search that starts after `Collection.add` returned finds what was added.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType

import numpy as np

from clipsys.errors import QueryError
from clipsys.retrieval import filters
from clipsys.retrieval.creation import create_folder
from clipsys.retrieval.encoding import (
    ImageTextEncoder,
    TurnTakingEncoder,
    check_encoder,
    pin_of,
)
from clipsys.retrieval.info import CollectionInfo, describe
from clipsys.retrieval.items import Failure, Item
from clipsys.retrieval.keeping import KeptCollection
from clipsys.retrieval.manifest import Manifest, read_manifest
from clipsys.retrieval.query import Hit, ImageSource, Query, embed_query
from clipsys.retrieval.ranking import rank
from clipsys.retrieval.segments import Floats, Ints
from clipsys.retrieval.snapshot import Snapshot
from clipsys.retrieval.store import FILE_NAME as DATABASE_NAME
from clipsys.retrieval.store import Store

_logger = logging.getLogger(__name__)


class Collection(KeptCollection):
    """An open collection. Made by `create` or `open`; close it, or use it as a context manager.

    Thread-safe: searches run concurrently, the encoder takes one call at a time.
    """

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
    def open(cls, path: str | Path, encoder: ImageTextEncoder | None = None) -> Collection:
        """Opens a collection.

        Args:
            path: its folder.
            encoder: checked against the manifest; None: the manifest's model is loaded when a
                search or an addition first needs it.

        Raises:
            CollectionError: there is none, it is damaged, or it belongs to another model.
        """
        folder = Path(path).expanduser().absolute()
        manifest = read_manifest(folder)
        if encoder is not None:
            check_encoder(folder, manifest.encoder, encoder)
        return cls(folder, manifest, Store(folder / manifest.edition / DATABASE_NAME), encoder)

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
        k: int = 10,
        where: filters.Where = None,
    ) -> list[Hit]:
        """Finds the items nearest to a text, an image, both, or a composed query.

        Args:
            query: a text, or a `Query` with parts and weights.
            image: a path, the file's bytes or a decoded image; adds to the text.
            negative: a text that the hits should be unlike.
            k: how many hits; fewer come back only if fewer items match the filter.
            where: a filter on metadata, applied before ranking: ``{"year": 2024}`` or
                ``["year>=2020", "colour in red,blue"]``; see `clipsys.retrieval.filters`.

        Returns:
            Hits, best first; equal scores in the order of their ids.

        Raises:
            QueryError: there is nothing to search for, ``k`` is not positive, or the filter is
                malformed.
            ImageDecodeError: the image does not decode.
        """
        if not isinstance(query, Query):
            query = Query.of(query, image=image, negative=negative)
        elif image is not None or negative is not None:
            raise QueryError(
                "give image and negative as parts of the Query, or a text as the query"
            )
        conditions = filters.parse_where(where)
        _check_k(k)
        if len(self) == 0:
            return []
        return self._search(self.embed(query), k, conditions, exclude=query.items)

    def embed(self, query: Query) -> Floats:
        """Encodes a query: (D,) float32 of unit norm."""
        encoder = TurnTakingEncoder(lambda: self.encoder, self.encoder_lock)
        return embed_query(query, encoder, self.vector)

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
        _check_k(k)
        return self._search(query_D / norm, k, filters.parse_where(where))

    def _search(
        self,
        query_D: Floats,
        k: int,
        conditions: Sequence[filters.Condition],
        exclude: frozenset[int] = frozenset(),
    ) -> list[Hit]:
        index, snapshot = self._view.current()
        allowed = None
        if conditions:
            allowed = self._store.select_ids(*filters.to_sql(conditions))
            self._warn_of_unknown_fields(conditions, allowed)
        # The items that the query was made of are no news.
        ids, scores = rank(snapshot, index, query_D, k + len(exclude), allowed=allowed)
        pairs = [
            (int(item_id), float(score))
            for item_id, score in zip(ids, scores, strict=True)
            if int(item_id) not in exclude
        ][:k]
        items = self._store.items([item_id for item_id, _ in pairs])
        return [
            Hit(number, item_id, score, item.uri, item.caption, item.metadata)
            for number, (item_id, score) in enumerate(pairs, 1)
            for item in (items[item_id],)
        ]

    def _warn_of_unknown_fields(
        self, conditions: Sequence[filters.Condition], allowed: Ints
    ) -> None:
        if len(allowed):
            return
        known = self._store.metadata_keys()
        for condition in conditions:
            if condition.field not in known and condition.field not in filters.ITEM_FIELDS:
                _logger.warning(
                    "no item has metadata %r; there is %s",
                    condition.field,
                    ", ".join(known) or "none at all",
                )

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

    def info(self) -> CollectionInfo:
        """Counts, model, index and size."""
        return describe(self.path, self._store)


def _check_k(k: object) -> None:
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise QueryError(f"k is {k!r}; expected a whole number from 1 on")
