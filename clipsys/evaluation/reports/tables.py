"""Results as text: a table on a terminal, tab-separated lines in a pipe."""

from __future__ import annotations

import math
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence

from clipsys.evaluation.comparison import Change, Comparison, Difference
from clipsys.evaluation.results import CurveDetails, Figure, Result
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
    """A result as the lines of a table, with its protocol and its counts above.

    A pipe gets all figures, one a line; on a terminal, many lines of figures along an axis become
    a table of their own.
    """
    counts = ", ".join(f"{name} {value:,.6g}" for name, value in result.counts.items())
    above = [title_of(result), *_wrapped(result.protocol), *_wrapped(counts)]
    if not sys.stdout.isatty():
        return [*above, *_table(figures_table(result, whole=True))]
    lines = [*above, *_table(figures_table(result))]
    return [*lines, "", *_table(grid_table(result))] if has_grid(result) else lines


def has_grid(result: Result) -> bool:
    """Whether a result has several lines of figures along an axis."""
    return isinstance(result.details, CurveDetails) and len(result.details.lines) > 1


def figures_table(result: Result, *, whole: bool = False) -> list[list[str]]:
    """All figures, the header first.

    Args:
        result: what was measured.
        whole: also the figures that `grid_table` shows.
    """
    hidden: set[str] = set()
    if has_grid(result) and not whole:
        hidden = set(_grid_names(result).values())
    rows = [["figure", "value", "95 % interval", "samples", "chance"]]
    for name, figure in result.figures.items():
        if name not in hidden:
            rows.append([name, *figure_cells(figure)])
    return rows


def grid_table(result: Result) -> list[list[str]]:
    """Lines of figures along an axis: a row for each line, a column for each position."""
    details = result.details
    assert isinstance(details, CurveDetails)
    positions = sorted({position for line in details.lines.values() for position, _ in line})
    rows = [[f"{details.figure} by {details.axis}", *(f"{one:g}" for one in positions)]]
    for name, points in details.lines.items():
        found = {position: figure.value for position, figure in points}
        rows.append([name, *(shown(found.get(position)) for position in positions)])
    return rows


def _grid_names(result: Result) -> dict[tuple[str, float], str]:
    """The names that the figures of a grid have in the result."""
    details = result.details
    assert isinstance(details, CurveDetails)
    return {
        (line, position): name
        for line, points in details.lines.items()
        for position, _ in points
        if (name := f"{line}/{position:g}/{details.figure}") in result.figures
    }


def figure_cells(figure: Figure) -> list[str]:
    """Value, interval, samples and chance."""
    return [
        shown(figure.value),
        interval_text(figure.interval),
        f"{figure.samples:,}",
        shown(figure.chance),
    ]


def difference_cells(one: Difference) -> list[str]:
    """Both values, their difference with its interval, and the p-value."""
    interval = "-" if one.interval is None else "{:+.4f} to {:+.4f}".format(*one.interval)
    values = shown(one.first), shown(one.second)
    return [*values, f"{one.value:+.4f}", interval, f"{one.test.p_value:.2g}"]


def only_cells(one: Difference) -> list[str]:
    """How many samples one model alone got right; nothing where outcomes are no hits."""
    if one.value != 0 and not one.only_first and not one.only_second:
        return ["-", "-"]
    return [f"{one.only_first:,}", f"{one.only_second:,}"]


def spread_changes(changes: Sequence[Change]) -> list[Change]:
    """Changes in an order whose beginning shows all kinds of them.

    The largest ones first; of equal ones, one of each figure, class and direction, then the second
    of each, and so on.
    """
    seen: Counter[tuple[float, str, str, bool]] = Counter()
    ranks = []
    for one in changes:
        size = abs(one.second - one.first)
        kind = (size, one.figure, one.expected, one.second > one.first)
        ranks.append((-size, seen[kind]))
        seen[kind] += 1
    order = sorted(range(len(changes)), key=ranks.__getitem__)
    return [changes[place] for place in order]


def comparison_lines(comparison: Comparison, *, changes: int = 10) -> list[str]:
    """A comparison as the lines of a table, with samples that changed."""
    rows = [["figure", "first", "second", "difference", "95 % interval", "p", "only"]]
    for name, one in comparison.differences.items():
        rows.append([name, *difference_cells(one), "/".join(only_cells(one)).replace("-/-", "-")])
    tests = sorted({one.test.name for one in comparison.differences.values()})
    both = f"{comparison.first} (first) and {comparison.second} (second) on {comparison.data}"
    lines = [
        printable(f"{comparison.task} of {both}"),
        *_wrapped(comparison.protocol),
        *_wrapped(f"p: {' or '.join(tests)}; only: samples that one alone got right, first/second"),
        *_table(rows),
    ]
    if comparison.changes and changes:
        total = len(comparison.changes)
        lines.append(f"  {total:,} samples changed{'' if total <= changes else ', among them'}:")
        lines += [_change_line(one) for one in spread_changes(comparison.changes)[:changes]]
    return lines


def _change_line(change: Change) -> str:
    said = f"{change.first:.3g} -> {change.second:.3g}"
    if change.expected:
        labels = f"{change.first_label!r} -> {change.second_label!r}"
        said = f"{labels}, right is {change.expected!r}"
    return printable(f"  {change.key}: {said}")


def print_lines(lines: Iterable[str]) -> None:
    """Writes lines to stdout."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))


def _wrapped(text: str) -> list[str]:
    """Text under a title: broken at the width of a terminal, one line in a pipe."""
    line = printable(text)
    if not line or not sys.stdout.isatty():
        return [f"  {line}"] if line else []
    width = max(40, shutil.get_terminal_size().columns)
    return textwrap.wrap(line, width, initial_indent=_GAP, subsequent_indent=_GAP)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[printable(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        return ["\t".join(row) for row in cells]
    columns = shutil.get_terminal_size().columns
    for lines in (_aligned(cells), _aligned(_grouped(cells))):
        if max(map(len, lines)) <= columns:
            return lines
    return _aligned(_grouped(cells), gap=" ")


def _grouped(cells: Sequence[Sequence[str]]) -> list[list[str]]:
    """Rows whose names begin alike (``text_to_image/``) under one line with that beginning."""
    grouped, before = [list(cells[0])], ""
    for name, *others in cells[1:]:
        group, _, last = name.rpartition("/")
        if group and group != before:
            grouped.append([group, *("" for _ in others)])
        grouped.append([f"{_GAP}{last}" if group else name, *others])
        before = group
    return grouped


def _aligned(cells: Sequence[Sequence[str]], gap: str = _GAP) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append(f"{_GAP}{gap.join([row[0].ljust(widths[0]), *padded[1:]])}".rstrip())
    return lines
