"""Results as text: a table on a terminal, tab-separated lines in a pipe."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence

from clipsys.evaluation.comparison import Comparison
from clipsys.evaluation.results import Figure, Result
from clipsys.printing import printable

_GAP = "  "


def shown(value: float | None) -> str:
    """A value as people read it: four digits after the point for rates, fewer for ranks."""
    if value is None or math.isnan(value):
        return "-"
    if value == float("inf"):
        return "never"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"


def interval_text(interval: tuple[float, float] | None) -> str:
    """Both bounds of an interval."""
    return "-" if interval is None else f"{shown(interval[0])} to {shown(interval[1])}"


def title_of(result: Result) -> str:
    """What was measured of which model on which data."""
    return printable(f"{result.title} of {result.model} on {result.data}")


def result_lines(result: Result) -> list[str]:
    """A result as the lines of a table, with its protocol and its counts above."""
    counts = ", ".join(f"{name} {value:,.6g}" for name, value in result.counts.items())
    rows = [["figure", "value", "95 % interval", "samples", "chance"]]
    rows += [[name, *figure_cells(figure)] for name, figure in result.figures.items()]
    above = [title_of(result), printable(f"  {result.protocol}")]
    return [*above, *([printable(f"  {counts}")] if counts else []), *_table(rows)]


def figure_cells(figure: Figure) -> list[str]:
    """Value, interval, samples and chance."""
    return [
        shown(figure.value),
        interval_text(figure.interval),
        f"{figure.samples:,}",
        shown(figure.chance),
    ]


def comparison_lines(comparison: Comparison, *, changes: int = 10) -> list[str]:
    """A comparison as the lines of a table, with the samples that changed most."""
    rows = [["figure", "first", "second", "difference", "95 % interval", "p", "only 1st/2nd"]]
    for name, one in comparison.differences.items():
        rows.append(
            [
                name,
                shown(one.first),
                shown(one.second),
                f"{one.value:+.4f}",
                "-" if one.interval is None else "{:+.4f} to {:+.4f}".format(*one.interval),
                f"{one.test.p_value:.3g}",
                f"{one.only_first}/{one.only_second}",
            ]
        )
    tests = sorted({one.test.name for one in comparison.differences.values()})
    lines = [
        printable(f"{comparison.task} of {comparison.first} (first) and {comparison.second}"),
        printable(f"  {comparison.protocol}"),
        f"  p: {' or '.join(tests)}",
        *_table(rows),
    ]
    if comparison.changes and changes:
        total = len(comparison.changes)
        lines.append(f"  {total:,} samples changed{'' if total <= changes else ', among them'}:")
        for change in comparison.changes[:changes]:
            said = f"{change.first:.3g} -> {change.second:.3g}"
            if change.expected:
                labels = f"{change.first_label!r} -> {change.second_label!r}"
                said = f"{labels}, right is {change.expected!r}"
            lines.append(printable(f"  {change.key}: {said}"))
    return lines


def print_lines(lines: Iterable[str]) -> None:
    """Writes lines to stdout."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[printable(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        return ["\t".join(row) for row in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        _GAP
        + _GAP.join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
