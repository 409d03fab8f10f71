from __future__ import annotations

import os
from pathlib import Path

import pytest

from clipsys.probe import machine


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "nonsense"}, None),
        ({}, None),
    ],
)
def test_a_containers_quota_is_read(
    files: dict[str, str], expected: float | None, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert machine._quota_cores(tmp_path) == expected


def test_cores_are_those_of_machine_affinity_and_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert machine.available_cores() == 8
    (tmp_path / "cpu.max").write_text("250000 100000")
    assert machine.available_cores() == 3
    (tmp_path / "cpu.max").write_text("20000 100000")
    assert machine.available_cores() == 1


def test_threads_that_the_launcher_set_are_not_the_users_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert machine.threads_are_set()
    monkeypatch.setenv(machine.SHARED_CORES, "2")
    assert not machine.threads_are_set()
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert not machine.threads_are_set()


def test_the_description_names_what_speed_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    before = machine.describe()
    assert before["torch"] == torch.__version__
    assert before["processor"]
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert machine.describe() != before
    assert machine.waiting_s() >= 0
