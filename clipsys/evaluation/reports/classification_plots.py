"""Plots of a classification: its classes, its confusions, its calibration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from clipsys.evaluation.reports.canvas import (
    BLUE,
    GREY,
    RED,
    WIDTH,
    Plot,
    drawn,
    short_name,
)
from clipsys.evaluation.results import ClassificationDetails, Doubles, Integers, Reliability

#: Classes that a confusion matrix shows with its numbers, that it names, and that bars show.
_ANNOTATED, _NAMED, _BARS = 20, 60, 40


def classification_plots(details: ClassificationDetails, about: str) -> list[Plot]:
    """The plots of a classification.

    Args:
        details: what it found.
        about: task and model, for the titles.
    """
    plots = [
        drawn("classes", f"Accuracy of each class, {about}", _class_bars, details),
        drawn("confusion", f"Confusion matrix, {about}", _confusion, details),
    ]
    if details.reliability is not None:
        title = f"Reliability, {about}"
        plots.append(drawn("reliability", title, _reliability, details.reliability))
    return plots


def _class_bars(figure: Any, details: ClassificationDetails) -> None:
    present = np.flatnonzero(details.support_C > 0)
    low, high = _wilson(details.recall_C[present], details.support_C[present])
    # Of equal shares, those of many images stand further out: 0 of 50 is worse than 0 of 3.
    order = present[np.lexsort((-(low + high), -details.recall_C[present]))]
    left_out = max(0, len(order) - _BARS)
    if left_out:
        order = np.concatenate([order[: _BARS // 2], order[-_BARS // 2 :]])
    figure.set_size_inches(WIDTH, 1.2 + 0.23 * len(order))
    axes = figure.add_subplot()
    places = np.arange(len(order))
    recall, support = details.recall_C[order], details.support_C[order]
    low, high = _wilson(recall, support)
    bounds = np.clip([recall - low, high - recall], 0, None)
    axes.barh(
        places, recall, color=BLUE, height=0.72, xerr=bounds,
        error_kw={"ecolor": "#333333", "elinewidth": 1, "capsize": 2},
    )  # fmt: skip
    shown = zip(_names(details, order.tolist()), details.support_C[order].tolist(), strict=True)
    axes.set_yticks(places, [f"{name} ({count:,})" for name, count in shown])
    axes.invert_yaxis()
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.grid(axis="y", visible=False)
    mean = float(details.recall_C[present].mean())
    axes.axvline(mean, color=RED, linestyle="--", linewidth=1)
    what = "share of its images predicted right (number of images); red: mean, bars: 95 % (Wilson)"
    if left_out:
        what += f"\nthe best and the worst {_BARS // 2} of {len(present):,} classes"
        axes.axhline(_BARS // 2 - 0.5, color="#333333", linewidth=1)
    axes.set_xlabel(what)


def _names(details: ClassificationDetails, places: Sequence[int]) -> list[str]:
    """Names of classes for an axis; those that the font cannot show have their number."""
    return [short_name(details.classes[place], f"class {place + 1}") for place in places]


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
    side = min(WIDTH, 2.6 + 0.42 * size) if annotated else WIDTH
    figure.set_size_inches(side + 0.8, side)
    axes = figure.add_subplot()
    axes.grid(visible=False)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    bar.set_label("share of the true class")
    number = "" if size <= _NAMED else ", by number from 0"
    axes.set_xlabel(f"predicted class{number}")
    axes.set_ylabel(f"true class{number}")
    if size <= _NAMED:
        names = _names(details, range(size))
        small = 10 if annotated else max(5, 300 // size)
        axes.set_xticks(range(size), names, rotation=45 if annotated else 90, fontsize=small)
        if annotated:
            for label in axes.get_xticklabels():
                label.set(ha="right", rotation_mode="anchor")
        axes.set_yticks(range(size), names, fontsize=small)
    if annotated:
        _counts(axes, details.confusion_CC, shares)


def _counts(axes: Any, confusion_CC: Integers, shares_CC: Doubles) -> None:
    size = len(confusion_CC)
    text_size = 9 if size <= 12 else 7
    for row in range(size):
        for column in range(size):
            count = int(confusion_CC[row, column])
            if count:
                colour = "white" if shares_CC[row, column] > 0.55 else "#222222"
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
