"""The items of a collection as a data set: records, and vectors that are stored already."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from clipsys.corpora.records import Record
from clipsys.corpora.sources import read_uri

if TYPE_CHECKING:
    from clipsys.retrieval.collection import Collection
    from clipsys.retrieval.storage.items import Item
    from clipsys.retrieval.storage.manifest import EncoderPin
    from clipsys.retrieval.storage.segments import Floats


@dataclass(frozen=True)
class CollectionRecords:
    """The live items of a collection, read page by page each time that they are iterated over.

    Attributes:
        folder: the collection.
        num_items: how many there were when it was looked at.
    """

    folder: Path
    num_items: int

    def __len__(self) -> int:
        return self.num_items

    def __iter__(self) -> Iterator[Record]:
        with _open(self.folder) as photos:
            yield from map(record_of, photos.items())


@dataclass(frozen=True)
class CollectionEmbeddings:
    """The stored vectors of a collection, which need no encoding where the model is the same.

    They are float16: cosines differ from those of fresh vectors by up to 0.001, and so may ranks
    that are that close.

    Attributes:
        folder: the collection.
        pin: the model that made them; compare its ``fingerprint``.
        num_items: how many there were when it was looked at.
    """

    folder: Path
    pin: EncoderPin
    num_items: int

    def __len__(self) -> int:
        return self.num_items

    def blocks(self) -> Iterator[tuple[list[Record], list[str], Floats]]:
        """Records, hashes of their images' bytes, and unit vectors (B, D), in blocks."""
        with _open(self.folder) as photos:
            for items, vectors_BD in photos.stored_vectors():
                contents = [item.content_hash for item in items]
                yield [record_of(item) for item in items], contents, vectors_BD


def collection_records(folder: str | Path) -> CollectionRecords | None:
    """The items of a collection as records; None where the folder is none.

    Raises:
        CollectionError: it cannot be opened.
    """
    if not is_collection(folder):
        return None
    with _open(Path(folder).expanduser()) as photos:
        return CollectionRecords(photos.path, len(photos))


def collection_embeddings(folder: str | Path) -> CollectionEmbeddings | None:
    """The stored vectors of a collection; None where the folder is none.

    Raises:
        CollectionError: it cannot be opened.
    """
    if not is_collection(folder):
        return None
    with _open(Path(folder).expanduser()) as photos:
        return CollectionEmbeddings(photos.path, photos.encoder_pin, len(photos))


def is_collection(folder: str | Path) -> bool:
    """Whether a folder is a collection, by its files."""
    from clipsys.retrieval.storage.creation import LOCK_NAME
    from clipsys.retrieval.storage.manifest import FILE_NAME

    path = Path(folder).expanduser()
    return (path / FILE_NAME).is_file() and (path / LOCK_NAME).exists()


def record_of(item: Item) -> Record:
    """An item as a record; its label is metadata ``label``."""
    label = item.metadata.get("label")
    return Record(
        item.uri,
        partial(read_uri, item.uri),
        item.captions,
        None if label is None else str(label),
        item.metadata,
        item.size_bytes,
        item.mtime_ns,
    )


def _open(folder: Path) -> Collection:
    from clipsys.retrieval.collection import Collection

    return Collection.open(folder, few_searches=True)
