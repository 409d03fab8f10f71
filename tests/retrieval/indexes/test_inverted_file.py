"""Inverted files written list by list: the bytes that FAISS writes, and within little memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from clipsys.errors import CollectionError
from clipsys.retrieval.indexes import building
from clipsys.retrieval.indexes.building import build_index, extend_index
from clipsys.retrieval.indexes.clustering import nearest
from clipsys.retrieval.indexes.fastscan import rotation_of
from clipsys.retrieval.indexes.generation import delete_stale, is_sound, load_index, read_file
from clipsys.retrieval.indexes.inverted_file import InvertedFile, MappedLists
from clipsys.retrieval.indexes.planning import KINDS, STREAMED_KINDS, plan_of_kind
from clipsys.retrieval.storage.manifest import IndexGeneration, Kind
from clipsys.retrieval.storage.snapshot import Snapshot
from tests.retrieval import limited_build
from tests.retrieval.clustered import clustered, keep, snapshot_of

DIM, COUNT = 24, 3_000
ROOT = Path(__file__).parents[3]


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Snapshot:
    """Its blocks are short, so that there are several."""
    monkeypatch.setattr("clipsys.retrieval.storage.snapshot.BLOCK_ROWS", 700)
    return snapshot_of(tmp_path / "segments", clustered(COUNT, DIM))


def trained(kind: Kind, num_lists: int, snapshot: Snapshot) -> Any:
    plan = replace(plan_of_kind(kind, len(snapshot), DIM), num_lists=num_lists)
    index = building._empty_index(plan)
    building._train(index, replace(plan, num_training=len(snapshot)), snapshot)
    return index


def filled_by_faiss(index: Any, snapshot: Snapshot) -> Any:
    """In memory. The lists are given: FAISS's products differ from ours in their last bits."""
    filled = faiss.clone_index(index)
    vectors_ND = np.concatenate([block for _, block in snapshot.blocks()])
    inverted, rotation_DD = faiss.extract_index_ivf(filled), rotation_of(index)
    centroids_LD = inverted.quantizer.reconstruct_n(0, inverted.nlist)
    listed_ND = vectors_ND
    if rotation_DD is not None:
        listed_ND, centroids_LD = vectors_ND @ rotation_DD, centroids_LD @ rotation_DD.T
    list_N, _ = nearest(vectors_ND, np.ascontiguousarray(centroids_LD))
    arrays = [np.ascontiguousarray(one) for one in (listed_ND, snapshot.ids_N, list_N)]
    inverted.add_core(len(listed_ND), *map(faiss.swig_ptr, arrays))
    filled.ntotal = inverted.ntotal
    return filled


