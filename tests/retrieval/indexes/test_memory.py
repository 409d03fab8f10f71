"""How much memory there is, and what becomes of an index that does not fit into it."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import numpy as np
import pytest

from clipsys.retrieval import Collection
from clipsys.retrieval.indexes import memory
from clipsys.retrieval.indexes.building import build_index, default_memory_bytes
from clipsys.retrieval.indexes.fastscan import FastScan, copy_bytes
from clipsys.retrieval.indexes.generation import load_index
from clipsys.retrieval.indexes.planning import plan_of_kind
from clipsys.retrieval.storage.items import Batch, NewItem
from tests.retrieval.clustered import clustered, snapshot_of
from tests.retrieval.colours import ColourEncoder

GB = 10**9


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What Linux says of a machine with 8 GB, 6 of them free, and of no container."""
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(
        os, "sysconf", {"SC_PHYS_PAGES": 8 * GB // 4_000, "SC_PAGE_SIZE": 4_000}.get
    )
    write(tmp_path / "proc/meminfo", f"MemTotal: 1 kB\nMemAvailable: {6 * GB // 1_024} kB\n")
    return tmp_path


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n", encoding="ascii")


def test_machine_without_limits_has_what_it_has(machine: Path) -> None:
    assert memory.total_bytes() == 8 * GB
    assert memory.available_bytes() == pytest.approx(6 * GB, abs=1_024)
    assert default_memory_bytes() == 4 * GB


def test_where_linux_says_nothing_the_total_is_all_that_is_known(machine: Path) -> None:
    (machine / "proc/meminfo").unlink()
    assert memory.available_bytes() == memory.total_bytes() == 8 * GB


def test_container_counts_whatever_the_machine_has(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "0::/a/b")
    write(machine / "cgroup/a/b/memory.max", "max")  # its parent has the limit
    write(machine / "cgroup/a/b/memory.current", GB)
    write(machine / "cgroup/a/memory.max", 2 * GB)
    write(machine / "cgroup/a/memory.current", 1_500_000_000)
    write(
        machine / "cgroup/a/memory.stat", "anon 1\nactive_file 300000000\ninactive_file 200000000"
    )
    assert memory.total_bytes() == 2 * GB
    assert memory.available_bytes() == GB
    assert default_memory_bytes() == GB


def test_container_of_the_first_version_whose_path_is_the_hosts(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "5:cpu:/x\n4:memory:/docker/1234")
    write(machine / "cgroup/memory/memory.limit_in_bytes", 3 * GB)
    write(machine / "cgroup/memory/memory.usage_in_bytes", GB)
    write(machine / "cgroup/memory/memory.stat", "total_inactive_file 500000000")
    assert memory.total_bytes() == 3 * GB
    assert memory.available_bytes() == 2 * GB + 500_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="Linux says what a process uses")
def test_own_limit_counts() -> None:
    (line,) = [
        line for line in Path("/proc/self/status").read_text().splitlines() if "VmData" in line
    ]
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (1_024 * int(line.split()[1]) + 100_000_000, hard))
    try:
        assert 50_000_000 < memory.available_bytes() < 150_000_000
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def test_ivf_pq_without_room_for_its_copy_is_searched_from_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    vectors_ND = clustered(3_000, 32)
    snapshot = snapshot_of(tmp_path / "segments", vectors_ND)
    plan = plan_of_kind("ivf-pq", 3_000, 32, recall=0.9)
    generation = build_index(tmp_path, snapshot, generation=1, plan=plan)
    fast = load_index(tmp_path, generation, 32)
    assert isinstance(fast.faiss_index, FastScan)
    assert fast.faiss_index.ntotal * (8 + 8) < copy_bytes(fast.faiss_index._stored) < 1_000_000
    monkeypatch.setattr(memory, "available_bytes", lambda: 10_000)
    slow = load_index(tmp_path, generation, 32)
    assert not isinstance(slow.faiss_index, FastScan)
    assert "MB are free: it is searched from its file, more slowly" in caplog.text
    queries_QD = clustered(50, 32, seed=5)
    (_, fast_QK), (_, slow_QK) = (
        one.search_batch(queries_QD, 20, num_probes=30) for one in (fast, slow)
    )
    # Fast scan rounds its tables to bytes: the candidates are nearly the same.
    common = [len(set(a) & set(b)) for a, b in zip(fast_QK, slow_QK, strict=True)]
    assert np.mean(common) > 18


def test_collection_on_a_smaller_machine_answers_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = ColourEncoder()
    query_D = clustered(1, 24, seed=3)[0]
    for limit, kind in ((50, "ivf-pq"), (10_000, "flat")):
        monkeypatch.setattr("clipsys.retrieval.indexes.planning.EXACT_ITEMS", limit)
        with Collection.create(tmp_path / kind, encoder) as photos:
            new = [NewItem(f"/{n}.jpg", f"{n}", 1, 1, (), {}) for n in range(2_000)]
            with photos._writing() as writer:
                writer.commit(Batch(new=new), clustered(2_000, 24))
                writer.refresh_index()
            assert photos.index is not None
            assert photos.index.kind == kind
            expected = [hit.id for hit in photos.search_vector(query_D)]
        caplog.clear()
        with monkeypatch.context() as patch, Collection.open(tmp_path / kind) as photos:
            patch.setattr(memory, "available_bytes", lambda: 10_000)
            assert [hit.id for hit in photos.search_vector(query_D)] == expected
        assert "MB are free" in caplog.text
    assert "every vector is compared" in caplog.text
