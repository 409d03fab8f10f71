"""Every method that trains from images, on one set, with equal images encoded: what is learnt.

    python benchmarks/objectives.py train --data DATA --methods simclr moco   learning rates, seeds
    python benchmarks/objectives.py train --data DATA --methods supcon --parts noise spread
    python benchmarks/objectives.py measure --data DATA       probes of the features stored so far
    python benchmarks/objectives.py summarise --data DATA [--picture docs/images/objectives.png]

DATA is a folder with train-*.tar and val-*.tar of emoji (metadata group, subgroup, hexcode).
Finished cells are lines of WORK/cells.jsonl (WORK: runs/objectives), and what is there is not run
again, so a run can be stopped at any time, and several may run side by side. `summarise` writes
benchmarks/results/objectives.json and prints its tables. The parts stand in objective_data.py (the
images), objective_cells.py (training), objective_plan.py (which cells), objective_figures.py
(probes) and objective_report.py (tables, the picture).

Every method has the same encoder, augmentation, optimizer, number of images encoded, and the same
learning rates to choose from: the one whose features classify ``dev`` best by nearest neighbours,
with seed 0. All figures are of the test images.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from pathlib import Path

import numpy as np
from objective_cells import METHODS, RANDOM, RANDOM_WITH_STATISTICS, Cell, run_cell
from objective_data import ImageSet, load_images
from objective_figures import dev_accuracy, measure_cell
from objective_plan import SEEDS, best_rate, cells_of, first_cell, sweep_cells
from objective_report import picture, summary, tables
from stored_lines import Lines

_logger = logging.getLogger(__name__)


def main() -> None:
    arguments = _arguments()
    logging.basicConfig(level=logging.WARNING)
    _logger.setLevel(logging.INFO)
    work = Path(arguments.work)
    work.mkdir(parents=True, exist_ok=True)
    images = load_images(Path(arguments.data), work)
    done, figures = Lines(work / "cells.jsonl"), Lines(work / "figures.jsonl")
    if arguments.command == "train":
        for method in arguments.methods:
            train(method, arguments.parts, images, work, done)
    elif arguments.command == "measure":
        measure(images, work, done, figures, *arguments.share)
    else:
        report = summary(done.all(), figures.all(), images)
        out = Path(__file__).parent / "results" / "objectives.json"
        out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(tables(report))
        if arguments.picture:
            picture(report, images, work, Path(arguments.picture))


def train(method: str, parts: list[str], images: ImageSet, work: Path, done: Lines) -> None:
    """Runs the cells of a method that are not done yet."""

    def run(cell: Cell) -> None:
        if cell.key in done.all():
            return
        line = run_cell(cell, images, work)
        line["dev_accuracy"] = dev_accuracy(images, _features(work, cell.key))
        done.add(line)
        _logger.info("%s", json.dumps(line))

    if method in (RANDOM, RANDOM_WITH_STATISTICS):
        for seed in SEEDS:
            run(Cell(method, seed=seed))
        return
    if parts == ["first"]:
        run(first_cell(method))
        return
    for cell in sweep_cells(method):
        run(cell)
    if parts == ["sweep"]:
        return
    rate = best_rate(method, done.all())
    assert rate is not None
    for cell in cells_of(method, rate, parts):
        run(cell)


def measure(
    images: ImageSet, work: Path, done: Lines, figures: Lines, share: int, shares: int
) -> None:
    """Probes the features of cells that summary needs and that have no figures yet.

    Args:
        share, shares: every which cell, for processes that run side by side.
    """
    for number, (key, line) in enumerate(done.all().items()):
        if number % shares != share:
            continue
        cell = Cell(**line["cell"])
        rate = best_rate(cell.method, done.all()) if cell.is_trained else cell.lr
        if rate is None:
            continue
        of_interest = {cell.key}
        if cell.is_trained:
            every_part = ["seeds", "noise", "spread", "long"]
            of_interest = {one.key for one in cells_of(cell.method, rate, every_part)}
        if key in of_interest and key not in figures.all():
            figures.add({"key": key, "figures": measure_cell(images, _features(work, key))})
            _logger.info("%s", key)


def _features(work: Path, key: str) -> dict[str, np.ndarray]:
    return dict(np.load(work / f"{key}.npz"))


def _arguments() -> argparse.Namespace:
    every = [RANDOM, RANDOM_WITH_STATISTICS, *METHODS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("train", "measure", "summarise"))
    parser.add_argument("--data", required=True, help="folder with train-*.tar and val-*.tar")
    parser.add_argument("--work", default="runs/objectives", help="cells and features")
    parser.add_argument("--methods", nargs="+", default=every, choices=every)
    parser.add_argument(
        "--parts",
        nargs="+",
        default=["seeds"],
        choices=("first", "sweep", "seeds", "noise", "spread", "long"),
    )
    parser.add_argument(
        "--share", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="every N-th cell"
    )
    parser.add_argument("--picture", help="where to draw the spaces")
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
