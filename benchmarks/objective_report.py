"""What benchmarks/objectives.py says of its cells: the summary, its tables, the picture."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from objective_cells import BATCH, METHODS, PASSES, RANDOM, RANDOM_WITH_STATISTICS, Cell
from objective_data import CORRUPTIONS, FINE_LABEL, LABEL, ImageSet
from objective_plan import NOISE, RATES, SEEDS, SPREAD_METHODS, best_rate, spread_cells, sweep_cells

from clipsys.evaluation.tasks.probes import majority_chance
from clipsys.probe import machine

Document = dict[str, Any]

_TITLES = {RANDOM: "random encoder", RANDOM_WITH_STATISTICS: "random, batch statistics"}

#: Corruptions whose figures enter the mean.
_CORRUPTED = [corruption.key for corruption in CORRUPTIONS]


def summary(done: Document, figures: Document, images: ImageSet) -> Document:
    """Means and standard deviations over seeds, of what is there."""
    report: Document = {
        "images": {name: len(labels) for name, labels in images.labels.items()},
        "classes": {
            LABEL: len(set(images.labels["fit"])),
            FINE_LABEL: len(set(images.fine_labels["fit"])),
        },
        "chance": {"group": _chance(images, fine=False), "subgroup": _chance(images, fine=True)},
        "budget": {
            "images_encoded_for_each_training_image": PASSES,
            "batch": BATCH,
            "rates": RATES,
            "seeds": SEEDS,
            "chosen_by": "accuracy of the 20 nearest neighbours on dev, seed 0",
        },
        "machine": {"processor": machine.processor(), "cores": os.cpu_count(), "threads": 1},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "methods": {},
        "label_noise": {"share": NOISE},
        "spread": {},
        "longer": {},
    }
    for method in (RANDOM, RANDOM_WITH_STATISTICS):
        cells = [Cell(method, seed=seed) for seed in SEEDS]
        report["methods"][method] = {"figures": _over_seeds(cells, figures)}
    for method in METHODS:
        rate = best_rate(method, done)
        if rate is None or Cell(method, rate).key not in figures:
            continue
        report["methods"][method] = _method(method, rate, done, figures)
        noisy = [Cell(method, rate, seed, label_noise=NOISE) for seed in SEEDS]
        if any(cell.key in figures for cell in noisy):
            report["label_noise"][method] = _over_seeds(noisy, figures)
        longer = Cell(method, rate, passes=4 * PASSES)
        if longer.key in figures:
            report["longer"][method] = _over_seeds([longer], figures) | {
                "images_encoded": done[longer.key]["images_encoded"]
            }
        if method in SPREAD_METHODS:
            report["spread"][method] = _spread(method, rate, figures)
    return report


def _method(method: str, rate: float, done: Document, figures: Document) -> Document:
    cells = [Cell(method, rate, seed) for seed in SEEDS]
    own = done[cells[0].key]
    return {
        "lr": rate,
        "dev_accuracy": {
            f"{cell.lr:g}": round(done[cell.key]["dev_accuracy"], 4)
            for cell in sweep_cells(method)
            if cell.key in done
        },
        "images_encoded": own["images_encoded"],
        "images_of_each_sample": METHODS[method].images,
        "steps": own["steps"],
        "settings": dict(METHODS[method].settings),
        "supervised": METHODS[method].supervised,
        "figures": _over_seeds(cells, figures),
    }


def _over_seeds(cells: Iterable[Cell], figures: Document) -> Document:
    """{probe: {test: {figure: {mean, std, n}}}}, with the mean over corruptions as a test."""
    found = [figures[cell.key]["figures"] for cell in cells if cell.key in figures]
    if not found:
        return {}
    merged: Document = {}
    for probe, tests in found[0].items():
        merged[probe] = {
            test: {name: _statistics([one[probe][test][name] for one in found]) for name in values}
            for test, values in tests.items()
        }
        if all(key in tests for key in _CORRUPTED):
            merged[probe]["corrupted"] = {
                name: _statistics(
                    [float(np.mean([one[probe][key][name] for key in _CORRUPTED])) for one in found]
                )
                for name in tests["test"]
            }
    return merged


def _statistics(values: Sequence[float]) -> Document:
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {
        "mean": round(float(np.mean(values)), 4),
        "std": None if spread is None else round(spread, 4),
        "n": len(values),
    }


def _spread(method: str, rate: float, figures: Document) -> Document:
    """Accuracy at each value of a setting, mean over seeds, and its range and deviation."""
    found: Document = {}
    for setting, by_value in spread_cells(method, rate).items():
        for probe in ("knn", "logistic"):
            means = {}
            for value, cells in by_value.items():
                known = [figures[one.key]["figures"] for one in cells if one.key in figures]
                if known:
                    accuracies = [one[probe]["test"]["accuracy@1"] for one in known]
                    means[f"{value:g}"] = _statistics(accuracies)
            if len(means) < 2:
                continue
            values = [one["mean"] for one in means.values()]
            found.setdefault(setting, {})[probe] = {
                "accuracy": means,
                "range": round(max(values) - min(values), 4),
                "std": round(float(np.std(values, ddof=1)), 4),
            }
    return found


def _chance(images: ImageSet, *, fine: bool) -> float:
    """Accuracy of always answering the most frequent class."""
    nothing = np.zeros((1, 1), np.float32)
    train, test = (images.vectors(part, nothing, fine=fine) for part in ("fit", "test"))
    known = set(train.labels)
    kept = [number for number, label in enumerate(test.labels) if label in known]
    labels = [test.labels[number] for number in kept]
    classes = {label: number for number, label in enumerate(sorted(known))}
    targets = [np.array([classes[one] for one in part]) for part in (train.labels, labels)]
    return round(majority_chance(*targets), 4)


def tables(report: Document) -> str:
    """The summary as Markdown."""
    parts = (_main_table(report), _noise_table(report), _spread_table(report), _long_table(report))
    return "\n\n".join(part for part in parts if part.count("\n") > 1)


def _main_table(report: Document) -> str:
    lines = [
        "| method | lr (of) | seeds | kNN | linear | MLP | macro P / R / F1 (linear) | "
        "kNN corrupted | linear corrupted | kNN subgroup |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = report["methods"]

    def knn(name: str) -> float:
        return _value(rows[name]["figures"], "knn", "test")

    for name in sorted(rows, key=knn, reverse=True):
        figures = rows[name]["figures"]
        ratios = " / ".join(
            f"{_value(figures, 'logistic', 'test', f'macro_{one}') * 100:.1f}"
            for one in ("precision", "recall", "f1")
        )
        lines.append(
            f"| {name}{' (labels)' if rows[name].get('supervised') else ''} "
            f"| {_rates(rows[name])} | {figures['knn']['test']['accuracy@1']['n']} "
            f"| {_cell(figures, 'knn', 'test')} "
            f"| {_cell(figures, 'logistic', 'test')} | {_cell(figures, 'mlp', 'test')} "
            f"| {ratios} | {_cell(figures, 'knn', 'corrupted')} "
            f"| {_cell(figures, 'logistic', 'corrupted')} "
            f"| {_cell(figures, 'knn_subgroup', 'test')} |"
        )
    return "\n".join(lines)


def _rates(row: Document) -> str:
    """The chosen rate, and those that it was chosen from."""
    return f"{row['lr']:g} ({', '.join(row['dev_accuracy'])})" if "lr" in row else ""


def _noise_table(report: Document) -> str:
    lines = ["| method | kNN | with noise | linear | with noise |", "|---|---|---|---|---|"]
    for name, noisy in report["label_noise"].items():
        if name != "share":
            clean = report["methods"][name]["figures"]
            pairs = [
                f"{_cell(clean, probe, 'test')} | {_cell(noisy, probe, 'test')}"
                for probe in ("knn", "logistic")
            ]
            lines.append(f"| {name} | {' | '.join(pairs)} |")
    return "\n".join(lines)


def _spread_table(report: Document) -> str:
    lines = ["| setting | probe | method | accuracy | range | std |", "|---|---|---|---|---|---|"]
    for setting in ("lr", "batch", "temperature"):
        for probe in ("knn", "logistic"):
            for method, found in report["spread"].items():
                if probe in found.get(setting, {}):
                    own = found[setting][probe]
                    values = ", ".join(
                        f"{value}: {100 * one['mean']:.1f}"
                        for value, one in own["accuracy"].items()
                    )
                    lines.append(
                        f"| {setting} | {probe} | {method} | {values} | {100 * own['range']:.1f} "
                        f"| {100 * own['std']:.1f} |"
                    )
    return "\n".join(lines)


def _long_table(report: Document) -> str:
    lines = ["| method | kNN | four times as long | linear | … |", "|---|---|---|---|---|"]
    for name, longer in report["longer"].items():
        short = report["methods"][name]["figures"]
        pairs = [
            f"{_cell(short, probe, 'test')} | {_cell(longer, probe, 'test')}"
            for probe in ("knn", "logistic")
        ]
        lines.append(f"| {name} | {' | '.join(pairs)} |")
    return "\n".join(lines)


def _value(figures: Document, probe: str, test: str, name: str = "accuracy@1") -> float:
    return float(figures.get(probe, {}).get(test, {}).get(name, {"mean": float("nan")})["mean"])


def _cell(figures: Document, probe: str, test: str) -> str:
    own = figures.get(probe, {}).get(test, {}).get("accuracy@1")
    if own is None:
        return "–"
    spread = "" if own["std"] is None else f" ± {100 * own['std']:.1f}"
    return f"{100 * own['mean']:.1f}{spread}"


def picture(report: Document, images: ImageSet, work: Path, out: Path) -> None:
    """Draws the test images under each method, seed 0, coloured by group."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = sorted(
        report["methods"],
        key=lambda name: _value(report["methods"][name]["figures"], "knn", "test"),
    )
    names.remove(RANDOM)
    names.insert(0, RANDOM)
    classes = sorted(set(images.labels["test"]))
    colours = plt.get_cmap("tab10")(np.arange(len(classes)))
    target_N = np.array([classes.index(label) for label in images.labels["test"]])
    columns = 5
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.6 * columns, 2.75 * rows + 0.7))
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names, strict=False):
        own = report["methods"][name]
        place_N2 = _projected(np.load(work / f"{Cell(name, own.get('lr', 0.0)).key}.npz")["test"])
        axis.scatter(*place_N2.T, c=colours[target_N], s=5, linewidths=0)
        title = _TITLES.get(name, name.replace("_", " ")) + (
            " (labels)" if own.get("supervised") else ""
        )
        axis.set_title(
            f"{title}\nkNN {100 * _value(own['figures'], 'knn', 'test'):.1f} %", fontsize=9
        )
    handles = [
        plt.Line2D([], [], marker="o", linestyle="", color=colour, markersize=6)
        for colour in colours
    ]
    figure.legend(
        handles, classes, loc="lower center", ncols=len(classes), fontsize=8.5, frameon=False
    )
    figure.tight_layout(rect=(0, 0.45 / figure.get_figheight(), 1, 1))
    figure.savefig(out, dpi=110)


def _projected(feature_ND: np.ndarray) -> np.ndarray:
    """(N, 2): t-SNE with cosine distances, begun with the two principal components."""
    from sklearn.manifold import TSNE

    return np.asarray(
        TSNE(perplexity=30, init="pca", metric="cosine", random_state=0).fit_transform(feature_ND)
    )
