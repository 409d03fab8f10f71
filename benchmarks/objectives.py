"""Every method that trains from images, on one set, with equal images encoded: what is learnt.

    python benchmarks/objectives.py train --data DATA --methods simclr moco   learning rates, seeds
    python benchmarks/objectives.py train --data DATA --methods supcon --parts noise spread
    python benchmarks/objectives.py measure --data DATA       probes of the features stored so far
    python benchmarks/objectives.py summarise [--picture docs/images/objectives.png]

DATA is a folder with train-*.tar and val-*.tar of emoji (metadata group, subgroup, hexcode).
Finished cells are lines of WORK/cells.jsonl (WORK: runs/objectives), and what is there is not run
again, so a run can be stopped at any time, and several may run side by side. `summarise` writes
benchmarks/results/objectives.json. The parts stand in objective_data.py (the images),
objective_cells.py (training) and objective_figures.py (probes, tables, the picture).

Every method has the same encoder, augmentation, optimizer, number of images encoded, and the same
learning rates to choose from: the one whose features classify ``dev`` best by nearest neighbours,
with seed 0. All figures are of the test images.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from objective_cells import (
    METHODS,
    PASSES,
    RANDOM,
    RANDOM_WITH_STATISTICS,
    Cell,
    run_cell,
)
from objective_data import ImageSet, load_images
from objective_figures import dev_accuracy, measure_cell, picture, summary

#: Learning rates that every method chooses from.
RATES = (1e-3, 3e-3, 1e-2)
SEEDS = (0, 1, 2)
NOISE = 0.2
#: What the spread of SupCon and of cross-entropy is measured over, each around the chosen setting.
SPREAD_METHODS = ("supcon", "classification")
SPREAD_RATES = (3e-4, *RATES, 3e-2)
SPREAD_BATCHES = (64, 128, 256)
SPREAD_TEMPERATURES = (0.05, 0.1, 0.2, 0.5)

_logger = logging.getLogger(__name__)


def main() -> None:
    arguments = _arguments()
    logging.basicConfig(level=logging.WARNING)
    _logger.setLevel(logging.INFO)
    work = Path(arguments.work)
    work.mkdir(parents=True, exist_ok=True)
    done = Lines(work / "cells.jsonl")
    figures = Lines(work / "figures.jsonl")
    if arguments.command == "summarise":
        images = load_images(Path(arguments.data), work)
        report = summary(done.all(), figures.all(), images)
        out = Path(__file__).parent / "results" / "objectives.json"
        out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if arguments.picture:
            picture(done.all(), figures.all(), images, work, Path(arguments.picture))
        return
    images = load_images(Path(arguments.data), work)
    if arguments.command == "measure":
        for key, line in done.all().items():
            if key not in figures.all() and wanted(line, done.all(), arguments.final_only):
                features = dict(np.load(work / f"{key}.npz"))
                figures.add({"key": key, "figures": measure_cell(images, features)})
        return
    for method in arguments.methods:
        train(method, arguments.parts, images, work, done)


class Lines:
    """A file of JSON lines, each with a ``key``, that several processes add to."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def all(self) -> dict[str, dict[str, Any]]:
        """Lines by key."""
        if not self._path.exists():
            return {}
        lines = self._path.read_text(encoding="utf-8").splitlines()
        return {line["key"]: line for line in map(json.loads, lines)}

    def add(self, line: dict[str, Any]) -> None:
        """Adds one, whole."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def train(method: str, parts: list[str], images: ImageSet, work: Path, done: Lines) -> None:
    """Runs the cells of a method that are not done yet."""

    def run(cell: Cell) -> dict[str, Any]:
        known = done.all().get(cell.key)
        if known is not None:
            return known
        line = run_cell(cell, images, work)
        line["dev_accuracy"] = dev_accuracy(images, dict(np.load(work / f"{cell.key}.npz")))
        done.add(line)
        _logger.info("%s: %s", cell.key, json.dumps(line))
        return line

    if method in (RANDOM, RANDOM_WITH_STATISTICS):
        for seed in SEEDS:
            run(Cell(method, seed=seed))
        return
    rate = chosen_rate(method, run)
    for cell in _cells(method, rate, parts):
        run(cell)


def chosen_rate(method: str, run: Callable[[Cell], dict[str, Any]]) -> float:
    """The rate of the sweep that classifies ``dev`` best; of equal ones the smallest."""
    found = {rate: run(Cell(method, rate))["dev_accuracy"] for rate in RATES}
    return max(found, key=found.__getitem__)


def _cells(method: str, rate: float, parts: list[str]) -> Iterator[Cell]:
    """What is run at the chosen rate, and around it."""
    if "seeds" in parts:
        yield from (Cell(method, rate, seed) for seed in SEEDS)
    if "noise" in parts and METHODS[method].supervised:
        yield from (Cell(method, rate, seed, label_noise=NOISE) for seed in SEEDS)
    if "spread" in parts and method in SPREAD_METHODS:
        for _, cells in spread_cells(method, rate).items():
            yield from cells
    if "long" in parts:
        yield Cell(method, rate, passes=4 * PASSES)


def spread_cells(method: str, rate: float) -> dict[str, list[Cell]]:
    """The cells that differ in one setting from those of the chosen rate, by that setting."""
    spread = {
        "lr": [Cell(method, one, seed) for one in SPREAD_RATES for seed in SEEDS[:2]],
        "batch": [
            Cell(method, rate, seed, batch=one) for one in SPREAD_BATCHES for seed in SEEDS[:2]
        ],
    }
    if method == "supcon":
        default = METHODS[method].settings["temperature"]
        spread["temperature"] = [
            Cell(
                method,
                rate,
                seed,
                changes="{}" if one == default else json.dumps({"temperature": one}),
            )
            for one in SPREAD_TEMPERATURES
            for seed in SEEDS[:2]
        ]
    return spread


def wanted(line: dict[str, Any], done: dict[str, Any], final_only: bool) -> bool:
    """Whether all probes of a cell are of interest."""
    if not final_only:
        return True
    cell = Cell(**line["cell"])
    if not cell.is_trained:
        return True

    def known(one: Cell) -> dict[str, Any]:
        found: dict[str, Any] = done.get(one.key, {"dev_accuracy": -1.0})
        return found

    return cell.lr == chosen_rate(cell.method, known)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("train", "measure", "summarise"))
    parser.add_argument("--data", required=True, help="folder with train-*.tar and val-*.tar")
    parser.add_argument("--work", default="runs/objectives", help="cells and features")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[RANDOM, RANDOM_WITH_STATISTICS, *METHODS],
        choices=[RANDOM, RANDOM_WITH_STATISTICS, *METHODS],
    )
    parser.add_argument(
        "--parts", nargs="+", default=["seeds"], choices=("seeds", "noise", "spread", "long")
    )
    parser.add_argument("--final-only", action="store_true", help="measure no swept rates")
    parser.add_argument("--picture", help="where to draw the spaces")
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
