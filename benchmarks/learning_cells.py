"""Runs of benchmarks/learning.py: one training by one program for a share of CPU time, measured.

A cell is a program, a set, a seed and a budget. Both programs are started as their users start
them, each as a process of its own, on the same shards, with one thread and one loading process.
While a cell runs, its processor time (user and system, of the program and its workers) is noted at
each checkpoint that appears. Afterwards each checkpoint becomes a model folder and is measured by
`clipsys.evaluation.measuring.evaluate`, the function behind ``clipsys evaluate --task retrieval``.

Processor time and not the clock: beside other work it changes far less. It includes the start of
Python and the import of the libraries, which users wait for too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from learning_sets import (
    PEER_MODEL,
    PREPROCESS,
    SETS,
    count_samples,
    shards_of,
    write_peer_model,
)

from clipsys.config import find_recipe, load_settings
from clipsys.evaluation.measuring import evaluate
from clipsys.models.encoder import load
from clipsys.models.open_clip_models import build_model, save_model
from clipsys.training.recipe import Recipe

_logger = logging.getLogger(__name__)

CLIPSYS, PEER = "clipsys", "open_clip_train"
#: Checkpoints of a run that are measured.
POINTS = 6
CALIBRATION_EPOCHS = 2
_INTERVAL_S = 0.2
#: open_clip_train takes its model by name, and offers no option to add one.
_PEER_START = (
    "import sys, open_clip; open_clip.add_model_config(sys.argv[1]);"
    "from open_clip_train.main import main; main(sys.argv[2:])"
)


@dataclass(frozen=True)
class Cell:
    """One training run.

    Attributes:
        program: `CLIPSYS` or `PEER`.
        set: a key of `SETS`.
        seed: of weights, order and augmentation.
        minutes: of processor time that it may take.
        variant: settings that differ from the program's recipe: names of `TrainingSet.peer_sweep`,
            or settings of a recipe, ``section.key=value``, separated by spaces.
    """

    program: str
    set: str
    seed: int
    minutes: float
    variant: str = ""

    @property
    def key(self) -> str:
        """Names the cell."""
        changed = f", {self.variant}" if self.variant else ""
        return f"{self.program}, {self.set}, seed {self.seed}, {self.minutes:g} minutes{changed}"


@dataclass(frozen=True)
class Pace:
    """Processor seconds before the first step, and of an epoch."""

    start_s: float
    epoch_s: float


@dataclass(frozen=True)
class Place:
    """Where things are.

    Attributes:
        python: the Python that has open_clip_train.
        data: folder of shards of each set.
        work: where runs are written; they are removed when they have been measured.
    """

    python: str
    data: dict[str, Path]
    work: Path


def calibrate(cell: Cell, place: Place) -> Pace:
    """Measures how much processor time an epoch takes."""
    _, seen, _ = _train(cell, place, CALIBRATION_EPOCHS, 1)
    times = sorted(seen.values())
    epoch_s = (times[-1] - times[0]) / (len(times) - 1)
    return Pace(round(max(0.0, times[0] - epoch_s), 2), round(epoch_s, 3))


def run_cell(cell: Cell, pace: Pace, place: Place) -> dict[str, Any]:
    """Trains, and measures each checkpoint."""
    epochs = max(1, int((60 * cell.minutes - pace.start_s) / pace.epoch_s))
    run, seen, total = _train(cell, place, epochs, max(1, -(-epochs // POINTS)))
    curve = []
    for checkpoint, used_s in sorted(seen.items(), key=lambda item: item[1]):
        figures = _measure(cell, checkpoint, place)
        curve.append({"cpu_minutes": round(used_s / 60, 3), **figures})
    shutil.rmtree(run)
    return {"cell": asdict(cell), "key": cell.key, "epochs": epochs, **total, "curve": curve}


def _train(
    cell: Cell, place: Place, epochs: int, every: int
) -> tuple[Path, dict[Path, float], dict[str, Any]]:
    """Trains; gives the run folder, the seconds at each checkpoint, and those of the whole."""
    run = place.work / "run" / f"{cell.program}-{cell.set}-{os.getpid()}"
    shutil.rmtree(run, ignore_errors=True)
    run.parent.mkdir(parents=True, exist_ok=True)
    if cell.program == PEER:
        command = _peer_command(cell, place, run, epochs, every)
        find = lambda: list((run / "checkpoints").glob("epoch_*.pt"))  # noqa: E731
    else:
        command = _own_command(cell, place, run, epochs, every)
        find = lambda: list((run / "checkpoints").glob("step-????????"))  # noqa: E731
    before, started = _children_s(), time.monotonic()
    with Path(f"{run}.log").open("w", encoding="utf-8") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=place.work
        )
        seen = _watch(process, find)
    if process.returncode:
        raise SystemExit(f"{cell.key}: exit status {process.returncode}; see {run}.log")
    used_s = _children_s() - before
    if not seen:
        raise SystemExit(f"{cell.key}: no checkpoint; see {run}.log")
    last = max(seen, key=lambda path: (seen[path], path.name))
    # The export at the end belongs to the time of the last checkpoint.
    seen[last] = used_s
    total = {
        "cpu_minutes": round(used_s / 60, 3),
        "wall_minutes": round((time.monotonic() - started) / 60, 3),
    }
    return run, seen, total


def _watch(
    process: subprocess.Popen[bytes], find: Callable[[], Sequence[Path]]
) -> dict[Path, float]:
    """The processor seconds at which each checkpoint was first seen."""
    seen: dict[Path, float] = {}
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        for checkpoint in find():
            if checkpoint not in seen:
                with contextlib.suppress(psutil.NoSuchProcess):
                    seen[checkpoint] = _tree_s(watched)
        time.sleep(_INTERVAL_S)
    for checkpoint in find():
        seen.setdefault(checkpoint, float("inf"))
    return seen


def _tree_s(process: psutil.Process) -> float:
    """Processor time of a process and all that it has started."""
    total = 0.0
    for one in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            used = one.cpu_times()
            total += used.user + used.system + used.children_user + used.children_system
    return total


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _peer_command(cell: Cell, place: Place, run: Path, epochs: int, every: int) -> list[str]:
    chosen = SETS[cell.set]
    recipe = chosen.peer_sweep[cell.variant] if cell.variant else chosen.peer
    shards = shards_of(place.data[cell.set], "train")
    samples = count_samples(shards)
    return [
        place.python, "-c", _PEER_START, str(write_peer_model(place.work / "peer_model")),
        "--train-data", "::".join(map(str, shards)), "--train-num-samples", str(samples),
        "--dataset-type", "webdataset", "--model", "small", "--epochs", str(epochs),
        "--workers", "1", "--seed", str(cell.seed), "--logs", str(run.parent), "--name", run.name,
        "--save-frequency", str(every),
        "--image-mean", *map(str, PREPROCESS["mean"]), "--image-std", *map(str, PREPROCESS["std"]),
        *recipe.options(epochs * -(-samples // recipe.batch)),
    ]  # fmt: skip


def _own_command(cell: Cell, place: Place, run: Path, epochs: int, every: int) -> list[str]:
    folder = place.data[cell.set]
    name = SETS[cell.set].recipe
    settings = [
        f"output={run}", f"seed={cell.seed}", f"data.train={folder}/train-*.tar",
        f"schedule.epochs={epochs}", f"checkpoint.every_epochs={every}",
        f"checkpoint.keep={epochs}", "data.validation=null", *cell.variant.split(),
    ]  # fmt: skip
    recipe = load_settings(Recipe, find_recipe(name), settings)
    # Warm-up is stated in steps of the whole recipe.
    shipped = load_settings(Recipe, find_recipe(name), settings[2:3])
    warmup = round(shipped.schedule.warmup_steps * epochs / shipped.schedule.epochs)
    if recipe.schedule.warmup_steps == shipped.schedule.warmup_steps:
        settings.append(f"schedule.warmup_steps={warmup}")
    return [sys.executable, "-m", "clipsys", "train", name, *settings, "--nproc", "1"]


def _measure(cell: Cell, checkpoint: Path, place: Place) -> dict[str, float]:
    """Recall of a checkpoint on the validation images."""
    folder = checkpoint / "model"
    if cell.program == PEER:
        folder = _export_peer(checkpoint, place.work / "run" / f"peer-model-{os.getpid()}")
    (result,) = evaluate(
        load(folder, device="cpu", precision="fp32"),
        "retrieval",
        str(shards_of(place.data[cell.set], "val")[0]),
        cache=False,
        **SETS[cell.set].options,
    )
    metrics = result.metrics()
    return {
        f"{direction}@{k}": round(metrics[f"{direction}/recall@{k}"], 4)
        for direction in ("text_to_image", "image_to_text")
        for k in (1, 5, 10)
    }


def _export_peer(checkpoint: Path, folder: Path) -> Path:
    """A model folder of a checkpoint of open_clip_train."""
    parts = build_model(PEER_MODEL, preprocess=PREPROCESS)
    saved = torch.load(checkpoint, map_location="cpu", weights_only=False)["state_dict"]
    weights = {name.removeprefix("module."): tensor for name, tensor in saved.items()}
    parts.model.load_state_dict(weights)
    shutil.rmtree(folder, ignore_errors=True)
    save_model(replace(parts), folder)
    return folder
