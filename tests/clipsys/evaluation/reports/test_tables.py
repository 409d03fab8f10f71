from __future__ import annotations

import os
import sys
from collections.abc import Callable

import pytest

from clipsys.evaluation.comparison import Change, Comparison, Difference, compare
from clipsys.evaluation.reports.tables import (
    comparison_lines,
    print_lines,
    result_lines,
    shown,
    spread_changes,
)
from clipsys.evaluation.resampling import PairedTest
from tests.clipsys.evaluation.reports.made import HOSTILE, classification, curves, retrieval


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes stdout a terminal of so many columns."""

    def make(columns: int) -> None:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        monkeypatch.setattr("shutil.get_terminal_size", lambda *_: os.terminal_size((columns, 24)))

    return make


def _comparison() -> Comparison:
    test = PairedTest("McNemar, chi-square", 2.34e-16)
    one = Difference(0.5, 0.625, (-0.1234, 0.2345), test, 1234, 5678, 5000)
    names = [
        f"{way}/{name}"
        for way in ("text_to_image", "image_to_text")
        for name in ("recall@1", "recall@10")
    ]
    return Comparison("retrieval", "A", "B", "data", "words " * 40, dict.fromkeys(names, one), [])


def test_a_pipe_gets_one_tab_separated_line_for_every_figure() -> None:
    lines = result_lines(curves(9))
    table = [line.split("\t") for line in lines if "\t" in line]
    assert table[0] == ["figure", "value", "95 % interval", "samples", "chance"]
    assert len(table) == 1 + 1 + 9 * 3
    assert ["clean/accuracy@1", "0.8000", "0.7000 to 0.9000", "100", "0.1000"] in table
    assert {len(row) for row in table} == {5}


@pytest.mark.parametrize("result", [classification(), retrieval(), curves(1), curves(9)])
def test_a_terminal_of_80_columns_gets_aligned_lines_that_fit(
    result: object, terminal: Callable[[int], None]
) -> None:
    terminal(80)
    lines = result_lines(result)  # type: ignore[arg-type]
    assert max(map(len, lines)) <= 80
    assert not any("\t" in line for line in lines)
    header = next(line for line in lines if "95 % interval" in line)
    end = header.index("95 % interval") + len("95 % interval")
    rows = [line for line in lines if " to " in line and len(line) > end]
    assert rows
    assert all(line[end : end + 1] == " " for line in rows)


def test_many_lines_are_one_row_each_on_a_terminal(terminal: Callable[[int], None]) -> None:
    terminal(80)
    lines = result_lines(curves(9))
    assert sum("line 3" in line for line in lines) == 1
    grid = next(line for line in lines if line.startswith("  accuracy@1 by severity"))
    assert grid.split()[-4:] == ["0", "1", "2", "4"]


def test_a_comparison_fits_80_columns(terminal: Callable[[int], None]) -> None:
    terminal(80)
    lines = comparison_lines(_comparison())
    assert max(map(len, lines)) <= 80
    assert "  text_to_image" in lines
    assert any(line.startswith("    recall@10") for line in lines)


def test_a_comparison_in_a_pipe_keeps_whole_names() -> None:
    rows = [line.split("\t") for line in comparison_lines(_comparison()) if "\t" in line]
    assert rows[1] == [
        "text_to_image/recall@1", "0.5000", "0.6250", "+0.1250", "-0.1234 to +0.2345", "2.3e-16",
        "1,234/5,678",
    ]  # fmt: skip


def test_values_are_shown_as_people_read_them() -> None:
    assert [shown(one) for one in (None, float("nan"), float("inf"), 0.12345, 1234.56)] == [
        "-", "-", "never", "0.1235", "1,234.6",
    ]  # fmt: skip


def test_nothing_in_a_name_acts_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "".join(HOSTILE)
    first = classification([hostile, "other"], model=hostile, uris=[hostile, "b"])
    second = classification([hostile, "other"], model="B", uris=[hostile, "b"], wrong=False)
    print_lines([*result_lines(first), *comparison_lines(compare(first, second))])
    printed = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\r", "\u202e", "\u2066", "\ud800"} & set(printed)
    assert "\\x1b[31m" in printed
    printed.encode("utf-8")


def test_the_first_changes_show_every_class_and_both_directions() -> None:
    changes = [
        Change("accuracy@1", f"{label}{n}", float(n % 2), 1.0 - n % 2, label, "x", "y")
        for label in ("a", "b")
        for n in range(6)
    ]
    first = spread_changes(changes)
    assert sorted(first, key=lambda one: one.key) == changes
    assert [one.key for one in first[:4]] == ["a0", "a1", "b0", "b1"]
    largest = Change("map", "z", 0.0, 5.0)
    assert spread_changes([*changes, largest])[0] is largest
