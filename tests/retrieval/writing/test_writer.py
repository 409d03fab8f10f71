"""A collection that outgrows exact search: planned, tuned, extended and rebuilt by its writer."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from clipsys.errors import CollectionError
from clipsys.retrieval import Collection
from clipsys.retrieval.storage.items import Batch, NewItem
from tests.retrieval.clustered import clustered
from tests.retrieval.colours import ColourEncoder

DIM = 24


_MANY = "clipsys.retrieval.indexes.planning.EXACT_ITEMS"


@pytest.fixture(scope="module")
def grown_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection of 4,000 items with captions, planned and tuned where 50 are many."""
    folder = tmp_path_factory.mktemp("grown") / "c"
    with pytest.MonkeyPatch.context() as patch, Collection.create(folder, ColourEncoder()) as made:
        patch.setattr(_MANY, 50)
        grow(made, 4_000)
    return folder


@pytest.fixture
def grown(
    grown_once: Path, tmp_path: Path, encoder: ColourEncoder, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Collection]:
    """A copy of it for one test."""
    monkeypatch.setattr(_MANY, 50)
    shutil.copytree(grown_once, tmp_path / "c")
    with Collection.open(tmp_path / "c", encoder) as opened:
        yield opened


def grow(collection: Collection, count: int) -> None:
    first = len(collection)
    vectors = clustered(count, DIM, seed=first)
    new = [
        NewItem(f"/{first + n}.jpg", f"{first + n}", 1, 1, (f"picture {n % 90}",), {"n": n})
        for n in range(count)
    ]
    with collection._writing() as writer:
        writer.commit(Batch(new=new), vectors)
        writer.refresh_index()


def check(collection: Collection) -> None:
    """What is found is what comparing everything finds, nearly always; nothing deleted is."""
    assert collection.verify() == []
    snapshot = collection._view.snapshot()
    stored = snapshot.take(np.arange(len(snapshot)))
    hits = 0
    for query in clustered(40, DIM, seed=77):
        found = [hit.id for hit in collection.search_vector(query, k=10)]
        best = snapshot.ids_N[np.argsort(-(stored @ query))[:10]].tolist()
        hits += len(set(found) & set(best))
        assert len(found) == 10
    assert hits >= 0.95 * 400


def test_index_is_tuned_with_captions_and_recorded(grown: Collection) -> None:
    index = grown.index
    assert index is not None
    assert (index.kind, index.num_items, index.num_trained) == ("ivf-pq", 4_000, 4_000)
    assert index.effort is not None
    assert set(index.effort.recall) == {"image", "text"}
    assert min(index.effort.recall.values()) >= 0.98
    check(grown)


def test_additions_are_searched_beside_the_index_then_sorted_into_it(grown: Collection) -> None:
    grow(grown, 999)
    assert grown.index is not None
    assert grown.index.generation == 1
    check(grown)
    grow(grown, 1)
    assert (grown.index.generation, grown.index.num_items) == (2, 5_000)
    assert grown.index.num_trained == 4_000
    check(grown)
    grown.remove([item.id for item in list(grown.items())[::4]])
    assert (grown.index.generation, grown.index.num_trained) == (3, 3_750)  # trained again
    check(grown)


def test_recall_of_one_makes_an_exact_index(grown: Collection) -> None:
    assert grown.build_index(recall=1).kind == "flat"
    assert grown.index is not None
    assert (grown.index.kind, grown.index.effort) == ("flat", None)
    check(grown)


def test_compaction_takes_the_dropped_out_of_the_index_and_trains_nothing(
    grown: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert grown.index is not None
    effort = grown.index.effort
    grow(grown, 30)
    grown.remove(range(1, 4_000, 8))
    assert grown.index.generation == 1
    check(grown)
    monkeypatch.setattr("clipsys.retrieval.indexes.building.build_index", None)
    report = grown.compact()
    assert report.vectors_dropped == 500
    assert (grown.index.generation, grown.index.num_items) == (2, 3_530)
    assert (grown.index.num_trained, grown.index.effort) == (4_000, effort)
    check(grown)
    grown.compact()
    assert grown.index.generation == 2


def test_damaged_index_is_repaired_by_planning_and_tuning_it_again(grown: Collection) -> None:
    assert grown.index is not None
    kind, path = grown.index.kind, grown.path / "indexes" / grown.index.file
    path.write_bytes(path.read_bytes()[:-7] + bytes(7))
    assert grown.repair().index_rebuilt
    assert (grown.index.kind, grown.index.generation) == (kind, 2)
    assert grown.index.effort is not None
    assert set(grown.index.effort.recall) == {"image", "text"}
    check(grown)


def test_thousand_copies_of_one_picture_do_not_keep_an_index_from_its_recall(
    grown: Collection,
) -> None:
    """Which ten of them are found is a matter of chance; what is nearer than they are is not."""
    (vector,) = clustered(1, DIM, seed=5)
    with grown._writing() as writer:
        copies = [NewItem(f"/copy{n}.jpg", "copy", 1, 1, (), {}) for n in range(4_000)]
        writer.commit(Batch(new=copies), np.repeat(vector[None], 4_000, axis=0))
    grown.build_index()
    assert grown.index is not None
    assert grown.index.effort is not None
    assert min(grown.index.effort.recall.values()) >= 0.98
    check(grown)
    assert all(hit.uri.startswith("/copy") for hit in grown.search_vector(vector, k=20))


def test_too_little_memory_is_an_error_and_the_old_index_stays(grown: Collection) -> None:
    with pytest.raises(CollectionError, match=r"MB are allowed; allow more memory"):
        grown.build_index(memory_bytes=10_000)
    assert grown.index is not None
    assert grown.index.generation == 1
    check(grown)


def test_index_is_tuned_without_texts_where_the_model_is_gone(
    grown: Collection, caplog: pytest.LogCaptureFixture
) -> None:
    with Collection.open(grown.path) as opened:  # its model's name loads nothing
        with caplog.at_level(logging.WARNING, "clipsys"):
            opened.build_index()
        assert opened.index is not None
        assert opened.index.effort is not None
        assert set(opened.index.effort.recall) == {"image"}
    assert "tuned without text queries" in caplog.text
