"""Near-duplicate groups against a comparison of all pairs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clipsys.errors import QueryError
from clipsys.retrieval import Collection
from clipsys.retrieval.maintenance.duplicates import find_groups
from clipsys.retrieval.storage.segments import Floats, SegmentReader, write_segment
from clipsys.retrieval.storage.snapshot import Snapshot
from tests.retrieval.colours import paint
from tests.retrieval.commands.test_index import run


def snapshot_of(folder: Path, vectors_ND: Floats) -> Snapshot:
    reader = SegmentReader(folder, vectors_ND.shape[1])
    reader.register({1: write_segment(folder, vectors_ND)})
    count = len(vectors_ND)
    return Snapshot(1, np.arange(1, count + 1), np.ones(count, np.int64), np.arange(count), reader)


def clustered(count: int, dim: int = 16, seed: int = 0) -> Floats:
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(count // 3, dim))
    vectors = centres[generator.integers(0, len(centres), count)]
    vectors = vectors + generator.normal(scale=0.08, size=vectors.shape)
    unit: Floats = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return unit


def naive_groups(vectors_ND: Floats, threshold: float) -> list[list[int]]:
    stored = vectors_ND.astype(np.float16).astype(np.float64)
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    near = stored @ stored.T >= threshold
    groups, free = [], set(range(len(stored)))
    for first in range(len(stored)):
        if first in free:
            group = [n for n in sorted(free) if near[first, n]]
            free -= set(group)
            if len(group) > 1:
                groups.append(group)
    return groups


@pytest.mark.parametrize("block_rows", [7, 64, 1000])
@pytest.mark.parametrize("threshold", [0.8, 0.93, 0.999])
def test_groups_equal_those_of_all_pairs(tmp_path: Path, block_rows: int, threshold: float) -> None:
    vectors = clustered(150)
    groups = find_groups(snapshot_of(tmp_path, vectors), threshold, block_rows=block_rows)
    assert [group.tolist() for group in groups] == naive_groups(vectors, threshold)


@pytest.mark.parametrize("block_rows", [1, 2, 8])
def test_a_chain_does_not_join_what_is_not_alike(tmp_path: Path, block_rows: int) -> None:
    angles = np.arange(5) * 0.3
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    groups = find_groups(snapshot_of(tmp_path, vectors), 0.95, block_rows=block_rows)
    assert [group.tolist() for group in groups] == [[0, 1], [2, 3]]


def test_groups_do_not_depend_on_where_vectors_lie(tmp_path: Path) -> None:
    vectors = clustered(60)
    snapshot = snapshot_of(tmp_path, vectors[::-1].copy())
    turned = replace(snapshot, rows_N=snapshot.rows_N[::-1].copy())
    groups = find_groups(turned, 0.93, block_rows=16)
    assert [group.tolist() for group in groups] == naive_groups(vectors, 0.93)


def test_copies_of_one_vector_are_a_group_with_what_is_near_it(tmp_path: Path) -> None:
    vectors = clustered(30)
    of_item = np.array([4, 0, 4, 1, 0, 2, 4])
    snapshot = replace(snapshot_of(tmp_path, vectors), ids_N=np.arange(1, 8))
    snapshot = replace(snapshot, segments_N=np.ones(7, np.int64), rows_N=of_item)
    groups = find_groups(snapshot, 0.9, block_rows=2)
    assert [group.tolist() for group in groups] == naive_groups(vectors[of_item], 0.9)


def test_all_the_same_is_one_group_and_none_is_none(tmp_path: Path) -> None:
    same = np.tile(clustered(3)[:1], (50, 1))
    (group,) = find_groups(snapshot_of(tmp_path, same), 1.0, block_rows=8)
    assert len(group) == 50
    nothing = np.empty(0, np.int64)
    empty = Snapshot(0, nothing, nothing, nothing, SegmentReader(tmp_path, 16))
    assert find_groups(empty, 0.9) == []
    assert find_groups(snapshot_of(tmp_path, clustered(3)[:1]), 0.9) == []


@pytest.mark.parametrize("threshold", [0.0, -0.5, 1.01, float("nan")])
def test_threshold_that_is_no_cosine_is_an_error(tmp_path: Path, threshold: float) -> None:
    with pytest.raises(QueryError, match="the threshold is"):
        find_groups(snapshot_of(tmp_path, clustered(9)), threshold)


def test_copies_and_near_copies_are_listed_by_the_command(
    collection: Collection, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "copy.png").write_bytes((photos / "red.png").read_bytes())
    paint(photos / "nearly.png", (218, 31, 30))
    collection.add(photos, show_progress=False)
    (group,) = collection.duplicates(0.99, show_progress=False)
    assert sorted(Path(item.uri).stem for item in group.items) == ["copy", "nearly", "red"]
    assert group.scores[0] == 1.0
    assert min(group.scores) > 0.99
    collection.remove([group.items[0].id])
    status, out, err = run(capsys, "duplicates", collection.path, "--threshold", "0.99")
    assert (status, out.splitlines()[0]) == (0, "group 1: 2 images")
    assert "1 group, 1 image more" in err
    document = json.loads(
        run(capsys, "duplicates", collection.path, "--threshold", "0.99", "--json")[1]
    )
    assert [len(found["items"]) for found in document["groups"]] == [2]
    assert run(capsys, "duplicates", collection.path, "--threshold", "2")[0] == 1