@pytest.mark.parametrize("kind", STREAMED_KINDS)
@pytest.mark.parametrize("num_lists", [1, 40])
@pytest.mark.parametrize("count", [1, 10, 20, COUNT])  # with 10, most of 40 lists are empty
def test_file_is_the_one_that_faiss_writes_of_the_index_in_memory(
    whole: Snapshot, tmp_path: Path, kind: Kind, num_lists: int, count: int
) -> None:
    index = trained(kind, num_lists, whole)
    some = keep(whole, np.arange(COUNT) % (COUNT // count) == 0)
    in_memory = filled_by_faiss(index, some)
    faiss.write_index(in_memory, str(tmp_path / "faiss"))
    for buffer_bytes in (1_000, 50_000, 10**9):
        ours = tmp_path / f"ours-{buffer_bytes}"
        building._stream(ours, index, some, buffer_bytes=buffer_bytes)
        assert ours.read_bytes() == (tmp_path / "faiss").read_bytes(), buffer_bytes
    mapped = read_file(ours, mapped=True)
    for one in (mapped, in_memory):
        faiss.extract_index_ivf(one).nprobe = 10
    queries = clustered(20, DIM, seed=3)
    for found, theirs in zip(mapped.search(queries, 9), in_memory.search(queries, 9), strict=True):
        np.testing.assert_array_equal(found, theirs)


@pytest.mark.parametrize("kind", STREAMED_KINDS)
def test_extended_file_has_what_faiss_has_after_removing_and_adding(
    whole: Snapshot, tmp_path: Path, kind: Kind
) -> None:
    old = keep(whole, np.arange(COUNT) < 2_000)
    first = build_index(tmp_path, old, generation=1, plan=plan_of_kind(kind, len(old), DIM))
    now = keep(whole, np.arange(COUNT) % 7 != 2)
    second = extend_index(tmp_path, now, first, memory_bytes=0)
    expected = read_file(tmp_path / first.file, mapped=False)
    gone = old.ids_N[~np.isin(old.ids_N, now.ids_N)]
    expected.remove_ids(gone)
    newer = keep(now, now.ids_N > first.last_id)
    added = filled_by_faiss(emptied(read_file(tmp_path / first.file, mapped=False)), newer)
    expected.merge_from(added, 0)
    found = read_file(tmp_path / second.file, mapped=True)
    assert found.ntotal == expected.ntotal == len(now)
    faiss.write_index(expected, str(tmp_path / "expected"))
    ours, theirs = MappedLists(found), MappedLists(read_file(tmp_path / "expected", mapped=True))
    for number in range(second.num_lists):  # in each list the same codes; FAISS moves some
        assert contents(ours, number) == contents(theirs, number)


def emptied(index: Any) -> Any:
    index.reset()
    return index


def contents(lists: MappedLists, number: int) -> dict[int, bytes]:
    codes_NC, ids_N = lists[number]
    return {int(one): code.tobytes() for one, code in zip(ids_N, codes_NC, strict=True)}


def test_extending_twice_and_by_nothing_keeps_every_item(whole: Snapshot, tmp_path: Path) -> None:
    old = keep(whole, np.arange(COUNT) < 1_500)
    plan = plan_of_kind("ivf-sq8", len(old), DIM)
    built = build_index(tmp_path, old, generation=1, plan=plan)
    same = extend_index(tmp_path, old, built)
    assert same.sha256 == built.sha256
    grown = extend_index(tmp_path, whole, same)
    fewer = extend_index(tmp_path, keep(whole, np.arange(COUNT) == 77), grown)
    assert (grown.num_items, fewer.num_items, fewer.generation) == (COUNT, 1, 4)
    for generation, count in ((grown, COUNT), (fewer, 1)):
        index = load_index(tmp_path, generation, DIM)
        ids, _ = index.search(clustered(1, DIM)[0], count, num_probes=index.max_probes())
        assert len(set(ids.tolist())) == count
    assert ids.tolist() == [78]


def test_kinds_that_are_said_to_be_streamed_are_those_that_can_be(tmp_path: Path) -> None:
    for kind in (one for one in KINDS if one.startswith("ivf")):
        index = building._empty_index(plan_of_kind(kind, 100, DIM))
        try:
            num_lists = faiss.extract_index_ivf(index).nlist
            with InvertedFile(tmp_path / kind, index, np.zeros(num_lists, np.int64)):
                streams = True
        except CollectionError:
            streams = False
        assert streams == (kind in STREAMED_KINDS)


@pytest.mark.parametrize("factory", ["IVF4,RaBitQfs", "IVF4,PQ4x4fs"])
def test_lists_packed_in_blocks_are_refused(tmp_path: Path, factory: str) -> None:
    index = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
    with pytest.raises(CollectionError, match=r"FastScan .* cannot be written list by list"):
        InvertedFile(tmp_path / "x", index, np.zeros(4, np.int64))
    assert list(tmp_path.iterdir()) == []


def test_full_disk_in_the_middle_leaves_nothing_and_says_so(
    whole: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.pwrite, []

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) == 30:
            raise OSError(28, "No space left on device")
        return real(descriptor, data[: 1 + len(data) // 2], offset)  # and never all at once

    monkeypatch.setattr(os, "pwrite", full)
    folder = tmp_path / "indexes"
    folder.mkdir()
    plan = plan_of_kind("ivf-sq8", COUNT, DIM)
    with pytest.raises(CollectionError, match=r"cannot be written .*No space left"):
        build_index(folder, whole, generation=1, plan=plan)
    assert list(folder.iterdir()) == []
    calls.extend(range(30))  # what is written in small pieces is whole
    built = build_index(folder, whole, generation=1, plan=plan)
    assert load_index(folder, built, DIM).faiss_index.ntotal == COUNT


_KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from clipsys.retrieval.indexes import building, inverted_file
from clipsys.retrieval.storage.manifest import IndexGeneration
from tests.retrieval.clustered import clustered, keep, snapshot_of

real, calls = inverted_file.InvertedFile.append, []
def append(*arguments):
    calls.append(1)
    if len(calls) == 60:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*arguments)
inverted_file.InvertedFile.append = append
folder = Path(sys.argv[1])
first = IndexGeneration.model_validate_json(sys.argv[2])
building.extend_index(folder, snapshot_of(folder / "again", clustered(3_000, 24)), first)
"""


def test_kill_in_the_middle_leaves_the_old_file_and_one_that_the_next_writer_deletes(
    whole: Snapshot, tmp_path: Path
) -> None:
    folder = tmp_path / "indexes"
    folder.mkdir()
    old = keep(whole, np.arange(COUNT) < 2_000)
    plan = plan_of_kind("ivf-flat", len(old), DIM)
    first = build_index(folder, old, generation=1, plan=plan)
    command = [sys.executable, "-c", _KILLED, str(folder), first.model_dump_json()]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (half,) = folder.glob(".000002-*.faiss.new")
    assert half.stat().st_size > 0
    assert is_sound(folder, first)
    delete_stale(folder, first)
    assert [path.name for path in folder.iterdir() if path.is_file()] == [first.file]


def test_index_larger_than_the_memory_is_built_within_what_the_plan_says(tmp_path: Path) -> None:
    """In a real process with a hard limit, where building in memory fails."""
    limited_build.write_vectors(tmp_path / "segments")
    streamed, in_memory = (
        subprocess.run(
            [sys.executable, "-m", "tests.retrieval.limited_build", str(tmp_path), way],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        for way in ("streamed", "in-memory")
    )
    assert streamed.returncode == 0, streamed.stderr
    assert in_memory.returncode != 0  # MemoryError, or FAISS dies of it
    built = IndexGeneration.model_validate_json(streamed.stdout)
    size = (tmp_path / built.file).stat().st_size
    assert size > 1.25 * limited_build.plan().build_bytes
    index = load_index(tmp_path, built, limited_build.DIM)
    snapshot = limited_build.snapshot_of(tmp_path / "segments")
    rows = np.arange(0, len(snapshot), 40_001)
    for row, vector_D in zip(rows, snapshot.take(rows), strict=True):
        assert index.search(vector_D, 1)[0].tolist() == [row + 1]
