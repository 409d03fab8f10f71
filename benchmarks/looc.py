"""LooC beside MoCo: does a head of its own keep the colours that colour augmentation erases?

    python benchmarks/looc.py --table products.csv

Writes benchmarks/results/looc.json. The table names photographs (``filepath``) with their
``colour`` and ``article_type``; both are predicted from the frozen features of image towers that
were trained on the photographs without labels:

    moco, colours augmented    MoCo, crops, flips and colour jitter
    moco                       MoCo, crops and flips
    looc                       LooC, crops, flips and colour jitter; colour has a head of its own
    untrained                  the tower before training, its batch statistics those of the data

All encode the same number of images (a query and a key for MoCo, a query and two keys for LooC), so
LooC takes fewer steps; ``looc, equal steps`` takes as many, and encodes more. One learning rate,
one schedule. Probes: logistic regression and nearest neighbours, trained on 70 % of the
photographs; a seed decides both training and split, so that methods are compared seed by seed.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import clipsys
from clipsys.corpora.packing import pack
from clipsys.evaluation.tasks.probes import ProbeSettings, probe_result
from clipsys.evaluation.tasks.splitting import LabelledVectors
from clipsys.probe import machine

TASKS = ("colour", "article_type")
#: Classes with fewer photographs are left out of a task.
FEWEST = 15
_JITTER = {
    "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.5, "greyscale": 0.2
}  # fmt: skip
_MOCO = {
    "name": "moco", "temperature": 0.2, "head_width": 64, "momentum": 0.95, "queue_size": 512
}  # fmt: skip
_LOOC = {**_MOCO, "name": "looc", "augmentations": ["colour"]}
#: Objective, augmentation of colours, and epochs as a share of MoCo's.
METHODS: dict[str, tuple[dict[str, Any], dict[str, float], float]] = {
    "moco, colours augmented": (_MOCO, _JITTER, 1.0),
    "moco": (_MOCO, {}, 1.0),
    "looc": (_LOOC, _JITTER, 2 / 3),
    "looc, equal steps": (_LOOC, _JITTER, 1.0),
    "untrained": (_MOCO, {}, 0.0),
}


def main() -> None:
    arguments = _arguments()
    rows = list(csv.DictReader(arguments.table.open(encoding="utf-8")))
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="clipsys-benchmark-") as folder:
        root = Path(folder)
        pack(arguments.table, root / "shards")
        for seed in range(arguments.seeds):
            for method in arguments.methods:
                run = {"method": method, "seed": seed}
                out = root / f"{method.replace(', ', '-').replace(' ', '-')}-{seed}"
                start = time.monotonic()
                run |= _train(arguments, method, seed, root / "shards", out)
                run["train_s"] = round(time.monotonic() - start, 1)
                run |= _probes(out / "run", arguments.table.parent, rows, seed)
                print(json.dumps(run), file=sys.stderr)
                runs.append(run)
    report = _report(arguments, len(rows), runs)
    out = Path(__file__).parent / "results" / "looc.json"
    if arguments.write:
        out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--table", type=Path, required=True, help="photographs with attributes")
    parser.add_argument("--epochs", type=int, default=60, help="of MoCo")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--write", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def _recipe(arguments: argparse.Namespace, method: str, seed: int, shards: Path) -> dict[str, Any]:
    objective, colours, share = METHODS[method]
    return {
        "seed": seed,
        "model": {
            "architecture": {
                "embed_dim": 128,
                "vision_cfg": {
                    "image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64
                },
                "text_cfg": {
                    "context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1
                },
            },
            "preprocess": {
                "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "resize_mode": "squash"
            },
        },
        "data": {"train": str(shards), "batch_size": 128, "workers": 0, "load_size": 48},
        "objective": objective,
        "augmentation": {"crop_scale": [0.3, 1.0], "flip": 0.5, **colours},
        # Untrained: one epoch at a rate that changes nothing takes the batch statistics.
        "optimizer": {"lr": 1e-3 if share else 1e-12, "weight_decay": 0.05, "eps": 1e-8},
        "schedule": {"epochs": max(1, round(arguments.epochs * share)), "warmup_steps": 30},
        "engine": {"zero_stage": 0, "precision": "fp32", "channels_last": True},
        "checkpoint": {"every_epochs": 0},
    }  # fmt: skip


def _train(
    arguments: argparse.Namespace, method: str, seed: int, shards: Path, out: Path
) -> dict[str, Any]:
    recipe = {"output": str(out / "run"), **_recipe(arguments, method, seed, shards)}
    out.mkdir()
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "clipsys", "train", str(out / "recipe.yaml"), "--nproc", "1"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    lines = (out / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [entry for entry in map(json.loads, lines) if "loss" in entry]
    views = 3 if recipe["objective"]["name"] == "looc" else 2
    encoded = views * logged[-1]["step"] * recipe["data"]["batch_size"]
    return {"images_encoded": encoded, "loss": round(logged[-1]["loss"], 3)}


def _probes(run: Path, images: Path, rows: list[dict[str, str]], seed: int) -> dict[str, float]:
    """Accuracy in per cent of each probe on each task."""
    encoder = clipsys.load(run)
    vectors_ND = encoder.encode_image([images / row["filepath"] for row in rows])
    figures = {}
    for task in TASKS:
        counts = Counter(row[task] for row in rows)
        chosen = [n for n, row in enumerate(rows) if row[task] and counts[row[task]] >= FEWEST]
        uris = [rows[n]["filepath"] for n in chosen]
        labelled = LabelledVectors(
            np.asarray(vectors_ND)[chosen],
            [rows[n][task] for n in chosen],
            uris,
            [(uri,) for uri in uris],
        )
        for kind in ("logistic", "knn"):
            result = probe_result(labelled, settings=ProbeSettings(kind=kind, seed=seed))
            figure = result.figures["accuracy@1"]
            figures[f"{task}/{kind}"] = round(100 * figure.value, 2)
            figures[f"{task}/classes"] = len(set(labelled.labels))
            figures[f"{task}/chance"] = round(100 * (figure.chance or 0), 2)
    return figures


def _report(
    arguments: argparse.Namespace, images: int, runs: list[dict[str, Any]]
) -> dict[str, Any]:
    names = [f"{task}/{kind}" for task in TASKS for kind in ("logistic", "knn")]
    methods = {}
    for method in arguments.methods:
        own = [run for run in runs if run["method"] == method]
        methods[method] = {
            "images_encoded": own[0]["images_encoded"],
            **{name: _spread([run[name] for run in own]) for name in names},
        }
    differences = {}
    for first, second in (
        ("looc", "moco, colours augmented"),
        ("looc", "moco"),
        ("moco", "moco, colours augmented"),
        ("looc, equal steps", "moco, colours augmented"),
        ("looc, equal steps", "moco"),
    ):
        if {first, second} <= set(arguments.methods):
            pairs = [
                {name: run[name] for name in names}
                for method in (first, second)
                for run in runs
                if run["method"] == method
            ]
            half = len(pairs) // 2
            differences[f"{first} minus {second}"] = {
                name: _spread([pairs[n][name] - pairs[half + n][name] for n in range(half)])
                for name in names
            }
    return {
        "command": "python benchmarks/looc.py --table products.csv "
        f"--epochs {arguments.epochs} --seeds {arguments.seeds}",
        "machine": {"processor": machine.processor(), "python": platform.python_version()},
        "images": images,
        "unit": "accuracy in per cent; mean, and standard deviation over seeds",
        "tasks": {
            task: {name: runs[0][f"{task}/{name}"] for name in ("classes", "chance")}
            for task in TASKS
        },
        "methods": methods,
        "paired differences": differences,
        "runs": runs,
    }


def _spread(values: list[float]) -> dict[str, float]:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": round(statistics.mean(values), 2), "deviation": round(deviation, 2)}


if __name__ == "__main__":
    main()
