"""Cells of benchmarks/adaptation.py: one adaptation each, and the models between two.

A cell is a method at a learning rate with a seed. All begin with the same model of two towers, and
see the same products in the same shards. The seed is that of order, augmentation and adapters.
"""

from __future__ import annotations

import csv
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from clipsys.corpora.packing import pack
from clipsys.evaluation.data import open_data
from clipsys.evaluation.measuring import Evaluation
from clipsys.evaluation.options import EvaluationOptions
from clipsys.models.encoder import Encoder
from clipsys.models.interpolation import interpolate
from clipsys.models.open_clip_models import load_model
from clipsys.models.parts import ModelParts
from clipsys.training.loop import train
from clipsys.training.recipe import Recipe

BATCH = 70
#: Passes over the products, of a method whose towers are computed in each step, and of heads over
#: stored features, whose epochs cost next to nothing.
EPOCHS, HEAD_EPOCHS = 3, 40
#: Side at which the photographs of products are stored.
LOAD_SIZE = 160
TEMPLATES = "clip"
PARTS = ("train", "validation", "test")
#: Sets that nothing is trained on.
PHOTOS, OBJECTS = "photos", "objects"
#: Figures that are stored of a task.
_KEPT = {
    "retrieval": (
        *("text_to_image/recall@1", "text_to_image/recall@10", "text_to_image/map"),
        *("image_to_text/recall@1", "image_to_text/recall@10", "image_to_text/map"),
    ),
    "zeroshot": ("accuracy@1",),
}  # fmt: skip
#: What a rate and a share of the tuned model are chosen by, on the validation part.
CHOSEN_BY = "text_to_image/map"

Figures = dict[str, float]


@dataclass(frozen=True)
class Method:
    """How the model is adapted.

    Attributes:
        title: what tables and the picture call it.
        rates: peak learning rates to choose from.
        model: settings of the recipe's section ``model`` beside the base.
        over_features: whether only heads are trained, over stored features.
        weight_decay: of the optimizer.
    """

    title: str
    rates: tuple[float, ...]
    model: Mapping[str, Any] = field(default_factory=dict)
    over_features: bool = False
    weight_decay: float = 0.1


FULL, WISE = "full", "wise"
METHODS = {
    FULL: Method("full fine-tuning", (1e-4, 3e-4)),
    "lora": Method("LoRA", (5e-4, 2e-3), {"lora": {}}, weight_decay=0.0),
    "lit": Method("LiT (image tower locked)", (1e-4, 3e-4), {"unlocked_image_blocks": 0}),
    "locked": Method("locked towers (heads alone)", (3e-4, 1e-3), over_features=True),
}


@dataclass(frozen=True)
class Cell:
    """One adaptation.

    Attributes:
        method: a key of `METHODS`.
        lr: peak learning rate.
        seed: of order, augmentation and adapters.
    """

    method: str
    lr: float
    seed: int = 0

    @property
    def key(self) -> str:
        """Names the cell, as a file may be called."""
        return f"{self.method}-lr{self.lr:g}-seed{self.seed}"


class Sets(NamedTuple):
    """The data: folder of the products' shards, and what is not trained on."""

    products: Path
    photos: str
    objects: str

    def shards(self, part: str) -> str:
        """The shards of a part of the products."""
        return str(self.products / f"{part}-*.tar")


def part_of(position: int) -> str:
    """The part that a product belongs to, by its place among all of them sorted by number.

    Every fifth is held out; of the rest every eighth is for choices.
    """
    if position % 5 == 0:
        return "test"
    return "validation" if position % 10 == 3 else "train"


def split(rows: Sequence[Mapping[str, str]]) -> dict[str, list[Mapping[str, str]]]:
    """Rows of a table of products by part; a product's number is the name of its file."""
    ordered = sorted(rows, key=lambda row: int(Path(row["filepath"]).stem))
    parts: dict[str, list[Mapping[str, str]]] = {part: [] for part in PARTS}
    for position, row in enumerate(ordered):
        parts[part_of(position)].append(row)
    return parts


