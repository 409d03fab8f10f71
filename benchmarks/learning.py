"""What open_clip_train and ``clipsys train`` learn from scratch in equal processor time.

    python benchmarks/learning.py --peer PEER/bin/python --set emoji flickr8k --seeds 3 \
        --data emoji=EMOJI flickr8k=FLICKR8K [--picture docs/images/learning.png]
    python benchmarks/learning.py … --sweep 0.5     the settings tried for open_clip_train
    python benchmarks/learning.py … --seeds 0       only the report, of what has been measured

EMOJI and FLICKR8K are folders with train-*.tar and val-*.tar. The peer needs an environment of its
own, since open_clip_train 3.3.0 does not run with webdataset 0.2.100 or later:

    python -m venv PEER
    PEER/bin/pip install 'open_clip_torch[training]==3.3.0' webdataset==0.2.86

Each program trains with its own recipe (learning_sets.py): open_clip_train with the best one of a
small sweep, clipsys with the shipped one. Both read the same shards, start from random weights, get
the same processor time, and are measured by the same function on the same validation images
(learning_cells.py). How many epochs fit is measured first. Cells are lines of WORK/cells.jsonl, and
what is there is not run again, so a run can be stopped at any time. Writes
benchmarks/results/learning.json.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from learning_cells import CLIPSYS, PEER, Cell, Pace, Place, calibrate, run_cell
from learning_report import picture, summary, tables
from learning_sets import SETS
from stored_lines import Lines

_logger = logging.getLogger(__name__)

#: Of the budget, in which clipsys is to reach what the peer reaches in all of it.
SHORT = 1 / 3


def main() -> None:
    arguments = _arguments()
    logging.basicConfig(level=logging.WARNING)
    _logger.setLevel(logging.INFO)
    work = Path(arguments.work).resolve()
    work.mkdir(parents=True, exist_ok=True)
    place = Place(arguments.peer, dict(arguments.data), work)
    done = Lines(work / "cells.jsonl")
    for cell in _cells(arguments):
        if cell.key not in done.all():
            line = run_cell(cell, _pace(cell, place), place)
            done.add(line)
            _logger.info("%s", json.dumps(line))
    report = summary(done.all(), arguments.set, _minutes(arguments))
    out = Path(__file__).parent / "results" / "learning.json"
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(tables(report))
    if arguments.picture:
        picture(report, Path(arguments.picture))


def _cells(arguments: argparse.Namespace) -> Iterator[Cell]:
    """In an order that gives every comparison one seed before any gets a second."""
    minutes = _minutes(arguments)
    if arguments.sweep:
        for name in arguments.set:
            for variant in SETS[name].peer_sweep:
                yield Cell(PEER, name, 0, arguments.sweep * minutes[name], variant)
        return
    for seed in range(arguments.seeds):
        for name in arguments.set:
            for variant in arguments.variants:
                yield Cell(CLIPSYS, name, seed, minutes[name], variant)
            yield Cell(PEER, name, seed, minutes[name])
            yield Cell(CLIPSYS, name, seed, minutes[name])
            yield Cell(CLIPSYS, name, seed, round(minutes[name] * SHORT, 2))


def _minutes(arguments: argparse.Namespace) -> dict[str, float]:
    return {name: arguments.minutes or SETS[name].minutes for name in arguments.set}


def _pace(cell: Cell, place: Place) -> Pace:
    """How fast a program is on a set, measured once."""
    known = Lines(place.work / "paces.jsonl")
    key = f"{cell.program}, {cell.set}, {cell.variant}"
    if key not in known.all():
        pace = calibrate(replace(cell, seed=0), place)
        known.add({"key": key, **asdict(pace)})
    line = known.all()[key]
    return Pace(line["start_s"], line["epoch_s"])


def _folder(text: str) -> tuple[str, Path]:
    name, separator, folder = text.partition("=")
    if not separator or name not in SETS:
        raise argparse.ArgumentTypeError(f"{text!r}: expected one of {', '.join(SETS)}, =FOLDER")
    return name, Path(folder).resolve()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer", default="", help="Python that has open_clip_train")
    parser.add_argument("--set", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--data", nargs="+", type=_folder, default=[], metavar="SET=FOLDER")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, help="of one core; default by set")
    parser.add_argument("--sweep", type=float, help="share of the minutes, for each setting tried")
    parser.add_argument(
        "--variants", nargs="*", default=[], metavar="'SECTION.KEY=VALUE …'",
        help="changes of our recipe to run besides, each an argument",
    )  # fmt: skip
    parser.add_argument("--work", default="runs/learning", help="cells, and runs under way")
    parser.add_argument("--picture", help="file to draw the curves in")
    arguments = parser.parse_args()
    missing = [name for name in arguments.set if name not in dict(arguments.data)]
    if missing and (arguments.seeds or arguments.sweep):
        parser.error(f"--data: no folder for {', '.join(missing)}")
    return arguments


if __name__ == "__main__":
    main()
