"""Plots of results, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clipsys.evaluation.comparison import Comparison
from clipsys.evaluation.reports.canvas import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    WIDTH,
    Plot,
    drawn,
    short_name,
)
from clipsys.evaluation.reports.classification_plots import classification_plots
from clipsys.evaluation.results import (
    ClassificationDetails,
    CurveDetails,
    Figure,
    Result,
    RetrievalDetails,
)

_LINES = (BLUE, ORANGE, GREEN, RED, PURPLE)
#: Panels beside each other, where each line has one of its own.
_PANELS = 3


def plots_of(result: Result) -> list[Plot]:
    """The plots that a result has."""
    details, about = result.details, f"{result.title} of {result.model}"
    if isinstance(details, ClassificationDetails):
        return classification_plots(details, about)
    if isinstance(details, RetrievalDetails):
        return [drawn("recall", f"Recall by rank, {about}", _recall, details)]
    if isinstance(details, CurveDetails):
        title = f"{details.figure} by {details.axis}, {about}"
        return [drawn(details.axis.replace(" ", "-"), title, _curves, details)]
    return []


def comparison_plot(comparison: Comparison) -> Plot:
    """The differences of a comparison with their intervals."""
    title = f"Difference, {comparison.second} less {comparison.first}, {comparison.task}"
    return drawn("difference", title, _differences, comparison)


def overview_plots(results: Sequence[Result]) -> list[Plot]:
    """The first figure of several models, with intervals: one plot for each task of several."""
    of_task: dict[str, list[Result]] = {}
    for one in results:
        if one.figures:
            of_task.setdefault(one.title, []).append(one)
    plots = []
    for task, measured in of_task.items():
        name = next(iter(measured[0].figures))
        shown = [(one.model, one.figures[name]) for one in measured if name in one.figures]
        if len(shown) > 1:
            plots.append(drawn("models", f"{name} of all models, {task}", _models, (name, shown)))
    return plots


def _recall(figure: Any, details: RetrievalDetails) -> None:
    axes = figure.add_subplot()
    chances = list(details.chance_curves.values())
    as_one = all(one == chances[0] for one in chances)
    for colour, (direction, curve) in zip(_LINES, details.curves.items(), strict=False):
        name = direction.replace("_", " ")
        axes.plot(*_of(curve), color=colour, marker="o", markersize=3, label=name)
        if not as_one:
            label, chance = f"{name}, chance", details.chance_curves[direction]
            axes.plot(*_of(chance), color=colour, linestyle=":", linewidth=1.2, label=label)
    if as_one:
        axes.plot(*_of(chances[0]), color="#333333", linestyle=":", linewidth=1.2, label="chance")
    axes.set_xscale("log")
    last = max(map(max, details.curves.values()))
    ticks = [k for k in (1, 2, 5, 10, 20, 50, 100) if k <= last]
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("k: candidates looked at")
    axes.set_ylabel("recall@k")
    axes.legend(loc="upper left", frameon=False, fontsize=9)


def _of(curve: Mapping[int, float]) -> tuple[list[int], list[float]]:
    return list(curve), list(curve.values())


def _curves(figure: Any, details: CurveDetails) -> None:
    """All lines in one plot; where they are many, each in a panel before the others."""
    if len(details.lines) > len(_LINES):
        _panels(figure, details)
        return
    axes = figure.add_subplot()
    for name, colour in zip(details.lines, _LINES, strict=False):
        _line(axes, details.lines[name], colour, band=len(details.lines) <= 3, label=name)
    _chance(axes, details)
    _axis(axes, details)
    axes.set_xlabel(details.axis)
    axes.set_ylabel(details.figure)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)


def _panels(figure: Any, details: CurveDetails) -> None:
    rows = -(-len(details.lines) // _PANELS)
    figure.set_size_inches(WIDTH, 0.6 + 1.9 * rows)
    panels = figure.subplots(rows, _PANELS, sharex=True, sharey=True, squeeze=False).flat
    for panel, name in zip(panels, details.lines, strict=False):
        for other in details.lines.values():
            panel.plot(*_points(other), color="#cccccc", linewidth=0.9)
        _line(panel, details.lines[name], BLUE, band=True, label=name)
        _chance(panel, details)
        _axis(panel, details)
        panel.set_title(short_name(name), fontsize=10, loc="left")
    for panel in list(figure.axes)[len(details.lines) :]:
        panel.set_visible(False)
    for panel in list(figure.axes)[max(0, len(details.lines) - _PANELS) :]:
        panel.tick_params(labelbottom=True)  # also above a place that stays empty
    figure.supxlabel(f"{details.axis}; grey: the other lines, dotted: chance", fontsize=10)
    figure.supylabel(details.figure, fontsize=10)
    figure.tight_layout()


def _line(
    axes: Any, points: Sequence[tuple[float, Figure]], colour: str, *, band: bool, label: str
) -> None:
    positions, values = _points(points)
    axes.plot(positions, values, color=colour, marker="o", markersize=4, label=short_name(label))
    bounds = [one.interval for _, one in points if one.interval is not None]
    if band and len(bounds) == len(points):
        low, high = zip(*bounds, strict=True)
        axes.fill_between(positions, low, high, color=colour, alpha=0.15, linewidth=0)


def _points(points: Sequence[tuple[float, Figure]]) -> tuple[list[float], list[float]]:
    return [position for position, _ in points], [one.value for _, one in points]


def _chance(axes: Any, details: CurveDetails) -> None:
    points = [one for line in details.lines.values() for _, one in line]
    chance = next((one.chance for one in points if one.chance is not None), None)
    if chance is not None:
        axes.axhline(chance, color="#333333", linestyle=":", linewidth=1, label="chance")


def _axis(axes: Any, details: CurveDetails) -> None:
    ticks = sorted({position for points in details.lines.values() for position, _ in points})
    if details.axis == "shots":
        axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)


def _differences(figure: Any, comparison: Comparison) -> None:
    shown = list(comparison.differences.items())
    figure.set_size_inches(WIDTH, 1.3 + 0.4 * len(shown))
    axes = figure.add_subplot()
    for place, (_, one) in enumerate(shown):
        low, high = one.interval or (one.value, one.value)
        clear = low > 0 or high < 0
        colour = (BLUE if one.value > 0 else RED) if clear else GREY
        axes.plot([low, high], [place, place], color=colour, linewidth=2)
        axes.plot(one.value, place, "o", color=colour, markersize=6)
    axes.axvline(0, color="#333333", linewidth=1)
    axes.set_yticks(range(len(shown)), [short_name(name) for name, _ in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    names = short_name(comparison.second), short_name(comparison.first)
    axes.set_xlabel("{} less {}, 95 % interval; grey: holds 0".format(*names))


def _models(figure: Any, what: tuple[str, Sequence[tuple[str, Figure]]]) -> None:
    name, shown = what
    figure.set_size_inches(WIDTH, 1.3 + 0.4 * len(shown))
    axes = figure.add_subplot()
    for place, (_, one) in enumerate(shown):
        axes.barh(place, one.value, color=BLUE, height=0.6)
        if one.interval is not None:
            axes.plot(one.interval, [place, place], color="#333333", linewidth=1.5)
    axes.set_yticks(range(len(shown)), [short_name(model) for model, _ in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(name)
