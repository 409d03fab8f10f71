"""The figures of a run: valid JSON always, also after a crash."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from clipsys.training.journal import METRICS_NAME, Journal, plot_curves, read_metrics
from clipsys.training.json_lines import read_lines, rewrite


def _refuse(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


def test_figures_that_are_no_numbers_are_null(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write(10, {"loss": 1.5, "gradient_norm": math.inf, "x": math.nan, "n": [-math.inf, 1]})
    journal.close()
    (line,) = (tmp_path / METRICS_NAME).read_text().splitlines()
    assert json.loads(line, parse_constant=_refuse) == {
        "step": 10, "loss": 1.5, "gradient_norm": None, "x": None, "n": [None, 1],
    }  # fmt: skip
    plot_curves(tmp_path, tmp_path / "curves.png")


@pytest.mark.parametrize(
    "tail", [b'{"step": 20, "lo', b"\x00\x00\x00", b'{"step": 2', b"\xff\n7\n"]
)
def test_lines_that_a_crash_has_cut_are_left_out(
    tmp_path: Path, tail: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / METRICS_NAME
    path.write_bytes(b'{"step": 10, "loss": 2.0}\n' + tail)
    with caplog.at_level(logging.WARNING):
        assert read_metrics(tmp_path) == [{"step": 10, "loss": 2.0}]
    assert f"{path}: " in caplog.text and "left out" in caplog.text
    plot_curves(tmp_path, tmp_path / "curves.png")
    journal = Journal(tmp_path)
    journal.write(20, {"loss": 1.0})
    journal.close()
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [10, 20]


def test_a_line_may_hold_any_text(tmp_path: Path) -> None:
    entries = [{"step": 1, "key": text} for text in ("a\u2028b\x85c", "\udc80", "日本")]
    rewrite(tmp_path / "x.jsonl", entries)
    assert read_lines(tmp_path / "x.jsonl") == entries
    assert "日本" in (tmp_path / "x.jsonl").read_text(encoding="utf-8")
