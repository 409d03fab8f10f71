"""Cells of benchmarks/objectives.py: one training run each, and the features that it gave.

A cell is a method at a learning rate, a seed and a batch size. All of them encode the same number
of images: an epoch of a method that encodes k images of each sample counts k times, keys of
momentum towers and small crops included. Features are stored, so that probes and pictures need no
second run.

Legend of shapes: N images, H height, W width.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from objective_data import IMAGE_SIDE, LABEL, ImageSet
from torch import nn

from clipsys.training.data.augmentation import normalisation, to_input
from clipsys.training.distributed.process_group import start_processes
from clipsys.training.loop import TrainingLoop
from clipsys.training.recipe import Recipe
from clipsys.training.run import Run, build_run

#: Images that a cell encodes for each training image: divisible by 1, 2, 3, 4 and 6.
PASSES = 12
BATCH = 128
#: What seeds 0, 1, … are seeds of: weights, order, augmentation, label noise.
RANDOM, RANDOM_WITH_STATISTICS = "random", "random_batch_statistics"

ARCHITECTURE = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": IMAGE_SIDE, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}
PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "resize_mode": "squash"}
AUGMENTATION = {
    "crop_scale": [0.3, 1.0], "flip": 0.5, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4,
    "hue": 0.1, "greyscale": 0.2,
}  # fmt: skip
#: For methods that ask for colours.
_KEEPS_COLOURS = {"saturation": 0.0, "hue": 0.0, "greyscale": 0.0}


@dataclass(frozen=True)
class Method:
    """How a method is run.

    Attributes:
        images: images that it encodes of each sample and step, momentum towers included.
        settings: its ``objective`` section, without the name.
        name: of the objective; default the name of the method.
        supervised: whether it learns from the labels.
        augmentation: what differs from `AUGMENTATION`.
    """

    images: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None
    supervised: bool = False
    augmentation: Mapping[str, Any] = field(default_factory=dict)


_TURNED = {"crop_scale": [0.5, 1.0], "brightness": 0.0, "contrast": 0.0}
_HEAD = {"head_width": 64}
_TWO_VIEWS = {"temperature": 0.2, **_HEAD}
#: A queue of eight batches, and a momentum for runs of about 100 steps.
_QUEUE = {**_TWO_VIEWS, "momentum": 0.95, "queue_size": 1024}
_WIDE = {"head_hidden": 512, "head_width": 512}
METHODS = {
    "classification": Method(1, supervised=True),
    "supcon": Method(2, {"temperature": 0.1, **_HEAD}, supervised=True),
    "triplet": Method(1, _HEAD, supervised=True),
    "margin": Method(1, _HEAD, supervised=True),
    "n_pair": Method(2, _HEAD, supervised=True),
    "nce": Method(2, _TWO_VIEWS),
    "simclr": Method(2, _TWO_VIEWS),
    "hard_simclr": Method(2, _HEAD),
    "moco": Method(2, _QUEUE),
    "moco_v3": Method(4, {**_TWO_VIEWS, "momentum": 0.95}),
    "memory_bank": Method(1, _HEAD),
    "swav": Method(2, {**_HEAD, "num_prototypes": 128, "frozen_prototype_steps": 27}),
    "barlow_twins": Method(2, _WIDE),
    "vicreg": Method(2, _WIDE),
    "looc": Method(3, {**_QUEUE, "augmentations": ["colour"]}),
    "rotation": Method(4, augmentation={**_TURNED, **_KEEPS_COLOURS}),
    "jigsaw": Method(1, {"tiles": 2, "num_permutations": 24}),
    "colour": Method(1, augmentation={**_TURNED, **_KEEPS_COLOURS}),
}


@dataclass(frozen=True)
class Cell:
    """One training run.

    Attributes:
        method: a key of `METHODS`, or `RANDOM` or `RANDOM_WITH_STATISTICS`: no training.
        lr: peak learning rate.
        seed: of weights, order, augmentation and label noise.
        batch: samples of a step.
        passes: images encoded for each training image.
        label_noise: share of the training labels that are replaced.
        changes: settings of the objective that differ from those of `METHODS`, as JSON.
    """

    method: str
    lr: float = 0.0
    seed: int = 0
    batch: int = BATCH
    passes: int = PASSES
    label_noise: float = 0.0
    changes: str = "{}"

    @property
    def key(self) -> str:
        """Names the cell, as a file may be called."""
        changed = "".join(f"-{name}{value}" for name, value in json.loads(self.changes).items())
        return (
            f"{self.method}-lr{self.lr:g}-seed{self.seed}-batch{self.batch}-passes{self.passes}"
            f"-noise{self.label_noise:g}{changed}"
        )

    @property
    def is_trained(self) -> bool:
        """Whether it is a method, and no random encoder."""
        return self.method in METHODS


def run_cell(cell: Cell, images: ImageSet, folder: Path) -> dict[str, Any]:
    """Trains, stores the features of every part of the images, and says what was done."""
    output = Path(tempfile.mkdtemp(prefix="cell-", dir=folder))
    started, used = time.monotonic(), time.process_time()
    try:
        recipe = _recipe(cell, images, output / "run")
        torch.manual_seed(cell.seed)
        run = build_run(recipe, start_processes("cpu"))
        encoded = _count_images(run)
        if cell.is_trained:
            TrainingLoop(run).train()
        elif cell.method == RANDOM_WITH_STATISTICS:
            _take_statistics(run)
        report = {"cell": asdict(cell), "key": cell.key, "images_encoded": encoded["images"]}
        if cell.is_trained:
            lines = (output / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            report |= {"steps": run.total_steps, "last_loss": json.loads(lines[-1]).get("loss")}
        report |= {
            "seconds": round(time.monotonic() - started, 1),
            "cpu_seconds": round(time.process_time() - used, 1),
        }
        features = {name: _encode(run, pixels) for name, pixels in images.pixels.items()}
        np.savez(folder / f"{cell.key}.npz", **features)
        return report
    finally:
        shutil.rmtree(output)


def _recipe(cell: Cell, images: ImageSet, output: Path) -> Recipe:
    method = METHODS.get(cell.method, METHODS["simclr"])
    data: dict[str, Any] = {
        "train": images.shards, "batch_size": cell.batch, "workers": 0, "load_size": 64,
    }  # fmt: skip
    if method.supervised:
        data["label_key"] = LABEL
    if cell.label_noise:
        data["label_noise"] = cell.label_noise
    epochs, rest = divmod(cell.passes, method.images)
    assert not rest, f"{cell.method}: {cell.passes} passes are no whole number of epochs"
    steps = epochs * (len(images.labels["fit"]) // cell.batch)
    document = {
        "output": str(output),
        "seed": cell.seed,
        "model": {"architecture": ARCHITECTURE, "preprocess": PREPROCESS},
        "data": data,
        "augmentation": {**AUGMENTATION, **method.augmentation},
        "objective": {
            "name": method.name or (cell.method if cell.is_trained else "simclr"),
            **method.settings,
            **json.loads(cell.changes),
        },
        "optimizer": {"lr": cell.lr or 1e-3, "weight_decay": 0.05, "eps": 1e-8},
        "schedule": {"epochs": epochs, "warmup_steps": max(1, steps // 10)},
        "engine": {"zero_stage": 0, "channels_last": True, "precision": "fp32", "device": "cpu"},
        "checkpoint": {"every_epochs": 0},
    }
    return Recipe.model_validate(document)


def _count_images(run: Run) -> dict[str, int]:
    """Counts what passes an image tower from now on, the trained one or the momentum copy."""
    counted = {"images": 0}

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if run.engine.module.training:
            counted["images"] += len(inputs[0])

    for name, module in run.engine.module.named_modules():
        if name.endswith("visual"):
            module.register_forward_pre_hook(count)
    return counted


def _take_statistics(run: Run, steps: int = 10) -> None:
    """Lets batch norm see augmented training images, without an update."""
    run.engine.module.train()
    batches = run.batches(0)
    for step in range(steps):
        (inputs,) = run.step._seeded_inputs([next(batches)], step)
        with torch.no_grad():
            run.engine.module(inputs())


def _encode(run: Run, pixels_NCHW: torch.Tensor) -> np.ndarray:
    """(N, D) float32 of unit norm: the tower's features, before any head."""
    mean, std = normalisation(run.model.preprocessing, run.engine.device)
    with run.engine.evaluating() as model:
        parts = [
            model.encode_image(to_input(part, run.model.preprocessing.size, mean, std))
            for part in pixels_NCHW.split(256)
        ]
    return torch.cat(parts).float().numpy()
