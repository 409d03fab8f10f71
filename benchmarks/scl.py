"""SCL against cross-entropy: fine-tuning a text encoder on few or noisy labels, in pairs of seeds.

For each seed, number of labels and share of wrong labels, the same encoder is fine-tuned twice:
with cross-entropy (objective ``scl``, weight 0) and with SCL (weight 0.9, temperature 0.3, as
Gunel et al. 2021). Both see the same samples, with the same labels, in the same order, and begin
with the same classifier: only the loss differs, and only paired differences are reported. The
spread over seeds is larger than the effect.

    clipsys shards train.tsv train --no-images      # columns label and text; the same for test
    python benchmarks/scl.py --encoder FOLDER --train 'train/*.tar' --test 'test/*.tar'

The encoder is a folder of Hugging Face's. Results are appended to --cells, one line a cell; a call
that finds them goes on from there.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import statistics
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from clipsys.config import load_settings
from clipsys.evaluation.metrics.classification import flat_figures, predictions
from clipsys.shards.reading import expand_shards, iterate_raw
from clipsys.shards.samples import parse_sample
from clipsys.training.distributed.process_group import start_processes
from clipsys.training.engine.schedule import lr_factor
from clipsys.training.model.outputs import Inputs
from clipsys.training.recipe import Recipe
from clipsys.training.run import Run, build_run

#: Samples trained on, and epochs of each: 40, 60 and 124 steps of 16. At a fifth of the learning
#: rate and with fewer steps cross-entropy had not fitted 1,000 samples, and SCL, which gives the
#: classifier a tenth of the gradient, was 7 points below it.
EPOCHS = {20: 40, 100: 10, 1000: 2}
NOISE = (0.0, 0.2)
#: Weight of the contrastive loss by method.
WEIGHTS = {"cross-entropy": 0.0, "scl": 0.9}
BATCH, LENGTH = 16, 32
FIGURES = ("accuracy@1", "macro_f1")


class Cell(NamedTuple):
    """One fine-tuning."""

    seed: int
    noise: float
    num_samples: int
    method: str


def cells(seeds: range, sizes: list[int]) -> Iterator[Cell]:
    """All fine-tunings; a seed is complete before the next one begins."""
    for seed in seeds:
        for num_samples in sizes:
            for noise in NOISE:
                for method in WEIGHTS:
                    yield Cell(seed, noise, num_samples, method)


def recipe_of(cell: Cell, options: argparse.Namespace) -> Recipe:
    """The recipe of a fine-tuning."""
    encoder = str(options.encoder.absolute())
    text = {
        "hf_model_name": encoder,
        "hf_tokenizer_name": encoder,
        "hf_model_pretrained": True,
        "hf_pooler_type": "mean_pooler",
        "hf_proj_type": None,
        "context_length": LENGTH,
    }
    width = json.loads((options.encoder / "config.json").read_text())["hidden_size"]
    return load_settings(
        Recipe,
        {
            "seed": cell.seed,
            "output": str(options.cells.parent / "unused"),
            "model": {
                "architecture": {"embed_dim": width, "text_cfg": text},
                "unlocked_text_blocks": options.unlocked_blocks,
            },
            "data": {
                "train": options.train,
                "batch_size": BATCH,
                "workers": 0,
                "num_samples": cell.num_samples,
                "label_noise": cell.noise,
            },
            "objective": {"name": "scl", "weight": WEIGHTS[cell.method]},
            "optimizer": {"lr": options.lr, "betas": [0.9, 0.999], "weight_decay": 0.01},
            "schedule": {"epochs": EPOCHS[cell.num_samples], "warmup_steps": 5},
            "engine": {"precision": "bf16", "zero_stage": 0, "device": "cpu", "threads": 1},
        },
    )


def fine_tune(run: Run) -> float:
    """Takes all steps of a run; returns the mean loss of the last five."""
    run.engine.train()
    batches, losses = run.batches(0), []
    for step in range(run.total_steps):
        own = list(islice(batches, run.plan.micro_batches))
        factor = lr_factor(step, run.total_steps, run.recipe.schedule)
        losses.append(run.step(own, step, factor).loss)
    return statistics.fmean(losses[-5:])


def measure(run: Run, texts: list[str], labels: list[str]) -> dict[str, float]:
    """Figures of the classifier on texts that are sorted by nothing."""
    targets = [run.classes.index(label) for label in labels]
    with run.engine.evaluating() as model:
        scores = [
            run.objective.scores(model, Inputs((), (run.model.tokenizer(texts[a : a + 64]),)))
            for a in range(0, len(texts), 64)
        ]
    found = predictions(torch.cat(scores).numpy(), targets, run.classes)
    return {name: value for name, value in flat_figures(found).items() if name in FIGURES}


def held_out(spec: str, limit: int) -> tuple[list[str], list[str]]:
    """Some texts of the test shards and their labels, the same ones for every cell."""
    samples = [parse_sample(raw, needs_image=False) for raw in iterate_raw(expand_shards(spec))]
    chosen = random.Random(0).sample(samples, min(limit, len(samples)))
    return [one.captions[0] for one in chosen], [str(one.label) for one in chosen]


def summary(done: dict[Cell, dict[str, float]]) -> list[dict[str, Any]]:
    """Means of both methods, and the mean paired difference with its standard error, in points."""
    rows = []
    for num_samples in EPOCHS:
        for noise in NOISE:
            row: dict[str, Any] = {"num_samples": num_samples, "label_noise": noise}
            for name in FIGURES:
                pairs = [
                    tuple(100 * done[Cell(seed, noise, num_samples, m)][name] for m in WEIGHTS)
                    for seed in range(1000)
                    if all(Cell(seed, noise, num_samples, m) in done for m in WEIGHTS)
                ]
                if not pairs:
                    continue
                row["seeds"] = len(pairs)
                for number, method in enumerate(WEIGHTS):
                    row[f"{name} {method}"] = round(statistics.fmean(p[number] for p in pairs), 2)
                gains = [scl - entropy for entropy, scl in pairs]
                row[f"{name} difference"] = round(statistics.fmean(gains), 2)
                if len(gains) > 1:
                    error = statistics.stdev(gains) / math.sqrt(len(gains))
                    row[f"{name} standard error"] = round(error, 2)
                    spread = statistics.stdev(entropy for entropy, _ in pairs)
                    row[f"{name} spread over seeds"] = round(spread, 2)
            rows.append(row)
    return rows


def read_cells(path: Path) -> dict[Cell, dict[str, float]]:
    """What an earlier call has measured."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    entries = [json.loads(line) for line in lines]
    return {Cell(*entry["cell"]): entry["figures"] for entry in entries}


