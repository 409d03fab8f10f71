"""`make gpu` runs whole without a GPU, at tiny sizes; a part that fails does not end the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
PARTS = ("peak", "loss", "training", "indexing", "search", "tests")


def _run(
    out: Path, *options: str, environment: dict[str, str] | None = None
) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cpu", "--smoke", "--out", str(out), *options],
        env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert out.exists(), done.stderr
    return done.returncode, json.loads(out.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    status, document = _run(tmp_path_factory.mktemp("gpu") / "report.json")
    assert status == 0, document
    return document


def _row(report: dict[str, Any], part: str, name: str) -> dict[str, Any]:
    rows: list[dict[str, Any]] = report["parts"][part]["rows"]
    return next(row for row in rows if row["name"] == name)


@pytest.mark.timeout(300)
def test_every_part_leaves_its_figures_and_versions(report: dict[str, Any]) -> None:
    assert tuple(report["parts"]) == PARTS
    assert all(part["status"] == "ok" and part["rows"] for part in report["parts"].values())
    assert report["machine"]["versions"]["torch"]
    assert _row(report, "training", "tiny, fp32, 8 in micro-batches of 2")["pairs_per_s"] > 0
    assert _row(report, "search", "ivf-sq8 on the CPU")["recall"] > 0.9
    assert _row(report, "indexing", "Collection.add")["images"] == 12
    assert {row["outcome"] for row in report["parts"]["tests"]["rows"]} <= {"skipped", "passed"}


def test_losses_of_all_sides_have_the_same_gradient(report: dict[str, Any]) -> None:
    expected = _row(report, "loss", "open_clip, 48 pairs")["gradient_norm"]
    for name, tolerance in (("clipsys", 1e-5), ("triton 0 fp32", 1e-5), ("triton 0 bf16", 1e-2)):
        found = _row(report, "loss", f"{name}, 48 pairs")["gradient_norm"]
        assert found == pytest.approx(expected, rel=tolerance), name


def test_rates_are_shares_of_the_measured_peak(report: dict[str, Any]) -> None:
    peak = _row(report, "peak", "fp32")["tflops"]
    row = _row(report, "loss", "clipsys, 48 pairs")
    assert row["share_of_peak"] == pytest.approx(row["tflops"] / peak, abs=1e-4)


def test_a_part_that_cannot_run_says_why_and_the_next_one_runs(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "open_clip.py").write_text("raise ImportError('no open_clip here')\n")
    out = tmp_path / "report.json"
    status, document = _run(out, "--parts", "loss", "peak", environment={"PYTHONPATH": str(broken)})
    assert status == 1
    assert document["parts"]["peak"]["status"] == "ok"
    assert document["parts"]["loss"]["status"] == "failed"
    assert "no open_clip here" in " ".join(document["parts"]["loss"]["reasons"])
    # What does not need it was measured.
    assert _row(document, "loss", "clipsys, 48 pairs")["seconds"] > 0
    kept = document["parts"]["loss"]["measured_at"]
    status, document = _run(out, "--parts", "peak")
    assert status == 0 and document["parts"]["loss"]["measured_at"] == kept


def test_a_part_that_takes_too_long_is_ended_and_keeps_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import argparse

    import gpu

    slow = tmp_path / "slow.py"
    slow.write_text(
        'import time\nprint(\'MEASURED {"name": "one", "tflops": 1}\', flush=True)\n'
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu, "PARTS", slow)
    arguments = argparse.Namespace(device="cpu", smoke=True)
    result = gpu.run_part("peak", arguments, dict(os.environ), tmp_path, 1.0)
    assert result["status"] == "too slow" and result["seconds"] < 20
    assert result["rows"] == [{"name": "one", "tflops": 1}]
    assert "more than 1 s" in result["reasons"][0]


def test_wheels_are_those_of_the_tested_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu_wheels

    versions = gpu_wheels.pinned_versions()
    for package in (*gpu_wheels.PACKAGES, *gpu_wheels.SOURCES, *gpu_wheels.FAISS_ON_GPUS):
        assert versions[gpu_wheels._name(package)], package
