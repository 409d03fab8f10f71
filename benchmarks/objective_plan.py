"""Which cells benchmarks/objectives.py runs, and which learning rate it chooses."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from objective_cells import METHODS, PASSES, Cell

#: Learning rates that every method chooses from.
RATES = (3e-4, 1e-3)
SEEDS = (0, 1, 2)
#: Share of the training labels that are replaced in the part ``noise``.
NOISE = 0.2
#: What the spread of SupCon and of cross-entropy is measured over, each around the chosen setting.
SPREAD_METHODS = ("supcon", "classification")
SPREAD_RATES = (*RATES, 3e-3, 1e-2)
SPREAD_BATCHES = (64, 128, 256)
SPREAD_TEMPERATURES = (0.05, 0.1, 0.3)
SPREAD_SEEDS = SEEDS[:1]


def first_cell(method: str) -> Cell:
    """A cell of the sweep that comes before all others, to see whether a method learns."""
    return Cell(method, RATES[-1])


def sweep_cells(method: str) -> list[Cell]:
    """A cell for each rate, seed 0."""
    return [Cell(method, rate) for rate in RATES]


def best_rate(method: str, done: Mapping[str, Any]) -> float | None:
    """The rate of those run that classifies ``dev`` best, of equal ones the smallest.

    None: there is none yet.
    """
    cells = [cell for cell in sweep_cells(method) if cell.key in done]
    if not cells:
        return None
    return max(cells, key=lambda cell: float(done[cell.key]["dev_accuracy"])).lr


def cells_of(method: str, rate: float, parts: list[str]) -> Iterator[Cell]:
    """What is run at the chosen rate, and around it."""
    if "seeds" in parts:
        yield from (Cell(method, rate, seed) for seed in SEEDS)
    if "noise" in parts and METHODS[method].supervised:
        yield from (Cell(method, rate, seed, label_noise=NOISE) for seed in SEEDS)
    if "spread" in parts and method in SPREAD_METHODS:
        for by_value in spread_cells(method, rate).values():
            for cells in by_value.values():
                yield from cells
    if "long" in parts:
        yield Cell(method, rate, passes=4 * PASSES)


def spread_cells(method: str, rate: float) -> dict[str, dict[float, list[Cell]]]:
    """{setting: {value: cells}}: all else is as at the chosen rate."""
    seeds = SPREAD_SEEDS
    spread = {
        "lr": {one: [Cell(method, one, seed) for seed in seeds] for one in SPREAD_RATES},
        "batch": {
            float(one): [Cell(method, rate, seed, batch=one) for seed in seeds]
            for one in SPREAD_BATCHES
        },
    }
    default = METHODS[method].settings.get("temperature")
    if default is not None:
        spread["temperature"] = {
            one: [
                Cell(method, rate, seed, changes=_changes(temperature=one, default=default))
                for seed in seeds
            ]
            for one in SPREAD_TEMPERATURES
        }
    return spread


def _changes(*, temperature: float, default: float) -> str:
    return "{}" if temperature == default else json.dumps({"temperature": temperature})