def main() -> None:
    """Fine-tunes what is missing, and writes the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument(
        "--first-seed", type=int, default=1, help="seed 0 was used to choose the settings"
    )
    parser.add_argument("--num-samples", type=int, nargs="+", default=list(EPOCHS))
    parser.add_argument("--test-texts", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--unlocked-blocks", type=int, default=2, help="last blocks trained")
    parser.add_argument("--cells", type=Path, default=Path("scl_cells.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scl.json"))
    parser.add_argument("--limit", type=int, help="fine-tunings of this call; default all")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    device = start_processes("cpu")
    texts, labels = held_out(options.test, options.test_texts)
    done = read_cells(options.cells)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    missing = [cell for cell in cells(seeds, options.num_samples) if cell not in done]
    for cell in missing[: options.limit]:
        started = time.monotonic()
        run = build_run(recipe_of(cell, options), device)
        loss = fine_tune(run)
        trained_s = time.monotonic() - started
        done[cell] = measure(run, texts, labels)
        total_s = time.monotonic() - started
        entry = {"cell": cell, "figures": done[cell], "loss": loss, "seconds": round(total_s, 1)}
        with options.cells.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        print(*cell, done[cell], f"loss {loss:.3f}, {trained_s:.0f} + {total_s - trained_s:.0f} s")
    result = {
        "what": "fine-tuning of a text encoder: SCL (weight 0.9, temperature 0.3) minus "
        "cross-entropy, paired by seed; percent and points",
        "encoder": options.encoder.parent.name,
        "test_texts": len(texts),
        "tokens": LENGTH,
        "batch_size": BATCH,
        "steps": {n: n // BATCH * epochs for n, epochs in EPOCHS.items()},
        "lr": options.lr,
        "unlocked_blocks": options.unlocked_blocks,
        "precision": "bf16",
        "rows": summary(done),
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
