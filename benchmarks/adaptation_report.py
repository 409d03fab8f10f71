"""What benchmarks/adaptation.py chooses, and what it says: the summary, its table, the picture."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from adaptation_cells import (
    BATCH,
    CHOSEN_BY,
    EPOCHS,
    FULL,
    HEAD_EPOCHS,
    METHODS,
    OBJECTS,
    PHOTOS,
    TEMPLATES,
    WISE,
    Cell,
)

from clipsys.evaluation.reports.canvas import BLUE, GREEN, GREY, ORANGE, PURPLE, RED
from clipsys.probe import machine

Document = dict[str, Any]
Lines = Mapping[str, Mapping[str, Any]]

SEEDS = (0, 1, 2)
#: Shares of the tuned model that are measured between the two ends.
ALPHAS = (0.2, 0.4, 0.6, 0.8)
#: Part of the gain on the validation part that WiSE-FT has to keep.
KEPT_GAIN = 0.9
#: Sets and figures of the table, and their heads.
COLUMNS = (
    ("test", "text_to_image/recall@10", "products, title → image @10"),
    ("test", "image_to_text/recall@10", "products, image → title @10"),
    (PHOTOS, "text_to_image/recall@10", "Flickr8k, text → image @10"),
    (PHOTOS, "image_to_text/recall@10", "Flickr8k, image → text @10"),
    (OBJECTS, "accuracy@1", "cifar10_600, zero-shot"),
)
_GAIN, *_OTHERS = (COLUMNS[0], COLUMNS[2], COLUMNS[4])
_COLOURS = {FULL: RED, "lora": BLUE, "lit": GREEN, "locked": ORANGE, WISE: PURPLE}


def best_rate(method: str, cells: Lines) -> float | None:
    """The learning rate of the best seed 0 on the validation part; None: not all have been run."""
    keys = {lr: Cell(method, lr).key for lr in METHODS[method].rates}
    if any(key not in cells for key in keys.values()):
        return None
    return max(keys, key=lambda lr: float(cells[keys[lr]]["validation"][CHOSEN_BY]))


def share_key(seed: int, alpha: float) -> str:
    """Names the model between the base and the fully tuned model of a seed."""
    return f"{WISE}-alpha{alpha:g}-seed{seed}"


def least_share(figures: Mapping[float, float]) -> float:
    """The smallest share that keeps `KEPT_GAIN` of what the tuned model gained.

    Args:
        figures: by share, those of the base (0) and of the tuned model (1) among them.
    """
    needed = figures[0] + KEPT_GAIN * (figures[1] - figures[0])
    return min(alpha for alpha, value in figures.items() if value >= needed or alpha == 1)


def wise_share(seed: int, cells: Lines, figures: Lines) -> float | None:
    """The share that is chosen with a seed; None: not all have been measured."""
    rate = best_rate(FULL, cells)
    keys = {alpha: share_key(seed, alpha) for alpha in ALPHAS}
    tuned = None if rate is None else cells.get(Cell(FULL, rate, seed).key)
    if tuned is None or "base" not in figures or any(key not in cells for key in keys.values()):
        return None
    found = {alpha: float(cells[key]["validation"][CHOSEN_BY]) for alpha, key in keys.items()}
    found[0.0] = float(figures["base"]["validation"][CHOSEN_BY])
    found[1.0] = float(tuned["validation"][CHOSEN_BY])
    return least_share(found)


def summary(cells: Lines, figures: Lines) -> Document:
    """Means and standard deviations over seeds, of what is there."""
    report: Document = {
        "protocol": {
            "batch": BATCH,
            "epochs": {"towers": EPOCHS, "heads over stored features": HEAD_EPOCHS},
            "templates": TEMPLATES,
            "chosen_by": f"{CHOSEN_BY} on the validation part, rates with seed {SEEDS[0]}",
            "share": f"the smallest of {ALPHAS} and 1 that keeps {KEPT_GAIN} of the gain",
        },
        "machine": {"processor": machine.processor(), "cores": os.cpu_count(), "threads": 1},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "methods": {"base": _row([figures["base"]])},
    }
    for method in METHODS:
        rate = best_rate(method, cells)
        if rate is None:
            continue
        keys = [Cell(method, rate, seed).key for seed in SEEDS]
        done = [key for key in keys if key in cells and key in figures]
        if done:
            report["methods"][method] = {
                "lr": rate,
                "validation": {
                    f"{lr:g}": cells[Cell(method, lr).key]["validation"]
                    for lr in METHODS[method].rates
                },
                "cpu_seconds": round(fmean(cells[key]["cpu_seconds"] for key in done), 1),
                **_row([figures[key] for key in done]),
            }
    _add_shares(report, cells, figures)
    return report


def _add_shares(report: Document, cells: Lines, figures: Lines) -> None:
    """WiSE-FT: the chosen shares, and the curve over all of them."""
    rate = best_rate(FULL, cells)
    chosen = {seed: wise_share(seed, cells, figures) for seed in SEEDS}
    known = {seed: alpha for seed, alpha in chosen.items() if alpha is not None}

    def key(seed: int, alpha: float) -> str:
        if alpha in (0.0, 1.0):
            return "base" if alpha == 0 else Cell(FULL, rate or 0.0, seed).key
        return share_key(seed, alpha)

    keys = [key(seed, alpha) for seed, alpha in known.items()]
    if keys and all(one in figures for one in keys):
        report["methods"][WISE] = {
            "alpha": {str(seed): alpha for seed, alpha in known.items()},
            **_row([figures[one] for one in keys]),
        }
    curve: list[Document] = []
    # Seeds of which the whole curve is there, so that its points are means over the same seeds.
    whole = [seed for seed in SEEDS if all(key(seed, alpha) in figures for alpha in (*ALPHAS, 1.0))]
    for alpha in (0.0, *ALPHAS, 1.0) if whole else ():
        curve.append({"alpha": alpha, **_row([figures[key(seed, alpha)] for seed in whole])})
    report["curve"] = curve


def _row(found: Sequence[Mapping[str, Any]]) -> Document:
    """Figures of one method over its seeds."""
    return {
        "seeds": len(found),
        "figures": {
            f"{name}/{figure}": spread([one[name][figure] for one in found])
            for name in ("test", PHOTOS, OBJECTS)
            for figure in found[0][name]
        },
    }


def spread(values: Sequence[float]) -> Document:
    """Mean, standard deviation (None of one value) and the values themselves."""
    deviation = round(stdev(values), 4) if len(values) > 1 else None
    return {"mean": round(fmean(values), 4), "std": deviation, "values": list(values)}


def table(report: Document) -> str:
    """The summary as Markdown."""
    heads = ["", "rate (of)", *(head for *_, head in COLUMNS), "CPU seconds"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for name, row in report["methods"].items():
        cells = [title(name, row), _rates(row)]
        cells += [_cell(row["figures"][f"{part}/{figure}"]) for part, figure, _ in COLUMNS]
        lines.append(f"| {' | '.join(cells)} | {row.get('cpu_seconds', '')} |")
    return "\n".join(lines)


def title(name: str, row: Document) -> str:
    """What a row is called."""
    if name == WISE:
        shares = sorted(set(row["alpha"].values()))
        return f"WiSE-FT, α {', '.join(f'{alpha:g}' for alpha in shares)}"
    return METHODS[name].title if name in METHODS else "before (zero-shot)"


def _rates(row: Document) -> str:
    """The chosen rate, and those that it was chosen from."""
    return f"{row['lr']:g} ({', '.join(row['validation'])})" if "lr" in row else ""


def _cell(value: Document) -> str:
    deviation = "" if value["std"] is None else f" ± {value['std']:.3f}"
    return f"{value['mean']:.3f}{deviation}"


def picture(report: Document, out: Path) -> None:
    """Draws what each method gained on products against what it lost on the two other sets."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharex=True)
    for axis, (part, name, head) in zip(axes, _OTHERS, strict=True):
        other = f"{part}/{name}"
        gain = f"{_GAIN[0]}/{_GAIN[1]}"
        base = report["methods"]["base"]["figures"]
        axis.axhline(base[other]["mean"], color=GREY, linewidth=0.8, linestyle=":")
        points = [(row["figures"][gain], row["figures"][other]) for row in report["curve"]]
        if points:
            axis.plot(
                [x["mean"] for x, _ in points],
                [y["mean"] for _, y in points],
                color=PURPLE, marker=".", linewidth=1.2, label="WiSE-FT, α from 0 to 1",
            )  # fmt: skip
        for row, (x, y) in zip(report["curve"], points, strict=True):
            if 0 < row["alpha"] < 1:
                axis.annotate(
                    f"{row['alpha']:g}", (x["mean"], y["mean"]), fontsize=8, color=PURPLE,
                    textcoords="offset points", xytext=(4, 5),
                )  # fmt: skip
        for method, row in report["methods"].items():
            x, y = row["figures"][gain], row["figures"][other]
            axis.errorbar(
                x["mean"], y["mean"], xerr=x["std"] or 0, yerr=y["std"] or 0,
                marker="o" if method != WISE else "D", markersize=7, capsize=3, linestyle="",
                color=_COLOURS.get(method, "black"), label=title(method, row),
            )  # fmt: skip
        axis.set(xlabel=_GAIN[2], ylabel=head)
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, fontsize=9, frameon=False)
    figure.suptitle(
        "Gain on products against what is kept elsewhere (mean and deviation over seeds)",
        fontsize=11,
    )
    figure.tight_layout(rect=(0, 0.11, 1, 0.98))
    figure.savefig(out, dpi=110)
    plt.close(figure)
