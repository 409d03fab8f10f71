"""A model of two towers adapted to products: what it gains there, and what it forgets elsewhere.

    python benchmarks/adaptation.py run --base MODEL --products products.csv \
        --photos "val-*.tar" --objects FOLDER
    python benchmarks/adaptation.py summarise [--picture docs/images/adaptation.png]

MODEL is a model folder (configs/two_towers_flickr8k.yaml makes one), products.csv a table with the
columns filepath and caption (a title; files are named by number), ``--photos`` shards with captions
and ``--objects`` folders by class, both not trained on. Products are split by number: every fifth
is held out, every tenth is for choices. Hits are all products of an equal title.

Methods: full fine-tuning, LoRA, LiT, locked towers, and WiSE-FT between the base and the fully
tuned model. Each has two learning rates to choose from, with seed 0, and three seeds at the better
one; the share of WiSE-FT is the smallest that keeps nine tenths of the gain. Both choices are made
by the mean average precision, title to image, on the validation part; figures are of the test part.

What is done is a line of WORK/cells.jsonl or WORK/figures.jsonl (WORK: runs/adaptation) and is not
done again, so that a run can be stopped at any time. The first seed of all methods comes first,
and cheap methods before others.
`summarise` writes benchmarks/results/adaptation.json of what is there, and prints the table.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adaptation_cells import (
    FULL,
    METHODS,
    OBJECTS,
    PHOTOS,
    WISE,
    Cell,
    Sets,
    between,
    measure,
    model_folder,
    pack_products,
    run_cell,
)
from adaptation_report import (
    ALPHAS,
    SEEDS,
    best_rate,
    picture,
    share_key,
    summary,
    table,
    wise_share,
)
from stored_lines import Lines

from clipsys.models.open_clip_models import load_model
from clipsys.models.parts import fingerprint

_MEASURED = ("test", PHOTOS, OBJECTS)
#: Methods in the order in which they are run: the cheap ones first.
_ORDER = ("locked", "lit", FULL, "lora")


def main() -> None:
    arguments = _arguments()
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger(Lines.__module__).setLevel(logging.INFO)
    work = Path(arguments.work)
    if arguments.command == "run":
        Adaptation(arguments, work).run()
        return
    report = summary(Lines(work / "cells.jsonl").all(), Lines(work / "figures.jsonl").all())
    report |= json.loads((work / "setting.json").read_text(encoding="utf-8"))
    out = Path(__file__).parent / "results" / "adaptation.json"
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(table(report))
    if arguments.picture:
        picture(report, Path(arguments.picture))


class Adaptation:
    """All cells and figures, in the order in which they say most."""

    def __init__(self, arguments: argparse.Namespace, work: Path) -> None:
        self._base, self._work = Path(arguments.base), work
        self._sets = Sets(work / "products", arguments.photos, arguments.objects)
        work.mkdir(parents=True, exist_ok=True)
        described = pack_products(Path(arguments.products), self._sets.products)
        stated = json.dumps(
            {"base": fingerprint(load_model(arguments.base)), "products": described}
        )
        setting = work / "setting.json"
        if setting.exists() and setting.read_text(encoding="utf-8") != stated:
            raise SystemExit(f"{work} has cells of another model or other products; name another")
        setting.write_text(stated, encoding="utf-8")
        self._cells, self._figures = Lines(work / "cells.jsonl"), Lines(work / "figures.jsonl")

    def run(self) -> None:
        """Does what is not done yet."""
        self._measure("base", lambda: load_model(str(self._base)), with_validation=True)
        for seed in SEEDS:
            for method in _ORDER:
                self._adapt(method, seed)
            self._choose_share(seed)
        for seed in SEEDS:
            for alpha in ALPHAS:
                self._measure_share(seed, alpha)

    def _adapt(self, method: str, seed: int) -> None:
        for lr in METHODS[method].rates:
            self._train(Cell(method, lr))
        rate = best_rate(method, self._cells.all())
        assert rate is not None
        cell = Cell(method, rate, seed)
        self._train(cell)
        self._measure(cell.key, lambda: load_model(str(model_folder(self._work, cell))))

    def _train(self, cell: Cell) -> None:
        self._cells.add_once(cell.key, lambda: run_cell(cell, self._base, self._sets, self._work))

    def _measure(self, key: str, load: Callable[[], Any], *, with_validation: bool = False) -> None:
        names = (*(["validation"] if with_validation else []), *_MEASURED)
        self._figures.add_once(key, lambda: measure(load(), self._sets, names))

    def _choose_share(self, seed: int) -> None:
        """Measures all shares on the validation part, and the one that is chosen on all sets."""
        for alpha in ALPHAS:
            self._cells.add_once(
                share_key(seed, alpha),
                lambda alpha=alpha: {  # type: ignore[misc]
                    "cell": {"method": WISE, "alpha": alpha, "seed": seed},
                    **measure(self._between(seed, alpha), self._sets, ("validation",)),
                },
            )
        alpha = wise_share(seed, self._cells.all(), self._figures.all())
        if alpha is not None and alpha in ALPHAS:
            self._measure_share(seed, alpha)

    def _measure_share(self, seed: int, alpha: float) -> None:
        self._measure(share_key(seed, alpha), lambda: self._between(seed, alpha))

    def _between(self, seed: int, alpha: float) -> Any:
        rate = best_rate(FULL, self._cells.all())
        assert rate is not None
        return between(self._base, model_folder(self._work, Cell(FULL, rate, seed)), alpha)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train and measure what is not done yet")
    run.add_argument("--base", required=True, help="model folder of two towers")
    run.add_argument("--products", required=True, help="table with filepath and caption")
    run.add_argument("--photos", required=True, help="captioned shards that are not trained on")
    run.add_argument("--objects", required=True, help="folders by class, not trained on")
    summarise = commands.add_parser("summarise", help="write the results and the picture")
    summarise.add_argument("--picture", help="where to draw gain against loss")
    for command in (run, summarise):
        command.add_argument("--work", default="runs/adaptation", help="cells, models, figures")
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
