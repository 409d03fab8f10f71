"""Training steps in fp32 and in bf16 autocast, and which of them the probe chooses.

    python benchmarks/precision.py [--recipes emoji_cpu demo ViT-B-32]

writes benchmarks/results/precision.json. A step is forward, loss and backward of both towers on
drawn images and captions at the recipe's batch (--batch for ViT-B-32), without data loading and
optimizer, which are the same in both precisions. Precisions take turns in one process, on one
thread, timed by its processor time; figures are medians without the first step. Whole runs are
measured by `benchmarks/training.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from clipsys.config import load_settings, shipped_recipes
from clipsys.probe import machine
from clipsys.probe.measuring import Conditions, measure
from clipsys.probe.probing import arrangements
from clipsys.training.losses import info_nce
from clipsys.training.model.initial import initial_model
from clipsys.training.model.towers import Towers
from clipsys.training.precision import training_work
from clipsys.training.recipe import Recipe

CAPTION = "a brown dog runs over wet grass behind two children in red coats"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=["emoji_cpu", "demo", "ViT-B-32"])
    parser.add_argument("--batch", type=int, default=64, help="where no recipe is shipped")
    parser.add_argument("--seconds", type=float, default=30, help="for each recipe, about")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {"machine": {**machine.describe(), "cores": machine.available_cores()}}
    out = Path(__file__).parent / "results" / "precision.json"
    for name in arguments.recipes:
        report[name] = _compare(_recipe(name, arguments.batch), arguments.seconds)
        out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"this process waited {machine.waiting_s():.1f} s for cores", file=sys.stderr)
    print(json.dumps(report, indent=2))


def _recipe(name: str, batch_size: int) -> Recipe:
    if name in shipped_recipes():
        return load_settings(Recipe, shipped_recipes()[name])
    data = {"train": "shards/*.tar", "batch_size": batch_size}
    return load_settings(Recipe, {"model": {"architecture": name}, "data": data})


def _compare(recipe: Recipe, seconds: float) -> dict[str, Any]:
    torch.manual_seed(recipe.seed)
    parts = initial_model(recipe.model)
    work = training_work(recipe, parts)
    began = time.perf_counter()
    conditions = Conditions(work.precisions, arrangements(trains=True), True, work.channels_last)
    figures = measure(work.products(), conditions)
    probe_s = time.perf_counter() - began
    model = Towers(parts.model)
    model.train()
    batch = recipe.data.batch_size
    image_BCHW = torch.randn(batch, 3, *parts.preprocessing.size)
    if recipe.engine.channels_last:
        image_BCHW = image_BCHW.contiguous(memory_format=torch.channels_last)
    tokens_BL = parts.tokenizer([" ".join(CAPTION.split()[: 6 + n % 8]) for n in range(batch)])
    times: dict[str, list[float]] = {"fp32": [], "bf16": []}
    losses: dict[str, float] = {}
    ends = time.monotonic() + seconds
    while len(times["bf16"]) < 2 or time.monotonic() < ends:
        for precision, own in times.items():
            model.precision = precision
            started = time.thread_time()
            image_BD, text_BD = model.encode_image(image_BCHW), model.encode_tokens(tokens_BL)
            loss = info_nce(image_BD, text_BD, model.logit_scale())
            loss.backward()  # type: ignore[no-untyped-call]
            own.append(time.thread_time() - started)
            model.zero_grad()
            losses.setdefault(precision, float(loss))
    rates = {name: round(batch / statistics.median(own[1:]), 2) for name, own in times.items()}
    return {
        "batch": batch,
        "samples_per_core_s": rates,
        "times_fp32": round(rates["bf16"] / rates["fp32"], 2),
        "first_loss": losses,
        "probe": {
            "says": str(figures),
            "seconds": round(probe_s, 2),
            "chooses_the_faster": figures.precision == max(rates, key=lambda name: rates[name]),
        },
    }


if __name__ == "__main__":
    main()