def described(parts: Mapping[str, Sequence[Mapping[str, str]]]) -> dict[str, Any]:
    """Sizes of the parts, and how many of those held out have a title that was trained on."""
    trained = {row["caption"] for row in parts["train"]}
    known = sum(row["caption"] in trained for row in parts["test"])
    return {part: len(rows) for part, rows in parts.items()} | {"test_titles_in_train": known}


def pack_products(table: Path, out: Path) -> dict[str, Any]:
    """Writes the shards of each part once, and says what is in them."""
    with table.open(encoding="utf-8", newline="") as file:
        parts = split(list(csv.DictReader(file)))
    for part, rows in parts.items():
        if any(out.glob(f"{part}-*.tar")):
            continue
        out.mkdir(parents=True, exist_ok=True)
        own = out / f"{part}.csv"
        with own.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            for row in rows:
                writer.writerow({**row, "filepath": str(table.absolute().parent / row["filepath"])})
        pack(own, out, prefix=part)
    return described(parts)


def run_cell(cell: Cell, base: Path, sets: Sets, work: Path) -> dict[str, Any]:
    """Trains, stores the model in ``work/models`` and measures it on the validation part."""
    output = work / "training"
    shutil.rmtree(output, ignore_errors=True)
    started, used = time.monotonic(), time.process_time()
    train(_recipe(cell, base, sets, output, work / "features"))
    seconds = {
        "cpu_seconds": round(time.process_time() - used, 1),
        "seconds": round(time.monotonic() - started, 1),
    }
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    target = model_folder(work, cell)
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(exist_ok=True)
    shutil.move(output / "model", target)
    shutil.rmtree(output)
    return {
        "key": cell.key,
        "cell": asdict(cell),
        "losses": losses,
        **seconds,
        "validation": measure(load_model(str(target)), sets, ("validation",))["validation"],
    }


def model_folder(work: Path, cell: Cell) -> Path:
    """Where the model of a cell is stored."""
    return work / "models" / cell.key


def _recipe(cell: Cell, base: Path, sets: Sets, output: Path, features: Path) -> Recipe:
    method = METHODS[cell.method]
    model: dict[str, Any] = {"pretrained": str(base), **method.model}
    if method.over_features:
        model = {"image_tower": {"name": str(base)}, "text_tower": {"name": str(base)}}
    document: dict[str, Any] = {
        "output": str(output),
        "seed": cell.seed,
        "model": model,
        "data": {
            "train": sets.shards("train"), "batch_size": BATCH, "workers": 0,
            "load_size": LOAD_SIZE,
        },
        "objective": {"name": "infonce", "positives": "caption"},
        "optimizer": {"lr": cell.lr, "weight_decay": method.weight_decay},
        "schedule": {
            "epochs": HEAD_EPOCHS if method.over_features else EPOCHS, "warmup_steps": 5,
        },
        "engine": {"zero_stage": 0, "precision": "bf16", "channels_last": True, "device": "cpu"},
        "checkpoint": {"every_epochs": 0},
    }  # fmt: skip
    if method.over_features:
        document["features"] = {"folder": str(features)}
    else:
        document["augmentation"] = {"crop_scale": [0.6, 1.0], "flip": 0.5}
    return Recipe.model_validate(document)


def measure(parts: ModelParts, sets: Sets, names: Sequence[str]) -> dict[str, Figures]:
    """What `clipsys evaluate` measures of a model, by set: a part of the products, or another."""
    encoder = Encoder(parts, device="cpu", precision="bf16")
    found: dict[str, Figures] = {}
    for name in names:
        is_labelled = name == OBJECTS
        data = {PHOTOS: sets.photos, OBJECTS: sets.objects}.get(name) or sets.shards(name)
        options = EvaluationOptions(templates=TEMPLATES if is_labelled else None)
        task = "zeroshot" if is_labelled else "retrieval"
        (result,) = Evaluation(encoder, open_data(data), options).run(task)
        metrics = result.metrics()
        found[name] = {figure: round(metrics[figure], 4) for figure in _KEPT[task]}
    return found


def between(base: Path, tuned: Path, alpha: float) -> ModelParts:
    """The model between two folders (WiSE-FT)."""
    return interpolate(load_model(str(base)), load_model(str(tuned)), alpha)
