"""Searching on GPUs: the decisions and the fallbacks with a device that has a GPU's limits.

The last tests need a CUDA device, and are skipped without one.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from clipsys.errors import ConfigError
from clipsys.retrieval import Collection
from clipsys.retrieval.indexes import gpu
from clipsys.retrieval.indexes.building import build_index
from clipsys.retrieval.indexes.clustering import nearest
from clipsys.retrieval.indexes.generation import LoadedIndex, load_index
from clipsys.retrieval.indexes.gpu import GpuCopy, choose_placement, copy_to_gpus
from clipsys.retrieval.indexes.id_set import IdSet
from clipsys.retrieval.indexes.planning import KINDS, plan_of_kind
from clipsys.retrieval.search.ranking import rank, rank_batch
from clipsys.retrieval.storage.manifest import IndexGeneration, Kind
from clipsys.retrieval.storage.segments import Floats, Ints
from clipsys.retrieval.storage.snapshot import Snapshot
from tests.retrieval.clustered import clustered, keep, snapshot_of
from tests.retrieval.colours import ColourEncoder

DIM, COUNT = 24, 4_000
GIB = 2**30


class Device:
    """An index on a GPU as FAISS has it: no filter, 2,048 at most, one call at a time."""

    def __init__(self, index: Any) -> None:
        self._index = index
        self._busy = threading.Lock()
        self.searches: list[tuple[int, int]] = []
        self.failure: RuntimeError | None = None
        self.num_probes = 1

    def search(self, query_QD: Floats, k: int) -> tuple[Floats, Ints]:
        assert self._busy.acquire(blocking=False), "two calls at once"
        try:
            assert 1 <= k <= 2_048
            assert self.num_probes <= 2_048
            assert query_QD.dtype == np.float32
            assert query_QD.flags.c_contiguous
            time.sleep(0.001)
            if self.failure is not None:
                raise self.failure
            self.searches.append((len(query_QD), k))
            if isinstance(self._index, faiss.IndexIVF):
                self._index.nprobe = self.num_probes
            found: tuple[Floats, Ints] = self._index.search(query_QD, k)
            return found
        finally:
            self._busy.release()

    def set_num_probes(self, num_probes: int) -> None:
        assert not self._busy.locked(), "changed during a search"
        self.num_probes = num_probes


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return snapshot_of(tmp_path_factory.mktemp("vectors"), clustered(COUNT, DIM))


@pytest.fixture(scope="module", params=["flat", "ivf-flat", "ivf-sq8"])
def on_cpu(
    whole: Snapshot, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> LoadedIndex:
    folder = tmp_path_factory.mktemp("index")
    plan = plan_of_kind(request.param, COUNT, DIM)
    return load_index(folder, build_index(folder, whole, generation=1, plan=plan), DIM)


@pytest.fixture
def device(on_cpu: LoadedIndex) -> Device:
    index = on_cpu.faiss_index
    if isinstance(index, faiss.IndexIVF):  # FAISS clones no mapped lists, but copies their parts
        copy = emptied(index)
        index.copy_subset_to(copy, faiss.InvertedLists.SUBSET_TYPE_ID_MOD, 1, 0)
        return Device(copy)
    return Device(faiss.clone_index(index))


def emptied(index: Any) -> Any:
    """The same quantizers without vectors; the index itself is as before."""
    lists, count = index.invlists, index.ntotal
    index.own_invlists = False
    empty = faiss.ArrayInvertedLists(index.nlist, index.code_size)
    index.replace_invlists(empty, False)
    index.ntotal = 0
    copy = faiss.clone_index(index)
    index.replace_invlists(lists, True)
    index.ntotal = count
    return copy


@pytest.fixture
def index(on_cpu: LoadedIndex, device: Device) -> LoadedIndex:
    return replace(on_cpu, on_gpus=GpuCopy(device, COUNT))


def assert_same(ours: list[Any], theirs: list[Any]) -> None:
    for (ids, scores), (expected_ids, expected_scores) in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(ids, expected_ids)
        np.testing.assert_array_equal(scores, expected_scores)


# ---- where ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "size", "free", "num_gpus", "sharded", "reason"),
    [
        ("ivf-sq8", GIB, [], 0, False, "no GPU"),
        ("ivf-sq8", GIB, [8 * GIB], 1, False, "fit on each"),
        ("flat", GIB, [8 * GIB, 4 * GIB], 2, False, "fit on each"),
        ("ivf-flat", 4 * GIB, [8 * GIB, 6 * GIB], 2, True, "a part on each"),
        ("ivf-flat", 4 * GIB, [20 * GIB, GIB], 0, False, "do not fit"),
        ("ivf-sq8", 40 * GIB, [8 * GIB] * 4, 0, False, "do not fit"),
        ("ivf-rabitq", 1, [8 * GIB], 0, False, "no ivf-rabitq on GPUs"),
        ("hnsw", 1, [8 * GIB], 0, False, "no hnsw on GPUs"),
    ],
)
def test_index_is_on_each_gpu_or_divided_or_on_the_cpu(
    kind: str, size: int, free: list[int], num_gpus: int, sharded: bool, reason: str
) -> None:
    placement = choose_placement(kind, size, free)
    assert (placement.num_gpus, placement.sharded) == (num_gpus, sharded)
    assert reason in str(placement)


def test_environment_keeps_indexes_off_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 3)
    assert gpu.num_gpus() == 3
    monkeypatch.setenv(gpu.VARIABLE, "cpu")
    assert gpu.num_gpus() == 0
    monkeypatch.setenv(gpu.VARIABLE, "cuda:1")
    with pytest.raises(ConfigError, match="'cuda:1'; expected auto or cpu"):
        gpu.num_gpus()


def test_wheel_without_gpus_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(faiss, "get_num_gpus")
    assert gpu.num_gpus() == 0


# ---- searching -----------------------------------------------------------------------------------


def test_device_answers_and_the_results_are_those_of_the_cpu(
    whole: Snapshot, on_cpu: LoadedIndex, index: LoadedIndex, device: Device
) -> None:
    queries = clustered(30, DIM, seed=2)
    assert_same(rank_batch(whole, index, queries, 10), rank_batch(whole, on_cpu, queries, 10))
    assert device.searches
    if on_cpu.effort is not None:
        assert device.num_probes == on_cpu.effort.num_probes


def test_deleted_items_cost_some_more_candidates_and_are_never_found(
    whole: Snapshot, on_cpu: LoadedIndex, index: LoadedIndex, device: Device
) -> None:
    snapshot = keep(whole, np.arange(COUNT) % 5 != 0)
    queries = clustered(30, DIM, seed=3)
    found = rank_batch(snapshot, index, queries, 10)
    assert_same(found, rank_batch(snapshot, on_cpu, queries, 10))
    assert device.searches
    assert all(np.isin(ids, snapshot.ids_N).all() for ids, _ in found)


@pytest.mark.parametrize("share", [2, 7, 300])
def test_filter_gives_what_it_gives_on_the_cpu(
    whole: Snapshot,
    on_cpu: LoadedIndex,
    index: LoadedIndex,
    share: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("clipsys.retrieval.search.ranking._SCAN_BELOW", 0)
    monkeypatch.setattr("clipsys.retrieval.search.ranking._SCAN_SHARE", 10**9)
    queries, allowed = clustered(20, DIM, seed=4), whole.ids_N[::share]
    ours, theirs = (rank_batch(whole, one, queries, 8, allowed=allowed) for one in (index, on_cpu))
    assert_same(ours, theirs)


def test_filter_that_leaves_too_few_of_what_was_fetched_goes_to_the_cpu(
    whole: Snapshot, on_cpu: LoadedIndex, index: LoadedIndex, device: Device
) -> None:
    """The allowed half is the one that is far away."""
    (query,) = clustered(1, DIM, seed=5)
    order = np.argsort(-(whole.take(np.arange(COUNT)) @ query))
    far = IdSet(np.sort(whole.ids_N[order[COUNT // 2 :]]))
    probes = on_cpu.max_probes() if on_cpu.effort else None
    ours, theirs = (one.search(query, 5, allowed=far, num_probes=probes) for one in (index, on_cpu))
    np.testing.assert_array_equal(ours[0], theirs[0])
    assert device.searches  # asked, and its answer was no use
    assert index.on_gpus is not None
    assert index.on_gpus.search(query[None], 5, allowed=far, num_probes=probes) is None


def test_more_than_a_device_can_select_goes_to_the_cpu(
    whole: Snapshot, on_cpu: LoadedIndex, index: LoadedIndex, device: Device
) -> None:
    (query,) = clustered(1, DIM, seed=6)
    assert len(rank(whole, index, query, 3_000)[0]) == 3_000
    assert all(k <= gpu.MAX_SELECTION for _, k in device.searches)
    count = len(device.searches)
    if on_cpu.effort is not None:
        index.search(query, 5, num_probes=2_049)
    assert len(device.searches) == count


def test_threads_take_turns(whole: Snapshot, on_cpu: LoadedIndex, index: LoadedIndex) -> None:
    queries = clustered(40, DIM, seed=7)
    with ThreadPoolExecutor(8) as threads:
        ours = list(threads.map(lambda query: rank(whole, index, query, 10), queries))
    assert_same(ours, [rank(whole, on_cpu, query, 10) for query in queries])


def test_device_that_fails_is_left_for_the_cpu_and_it_is_said_once(
    whole: Snapshot,
    on_cpu: LoadedIndex,
    index: LoadedIndex,
    device: Device,
    caplog: pytest.LogCaptureFixture,
) -> None:
    device.failure = RuntimeError("Error in\n StandardGpuResources: alloc fail")
    queries = clustered(5, DIM, seed=8)
    expected = rank_batch(whole, on_cpu, queries, 10)
    with caplog.at_level(logging.WARNING, "clipsys"):
        assert_same(rank_batch(whole, index, queries, 10), expected)
        device.failure = None
        assert_same(rank_batch(whole, index, queries, 10), expected)
    assert device.searches == []
    assert [record.message for record in caplog.records] == [
        "searching on the CPU from here on: Error in StandardGpuResources: alloc fail"
    ]


@pytest.mark.skipif(gpu.num_gpus() > 0, reason="copying works here")
def test_index_stays_on_the_cpu_where_copying_it_fails(
    on_cpu: LoadedIndex, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert copy_to_gpus(on_cpu.generation, on_cpu.faiss_index, GIB) is None
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)  # FAISS's own code finds none
    monkeypatch.setattr(gpu, "_free_bytes", lambda count: [8 * GIB] * count)
    with caplog.at_level(logging.INFO, "clipsys"):
        assert copy_to_gpus(on_cpu.generation, on_cpu.faiss_index, GIB) is None
    assert "is searched on: 1 GPU (1.3 GB fit on each)" in caplog.text
    assert "searching on the CPU: Error in" in caplog.text


def test_copy_that_was_released_leaves_searching_to_the_cpu(
    whole: Snapshot, on_cpu: LoadedIndex, index: LoadedIndex, device: Device
) -> None:
    queries = clustered(5, DIM, seed=8)
    assert index.on_gpus is not None
    index.on_gpus.release()
    assert_same(rank_batch(whole, index, queries, 10), rank_batch(whole, on_cpu, queries, 10))
    assert device.searches == []


def test_collection_copies_each_generation_and_releases_the_one_before(
    collection: Collection,
    photos: Path,
    encoder: ColourEncoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    devices: list[Device] = []
    copies: list[GpuCopy] = []

    def copied(generation: IndexGeneration, faiss_index: Any, index_bytes: int) -> GpuCopy:
        assert index_bytes > 0
        devices.append(Device(faiss_index))
        copies.append(GpuCopy(devices[-1], generation.num_items))
        return copies[-1]

    monkeypatch.setattr(gpu, "copy_to_gpus", copied)
    collection.add(photos, show_progress=False)
    with Collection.open(collection.path, encoder, few_searches=True) as brief:
        expected = [hit.id for hit in brief.search("red", k=3)]
    assert devices == []
    with Collection.open(collection.path, encoder) as opened:
        assert [hit.id for hit in opened.search("red", k=3)] == expected
        collection.build_index()
        assert [hit.id for hit in opened.search("red", k=3)] == expected
    assert len(devices) == 2
    assert all(device.searches for device in devices)
    query = np.ones((1, encoder.dim), np.float32)
    assert copies[0].search(query, 1, allowed=None, num_probes=None) is None
    assert copies[1].search(query, 1, allowed=None, num_probes=None) is not None


@pytest.mark.parametrize("ids", [[], [1], [3, 8, 9, 200], list(range(1, 99))])
def test_set_of_ids_knows_its_own(ids: list[int]) -> None:
    asked = np.array([[-1, 0, 1, 3, 7], [8, 9, 199, 200, 10_000]])
    found = IdSet(np.array(ids, np.int64)).contains(asked)
    np.testing.assert_array_equal(found, np.isin(asked, ids))


# ---- building ------------------------------------------------------------------------------------


def test_kmeans_of_float16_is_that_of_the_same_vectors_in_float32() -> None:
    sample_ND = clustered(2_000, DIM, seed=1).astype(np.float16)
    found = gpu.kmeans(sample_ND, 20, rounds=8, flat=faiss.IndexFlatIP)
    plain = faiss.Kmeans(
        DIM, 20, niter=8, seed=1, spherical=True, min_points_per_centroid=1,
        max_points_per_centroid=2_000,
    )  # fmt: skip
    plain.train(sample_ND.astype(np.float32))
    np.testing.assert_allclose(found, plain.centroids, atol=1e-6)


def test_list_of_each_vector_is_that_of_the_nearest_centroid() -> None:
    vectors_ND, centroids_LD = clustered(500, DIM, seed=2), clustered(17, DIM, seed=3)
    on_device = gpu.NearestCentroid(centroids_LD, flat=faiss.IndexFlatIP)
    np.testing.assert_array_equal(on_device(vectors_ND), nearest(vectors_ND, centroids_LD)[0])


# ---- on a real one -------------------------------------------------------------------------------

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(gpu.num_gpus() == 0, reason="FAISS sees no GPU"),
]


class TestOnGpus:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("sharded", [False, True])
    def test_same_results_as_on_the_cpu(
        self, whole: Snapshot, tmp_path: Path, kind: Kind, sharded: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        plan = plan_of_kind(kind, COUNT, DIM)
        on_cpu = load_index(tmp_path, build_index(tmp_path, whole, generation=1, plan=plan), DIM)
        if sharded:
            placement = gpu.Placement(gpu.num_gpus(), True, "asked for")
            monkeypatch.setattr(gpu, "placement_of", lambda *_: placement)
            if kind not in gpu.GPU_KINDS:
                pytest.skip("not on GPUs at all")
        size_bytes = (tmp_path / on_cpu.generation.file).stat().st_size
        copy = copy_to_gpus(on_cpu.generation, on_cpu.faiss_index, size_bytes)
        assert (copy is not None) == (kind in gpu.GPU_KINDS)
        index = replace(on_cpu, on_gpus=copy)
        queries = clustered(50, DIM, seed=9)
        for snapshot in (whole, keep(whole, np.arange(COUNT) % 3 != 0)):
            expected = rank_batch(snapshot, on_cpu, queries, 10)
            assert_same(rank_batch(snapshot, index, queries, 10), expected)
            with ThreadPoolExecutor(8) as threads:
                ours = list(threads.map(lambda one: rank(snapshot, index, one, 10), queries))  # noqa: B023
            assert_same(ours, [rank(snapshot, on_cpu, query, 10) for query in queries])
        if copy is not None:
            assert copy.search(queries, 10, allowed=None, num_probes=4) is not None

    def test_lists_found_on_it_are_the_nearest(self) -> None:
        vectors_ND, centroids_LD = clustered(5_000, DIM, seed=2), clustered(70, DIM, seed=3)
        list_N = gpu.NearestCentroid(centroids_LD)(vectors_ND)
        products_NL = vectors_ND @ centroids_LD.T
        chosen_N = products_NL[np.arange(len(list_N)), list_N]
        np.testing.assert_allclose(chosen_N, products_NL.max(axis=1), atol=1e-5)
