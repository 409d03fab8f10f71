"""Top k against the naive oracle: every cosine in float64, sorted by score and then id."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from clipsys.errors import CollectionError
from clipsys.retrieval.indexes.building import build_index
from clipsys.retrieval.indexes.generation import LoadedIndex, delete_stale, is_sound, load_index
from clipsys.retrieval.search.ranking import rank, rank_batch
from clipsys.retrieval.search.rescoring import rescore
from clipsys.retrieval.storage.segments import Floats, Ints, SegmentReader, write_segment
from clipsys.retrieval.storage.snapshot import Snapshot

DIM = 16


def random_unit(num_rows: int, seed: int) -> Floats:
    vectors = np.random.default_rng(seed).normal(size=(num_rows, DIM)).astype(np.float32)
    unit: Floats = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def snapshot_of(folder: Path, parts: list[Floats], ids: list[int] | None = None) -> Snapshot:
    """Vectors in several segments; ids count from 1 unless given."""
    folder.mkdir(exist_ok=True)
    reader = SegmentReader(folder, DIM)
    reader.register({number: write_segment(folder, part) for number, part in enumerate(parts)})
    lengths = [len(part) for part in parts]
    total = sum(lengths)
    return Snapshot(
        change=1,
        ids_N=np.array(ids if ids is not None else range(1, total + 1), np.int64),
        segments_N=np.repeat(np.arange(len(parts)), lengths).astype(np.int64),
        rows_N=np.concatenate([np.arange(length) for length in lengths]).astype(np.int64),
        vectors=reader,
    )


def without(snapshot: Snapshot, ids: list[int]) -> Snapshot:
    keep = ~np.isin(snapshot.ids_N, ids)
    return Snapshot(
        snapshot.change + 1,
        snapshot.ids_N[keep],
        snapshot.segments_N[keep],
        snapshot.rows_N[keep],
        snapshot.vectors,
    )


def head(snapshot: Snapshot, length: int) -> Snapshot:
    return without(snapshot, snapshot.ids_N[length:].tolist())


def naive(
    snapshot: Snapshot, query: Floats, k: int, allowed: Ints | None
) -> tuple[list[int], list[float]]:
    rows = snapshot.take(np.arange(len(snapshot))).astype(np.float64)
    cosines = (rows * query.astype(np.float64)).sum(1) / np.sqrt((rows * rows).sum(1))
    scored = [
        (-float(np.float32(score)), int(item_id))
        for score, item_id in zip(cosines, snapshot.ids_N, strict=True)
        if allowed is None or item_id in set(allowed.tolist())
    ]
    best = sorted(scored)[:k]
    return [item_id for _, item_id in best], [-score for score, _ in best]


def index_of(folder: Path, snapshot: Snapshot) -> LoadedIndex:
    folder.mkdir(exist_ok=True)
    return load_index(folder, build_index(folder, snapshot, generation=1), DIM)


def assert_same(
    found: tuple[Ints, npt.NDArray[np.float32]], expected: tuple[list[int], list[float]]
) -> None:
    assert found[0].tolist() == expected[0]
    np.testing.assert_allclose(found[1], expected[1], atol=1e-6)


@pytest.mark.parametrize("k", [1, 7, 100, 500, 10_000])
@pytest.mark.parametrize("num_indexed", [None, 0, 300, 500])
@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("deleted", [[], [3, 250, 450, 500]])
def test_top_k_equals_the_naive_one(
    tmp_path: Path, k: int, num_indexed: int | None, filtered: bool, deleted: list[int]
) -> None:
    parts = [random_unit(200, 1), random_unit(150, 2), random_unit(150, 3)]
    whole = snapshot_of(tmp_path / "segments", parts)
    index = None
    if num_indexed is not None:
        index = index_of(tmp_path / "indexes", head(whole, num_indexed))
    snapshot = without(whole, deleted)
    allowed = np.arange(2, 501, 3) if filtered else None
    for query in random_unit(3, 9):
        expected = naive(snapshot, query, k, allowed)
        assert_same(rank(snapshot, index, query, k, allowed=allowed), expected)


@pytest.mark.parametrize("k", [1, 10, 40])
@pytest.mark.parametrize("rows_at_once", [1, 50, 10**6])
def test_candidates_of_many_queries_are_ranked_like_those_of_each(
    tmp_path: Path, k: int, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In groups of one query, of some and of all; on threads where there are more than two groups.
    monkeypatch.setattr("clipsys.retrieval.search.rescoring._RESCORE_ROWS", rows_at_once)
    snapshot = snapshot_of(tmp_path / "segments", [random_unit(90, 1), random_unit(60, 2)])
    generator = np.random.default_rng(0)
    queries = random_unit(23, 7)
    candidates = [
        generator.choice(np.arange(1, 151), length, replace=False)
        for length in generator.integers(0, 40, len(queries))
    ]
    found = rescore(snapshot, candidates, queries, k)
    for one, query, ids in zip(found, queries, candidates, strict=True):
        assert_same(one, naive(snapshot, query, k, ids))
    together = rank_batch(snapshot, None, queries, k)
    for one, query in zip(together, queries, strict=True):
        assert_same(one, naive(snapshot, query, k, None))


@pytest.mark.parametrize("filtered", [False, True])
def test_index_with_a_selector_equals_the_naive_top_k(
    tmp_path: Path, filtered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that a filter goes through FAISS's selector instead of a scan.
    monkeypatch.setattr("clipsys.retrieval.search.ranking._SCAN_BELOW", 0)
    whole = snapshot_of(tmp_path / "segments", [random_unit(400, 1)])
    index = index_of(tmp_path / "indexes", whole)
    snapshot = without(whole, list(range(1, 400, 5)))
    allowed = np.arange(1, 401, 2) if filtered else None
    for query in random_unit(5, 3):
        expected = naive(snapshot, query, 20, allowed)
        assert_same(rank(snapshot, index, query, 20, allowed=allowed), expected)


@pytest.mark.parametrize("with_index", [False, True])
@pytest.mark.parametrize("k", [1, 5, 40, 61])
def test_ties_are_ordered_by_id_with_and_without_an_index(
    tmp_path: Path, with_index: bool, k: int
) -> None:
    same = np.repeat(random_unit(1, 4), 60, axis=0)
    snapshot = snapshot_of(tmp_path / "segments", [same[:23], random_unit(50, 5), same[23:]])
    index = index_of(tmp_path / "indexes", head(snapshot, 90)) if with_index else None
    ids, scores = rank(snapshot, index, same[0], k)
    twins = [*range(1, 24), *range(74, 111)]
    assert ids[: min(k, 60)].tolist() == twins[:k]
    assert len(set(scores[:60].tolist())) == 1


def test_scores_are_cosines_although_stored_rows_are_rounded(tmp_path: Path) -> None:
    snapshot = snapshot_of(tmp_path / "segments", [random_unit(50, 1)])
    stored = snapshot.take(np.arange(50))
    for query in stored[:5] / np.linalg.norm(stored[:5], axis=1, keepdims=True):
        assert rank(snapshot, None, query, 1)[1][0] == pytest.approx(1.0, abs=1e-7)


def test_ids_that_only_the_index_knows_are_not_returned(tmp_path: Path) -> None:
    whole = snapshot_of(tmp_path / "segments", [random_unit(30, 1)])
    index = index_of(tmp_path / "indexes", whole)
    older = head(whole, 20)
    ids, _ = rank(older, index, random_unit(1, 2)[0], 30)
    assert sorted(ids.tolist()) == list(range(1, 21))


def test_filter_that_nothing_passes_gives_nothing(tmp_path: Path) -> None:
    snapshot = snapshot_of(tmp_path / "segments", [random_unit(10, 1)])
    for allowed in (np.empty(0, np.int64), np.array([99])):
        ids, scores = rank(snapshot, None, random_unit(1, 2)[0], 5, allowed=allowed)
        assert len(ids) == len(scores) == 0


def test_index_of_nothing_can_be_built_and_loaded(tmp_path: Path) -> None:
    snapshot = head(snapshot_of(tmp_path / "segments", [random_unit(3, 1)]), 0)
    index = index_of(tmp_path / "indexes", snapshot)
    assert index.generation.num_items == 0
    assert len(rank(snapshot, index, random_unit(1, 1)[0], 3)[0]) == 0


def test_altered_index_file_is_refused_before_faiss_reads_it(tmp_path: Path) -> None:
    generation = build_index(
        tmp_path, snapshot_of(tmp_path / "segments", [random_unit(9, 1)]), generation=1
    )
    path = tmp_path / generation.file
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    assert not is_sound(tmp_path, generation)
    with pytest.raises(CollectionError, match=generation.file):
        load_index(tmp_path, generation, DIM)


def test_stale_index_files_are_deleted_and_the_published_one_stays(tmp_path: Path) -> None:
    snapshot = snapshot_of(tmp_path / "segments", [random_unit(9, 1)])
    old, new = (build_index(tmp_path, snapshot, generation=number) for number in (1, 2))
    (tmp_path / ".000003-x.faiss.new").write_bytes(b"half")
    delete_stale(tmp_path, new)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [new.file]
    assert not is_sound(tmp_path, old)
