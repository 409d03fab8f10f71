"""What benchmarks/learning.py says of its cells: means, ratios, tables and the picture."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from learning_cells import CLIPSYS, PEER
from learning_sets import SETS

from clipsys.probe import machine

Document = dict[str, Any]
_DIRECTIONS = ("text_to_image", "image_to_text")


def summary(done: Document, sets: Iterable[str], minutes: dict[str, float]) -> Document:
    """Figures of the last checkpoints over seeds, and the ratio of the two programs."""
    return {
        "machine": {"processor": machine.processor(), "cores": os.cpu_count(), "threads": 1},
        "versions": {
            "python": platform.python_version(), "torch": version("torch"),
            "open_clip_train": "3.3.0",
        },
        "sets": {name: _set(name, done, minutes[name]) for name in sets},
    }  # fmt: skip


def _set(name: str, done: Document, minutes: float) -> Document:
    lines = [line for line in done.values() if line["cell"]["set"] == name]

    def of(program: str, *, full: bool = True) -> list[Document]:
        return [
            line
            for line in lines
            if line["cell"]["program"] == program
            and not line["cell"]["variant"]
            and (abs(line["cell"]["minutes"] - minutes) < 0.01) is full
        ]

    own, short, peer = of(CLIPSYS), of(CLIPSYS, full=False), of(PEER)
    report: Document = {"cpu_minutes": minutes, "programs": {}}
    for title, group in ((PEER, peer), (CLIPSYS, own), ("clipsys, a third of the time", short)):
        if group:
            report["programs"][title] = _over_seeds(group)
    if own and peer:
        report["ratio"] = _ratios(own, peer)
    if short and peer:
        report["ratio_in_a_third"] = _ratios(short, peer)
    report["variants"] = [
        {
            "program": line["cell"]["program"], "settings": line["cell"]["variant"],
            "seed": line["cell"]["seed"], "cpu_minutes": line["cpu_minutes"], **line["curve"][-1],
        }
        for line in lines
        if line["cell"]["variant"]
    ]  # fmt: skip
    report["curves"] = {
        title: {str(line["cell"]["seed"]): line["curve"] for line in group}
        for title, group in ((PEER, peer), (CLIPSYS, own))
    }
    return report


def recall(point: Document) -> float:
    """Mean of both directions at 10."""
    return statistics.fmean(point[f"{direction}@10"] for direction in _DIRECTIONS)


def _over_seeds(lines: list[Document]) -> Document:
    """Mean and standard deviation of each figure of the last checkpoint."""
    last = [line["curve"][-1] for line in lines]
    figures = {
        key: {
            "mean": round(statistics.fmean(point[key] for point in last), 4),
            "deviation": round(statistics.stdev(point[key] for point in last), 4)
            if len(last) > 1
            else None,
        }
        for key in last[0]
    }
    return {"seeds": len(lines), "epochs": lines[0]["epochs"], "figures": figures}


def _ratios(own: list[Document], peer: list[Document]) -> Document:
    def mean(lines: list[Document], key: str | None = None) -> float:
        last = [line["curve"][-1] for line in lines]
        return statistics.fmean(recall(point) if key is None else point[key] for point in last)

    keys = {f"{direction}@10": f"{direction}@10" for direction in _DIRECTIONS}
    return {
        "recall@10": round(mean(own) / mean(peer), 3),
        **{key: round(mean(own, key) / mean(peer, key), 3) for key in keys},
    }


def tables(report: Document) -> str:
    """A Markdown table of every set."""
    lines = []
    for name, own in report["sets"].items():
        lines += [
            f"{SETS[name].title}, {own['cpu_minutes']:g} minutes of one core", "",
            "| program | seeds | epochs | text → image @1 | @5 | @10 | image → text @10 |",
            "|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for title, program in own["programs"].items():
            cells = [
                _cell(program["figures"][f"text_to_image@{k}"]) for k in (1, 5, 10)
            ] + [_cell(program["figures"]["image_to_text@10"])]  # fmt: skip
            seeds, epochs = program["seeds"], program["epochs"]
            lines.append(f"| {title} | {seeds} | {epochs} | {' | '.join(cells)} |")
        for key in ("ratio", "ratio_in_a_third"):
            if key in own:
                texts = [f"{what} {value:.2f}" for what, value in own[key].items()]
                lines += ["", f"{key.replace('_', ' ')}: {', '.join(texts)}"]
        lines.append("")
    return "\n".join(lines)


def _cell(figure: Document) -> str:
    text = f"{figure['mean']:.3f}"
    return text if figure["deviation"] is None else f"{text} ± {figure['deviation']:.3f}"


def picture(report: Document, out: Path) -> None:
    """Draws recall against processor time: each seed thin, the mean thick."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    drawn = {name: own for name, own in report["sets"].items() if any(own["curves"].values())}
    figure, axes = plt.subplots(1, len(drawn), figsize=(4.6 * len(drawn), 3.6), squeeze=False)
    for axis, (name, own) in zip(axes[0], drawn.items(), strict=True):
        for colour, (title, seeds) in zip(
            ("tab:grey", "tab:blue"), own["curves"].items(), strict=True
        ):
            curves = [
                ([point["cpu_minutes"] for point in curve], [recall(point) for point in curve])
                for curve in seeds.values()
            ]
            for minutes, values in curves:
                axis.plot(minutes, values, color=colour, linewidth=0.7, alpha=0.5)
            if curves and len({len(minutes) for minutes, _ in curves}) == 1:
                means = [
                    [statistics.fmean(column) for column in zip(*part, strict=True)]
                    for part in zip(*curves, strict=True)
                ]
                axis.plot(*means, color=colour, linewidth=2.2, label=title, marker="o", ms=3)
        axis.set_title(SETS[name].title)
        axis.set_xlabel("minutes of one core")
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False, fontsize=8)
    axes[0][0].set_ylabel("recall@10, mean of both directions")
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)
