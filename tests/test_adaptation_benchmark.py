"""What benchmarks/adaptation.py splits and chooses, by rules that its page states."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def _module(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    __import__(name)
    return sys.modules[name]


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return _module(monkeypatch, "adaptation_cells")


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return _module(monkeypatch, "adaptation_report")


def test_products_are_split_by_their_numbers_whatever_the_order_of_the_table(
    cells: ModuleType,
) -> None:
    rows = [{"filepath": f"images/{7 * n}.jpg", "caption": f"title {n}"} for n in range(100)]
    parts = cells.split(rows[::-1])
    assert parts == cells.split(rows)
    assert {part: len(own) for part, own in parts.items()} == {
        "train": 70, "validation": 10, "test": 20,
    }  # fmt: skip
    assert [row["filepath"] for row in parts["test"][:3]] == [
        "images/0.jpg", "images/35.jpg", "images/70.jpg",
    ]  # fmt: skip
    assert sorted(row["filepath"] for own in parts.values() for row in own) == sorted(
        row["filepath"] for row in rows
    )


def test_held_out_titles_that_were_trained_on_are_counted(cells: ModuleType) -> None:
    rows = [{"filepath": f"{n}.jpg", "caption": "boot" if n < 6 else str(n)} for n in range(10)]
    # Held out are 0 ("boot", as the trained 1, 2 and 4 are) and 5 ("boot" too).
    assert cells.described(cells.split(rows)) == {
        "train": 7, "validation": 1, "test": 2, "test_titles_in_train": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("figures", "share"),
    [
        ({0: 0.1, 0.2: 0.18, 0.4: 0.19, 0.6: 0.21, 1: 0.2}, 0.4),
        ({0: 0.1, 0.2: 0.11, 0.4: 0.12, 0.6: 0.18, 1: 0.2}, 1),
        # A tuned model that gained nothing is not worth leaving the base for.
        ({0: 0.2, 0.2: 0.2, 1: 0.1}, 0),
    ],
)
def test_the_smallest_share_that_keeps_nine_tenths_of_the_gain_is_taken(
    report: ModuleType, figures: dict[float, float], share: float
) -> None:
    assert report.least_share(figures) == share


def test_a_rate_is_chosen_when_all_of_a_method_were_run(
    cells: ModuleType, report: ModuleType
) -> None:
    low, high = cells.METHODS["lora"].rates
    done = {
        cells.Cell("lora", lr).key: {"validation": {cells.CHOSEN_BY: value}}
        for lr, value in ((low, 0.3), (high, 0.2))
    }
    assert report.best_rate("lora", done) == low
    del done[cells.Cell("lora", high).key]
    assert report.best_rate("lora", done) is None


def _figures(value: float) -> dict[str, Any]:
    both = {f"{way}/recall@10": value for way in ("text_to_image", "image_to_text")}
    return {"test": both, "photos": both, "objects": {"accuracy@1": value}}


def test_the_summary_takes_the_seeds_that_are_there(cells: ModuleType, report: ModuleType) -> None:
    rate, other = cells.METHODS["full"].rates
    done = {
        cells.Cell("full", lr, seed).key: {
            "validation": {cells.CHOSEN_BY: 0.3 if lr == rate else 0.1}, "cpu_seconds": 10.0,
        }
        for lr, seed in ((rate, 0), (other, 0), (rate, 1))
    }  # fmt: skip
    figures = {
        "base": _figures(0.5),
        cells.Cell("full", rate, 0).key: _figures(0.6),
        cells.Cell("full", rate, 1).key: _figures(0.8),
    }
    made = report.summary(done, figures)
    row = made["methods"]["full"]
    assert row["lr"] == rate and row["seeds"] == 2
    assert row["figures"]["objects/accuracy@1"] == {
        "mean": 0.7, "std": pytest.approx(0.1414), "values": [0.6, 0.8],
    }  # fmt: skip
    assert [*made["methods"]] == ["base", "full"] and made["curve"] == []
    assert "| full fine-tuning | 0.0001 (0.0001, 0.0003) | 0.700 ± 0.141 |" in report.table(made)
