"""Plots of results, as PNG.

Colours are those of Okabe & Ito, which colour-blind readers tell apart; rates start at 0.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clipsys.evaluation.comparison import Comparison
from clipsys.evaluation.results import (
    ClassificationDetails,
    CurveDetails,
    Figure,
    Reliability,
    Result,
    RetrievalDetails,
)
from clipsys.printing import printable

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#777777",
)  # fmt: skip
_LINES = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY, "#000000")
_STYLES = ("-", "--", ":")
#: Classes that a confusion matrix shows with its numbers, and that bars show one by one.
_ANNOTATED, _BARS = 20, 40
_WIDTH = 7.2
_LONGEST_NAME = 24


@dataclass(frozen=True)
class Plot:
    """One picture of a report.

    Attributes:
        name: of its file, without an ending.
        title: what it shows, and what readers who do not see it are told.
        png: the picture.
    """

    name: str
    title: str
    png: bytes = field(repr=False)


def plots_of(result: Result) -> list[Plot]:
    """The plots that a result has."""
    details, about = result.details, f"{result.title} of {result.model}"
    if isinstance(details, ClassificationDetails):
        made = [
            _plot("classes", f"Accuracy of each class, {about}", _class_bars, details),
            _plot("confusion", f"Confusion matrix, {about}", _confusion, details),
        ]
        if details.reliability is not None:
            made.append(
                _plot("reliability", f"Reliability, {about}", _reliability, details.reliability)
            )
        return made
    if isinstance(details, RetrievalDetails):
        return [_plot("recall", f"Recall by rank, {about}", _recall, details)]
    if isinstance(details, CurveDetails):
        title = f"{details.figure} by {details.axis}, {about}"
        return [_plot(details.axis.replace(" ", "-"), title, _curves, details)]
    return []


def comparison_plot(comparison: Comparison) -> Plot:
    """The differences of a comparison with their intervals."""
    title = f"Difference, {comparison.second} less {comparison.first}, {comparison.task}"
    return _plot("difference", title, _differences, comparison)


def overview_plot(results: Sequence[Result]) -> Plot | None:
    """The first figure of several models on one task, with intervals; None for one model."""
    first = [one for one in results if one.figures]
    if len({one.model for one in first}) < 2:
        return None
    name = next(iter(first[0].figures))
    shown = [(one.model, one.figures[name]) for one in first if name in one.figures]
    return _plot("models", f"{name}, {first[0].task}", _models, (name, shown))


def _plot(name: str, title: str, draw: Callable[[Any, Any], None], what: Any) -> Plot:
    with _figure() as figure:
        draw(figure, what)
        buffer = io.BytesIO()
        figure.savefig(
            buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None}
        )
    return Plot(name, printable(title), buffer.getvalue())


@contextmanager
def _figure() -> Iterator[Any]:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    settings = {
        "font.size": 10,
        "font.family": ["DejaVu Sans"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#dddddd",
        "axes.axisbelow": True,
        "figure.facecolor": "white",
        "text.parse_math": False,
    }
    with matplotlib.rc_context(settings):
        figure = Canvas(figsize=(_WIDTH, 4.4))
        FigureCanvasAgg(figure)
        yield figure


def _name(text: str) -> str:
    """A name for an axis: no control characters, nothing that the font lacks, not too long."""
    known = "".join(one if ord(one) < 0x2E80 else "□" for one in printable(text))
    return known if len(known) <= _LONGEST_NAME else f"{known[: _LONGEST_NAME - 1]}…"


def _class_bars(figure: Any, details: ClassificationDetails) -> None:
    present = np.flatnonzero(details.support_C > 0)
    order = present[np.argsort(-details.recall_C[present], kind="stable")]
    left_out = max(0, len(order) - _BARS)
    if left_out:
        order = np.concatenate([order[: _BARS // 2], order[-_BARS // 2 :]])
    figure.set_size_inches(_WIDTH, 1.2 + 0.23 * len(order))
    axes = figure.add_subplot()
    places = np.arange(len(order))
    recall, support = details.recall_C[order], details.support_C[order]
    low, high = _wilson(recall, support)
    bounds = np.clip([recall - low, high - recall], 0, None)
    axes.barh(
        places, recall, color=BLUE, height=0.72, xerr=bounds,
        error_kw={"ecolor": "#333333", "elinewidth": 1, "capsize": 2},
    )  # fmt: skip
    names = [f"{_name(details.classes[place])} ({details.support_C[place]})" for place in order]
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.grid(axis="y", visible=False)
    mean = float(details.recall_C[present].mean())
    axes.axvline(mean, color=RED, linestyle="--", linewidth=1)
    what = "share of its images predicted right (number of images); red: mean, bars: 95 % (Wilson)"
    if left_out:
        what += f"\nthe best and the worst {_BARS // 2} of {len(present)} classes"
    axes.set_xlabel(what)


def _wilson(share: Any, count: Any) -> tuple[Any, Any]:
    """Bounds of a 95 % interval of shares (Wilson 1927), which a few images need."""
    z = 1.96
    total = np.maximum(count, 1)
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * np.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return centre - half, centre + half


def _confusion(figure: Any, details: ClassificationDetails) -> None:
    shares = details.confusion_CC / np.maximum(details.confusion_CC.sum(axis=1, keepdims=True), 1)
    size = len(details.classes)
    annotated = size <= _ANNOTATED
    side = min(_WIDTH, 2.6 + 0.42 * size) if annotated else _WIDTH
    figure.set_size_inches(side + 0.8, side)
    axes = figure.add_subplot()
    axes.grid(visible=False)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    bar.set_label("share of the true class")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if not annotated:
        return
    names = [_name(name) for name in details.classes]
    axes.set_xticks(range(size), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(size), names)
    text_size = 9 if size <= 12 else 7
    for row in range(size):
        for column in range(size):
            count = int(details.confusion_CC[row, column])
            if count:
                colour = "white" if shares[row, column] > 0.55 else "#222222"
                axes.text(
                    column, row, f"{count:,}", ha="center", va="center", color=colour,
                    fontsize=text_size,
                )  # fmt: skip


def _reliability(figure: Any, found: Reliability) -> None:
    figure.set_size_inches(5.2, 5.6)
    above, below = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    bins = len(found.count_B)
    left = np.arange(bins) / bins
    filled = found.count_B > 0
    above.bar(
        left[filled], found.accuracy_B[filled], width=1 / bins, align="edge", color=BLUE,
        edgecolor="white", label="accuracy",
    )  # fmt: skip
    above.plot(
        found.confidence_B[filled], found.accuracy_B[filled], "o", color=RED, markersize=4,
        label="mean confidence of the bin",
    )  # fmt: skip
    above.plot([0, 1], [0, 1], color="#333333", linestyle="--", linewidth=1, label="calibrated")
    above.set_ylim(0, 1)
    above.set_xlim(0, 1)
    above.set_ylabel("accuracy")
    above.legend(loc="upper left", frameon=False, fontsize=9)
    above.set_title(f"expected calibration error {found.error:.3f}", fontsize=10, loc="right")
    below.bar(left, found.count_B, width=1 / bins, align="edge", color=GREY, edgecolor="white")
    below.set_ylabel("images")
    below.set_xlabel("probability of the predicted class")
    figure.tight_layout()


def _recall(figure: Any, details: RetrievalDetails) -> None:
    axes = figure.add_subplot()
    for number, (direction, curve) in enumerate(details.curves.items()):
        colour = _LINES[number]
        axes.plot(
            list(curve), list(curve.values()), color=colour, marker="o", markersize=3,
            label=direction.replace("_", " "),
        )  # fmt: skip
        chance = details.chance_curves[direction]
        axes.plot(
            list(chance), list(chance.values()), color=colour, linestyle=":", linewidth=1.2,
            label=f"{direction.replace('_', ' ')}, chance",
        )  # fmt: skip
    axes.set_xscale("log")
    ticks = [k for k in (1, 2, 5, 10, 20, 50, 100) if k <= max(map(max, details.curves.values()))]
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("k: candidates looked at")
    axes.set_ylabel("recall@k")
    axes.legend(loc="upper left", frameon=False, fontsize=9)


def _curves(figure: Any, details: CurveDetails) -> None:
    axes = figure.add_subplot()
    chance = None
    for number, (name, points) in enumerate(details.lines.items()):
        positions = [position for position, _ in points]
        values = [one.value for _, one in points]
        colour, style = _LINES[number % len(_LINES)], _STYLES[number // len(_LINES) % len(_STYLES)]
        axes.plot(
            positions, values, color=colour, linestyle=style, marker="o", markersize=4,
            label=_name(name),
        )  # fmt: skip
        intervals = [one.interval for _, one in points]
        if all(one is not None for one in intervals) and len(details.lines) <= 3:
            low, high = zip(*(one for one in intervals if one is not None), strict=True)
            axes.fill_between(positions, low, high, color=colour, alpha=0.15, linewidth=0)
        chance = next((one.chance for _, one in points if one.chance is not None), chance)
    if chance is not None:
        axes.axhline(chance, color="#333333", linestyle=":", linewidth=1, label="chance")
    ticks = sorted({position for points in details.lines.values() for position, _ in points})
    if details.axis == "shots":
        axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(details.axis)
    axes.set_ylabel(details.figure)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)


def _differences(figure: Any, comparison: Comparison) -> None:
    shown = list(comparison.differences.items())
    figure.set_size_inches(_WIDTH, 1.3 + 0.4 * len(shown))
    axes = figure.add_subplot()
    for place, (_, one) in enumerate(shown):
        low, high = one.interval or (one.value, one.value)
        clear = low > 0 or high < 0
        colour = (BLUE if one.value > 0 else RED) if clear else GREY
        axes.plot([low, high], [place, place], color=colour, linewidth=2)
        axes.plot(one.value, place, "o", color=colour, markersize=6)
    axes.axvline(0, color="#333333", linewidth=1)
    axes.set_yticks(range(len(shown)), [_name(name) for name, _ in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlabel(
        f"{_name(comparison.second)} less {_name(comparison.first)}, 95 % interval; grey: holds 0"
    )


def _models(figure: Any, what: tuple[str, Sequence[tuple[str, Figure]]]) -> None:
    name, shown = what
    figure.set_size_inches(_WIDTH, 1.3 + 0.4 * len(shown))
    axes = figure.add_subplot()
    for place, (_, one) in enumerate(shown):
        axes.barh(place, one.value, color=BLUE, height=0.6)
        if one.interval is not None:
            axes.plot(one.interval, [place, place], color="#333333", linewidth=1.5)
    axes.set_yticks(range(len(shown)), [_name(model) for model, _ in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(name)
