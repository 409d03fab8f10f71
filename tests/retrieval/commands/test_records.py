"""A collection as a data set."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np

from clipsys.images.decoding import decode_image
from clipsys.retrieval import Collection
from clipsys.retrieval.commands.records import collection_embeddings, collection_records
from tests.retrieval.colours import ColourEncoder


def test_items_are_records_as_often_as_they_are_asked_for(
    collection: Collection, photos: Path
) -> None:
    collection.add(photos, show_progress=False)
    collection.annotate({1: {"label": "first"}, 2: {"label": 7}})
    records = collection_records(collection.path)
    assert records is not None and len(records) == 6
    for _ in range(2):
        found = list(records)
        assert [one.uri for one in found] == [item.uri for item in collection.items()]
        assert [one.label for one in found[:3]] == ["first", "7", None]
        assert found[0].read() == Path(found[0].uri).read_bytes()
    assert next(iter(records)).captions == collection.item(1).captions
    assert pickle.loads(pickle.dumps(found[0])).uri == found[0].uri


def test_stored_vectors_come_with_records_and_contents(
    collection: Collection, photos: Path
) -> None:
    collection.add(photos, show_progress=False)
    stored = collection_embeddings(collection.path)
    assert stored is not None and len(stored) == 6
    assert stored.pin.fingerprint == ColourEncoder().fingerprint
    ((records, contents, vectors_ND),) = stored.blocks()
    assert contents == [item.content_hash for item in collection.items()]
    fresh_ND = ColourEncoder().encode_image([decode_image(one.uri) for one in records])
    assert np.abs(vectors_ND - fresh_ND).max() < 1e-3


def test_another_folder_is_none(photos: Path) -> None:
    assert collection_records(photos) is None
    assert collection_embeddings(str(photos / "none")) is None
