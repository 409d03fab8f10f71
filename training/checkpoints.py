"""Checkpoints: complete or absent, the newest few kept, found again for `--resume`.

RUN/checkpoints/step-00001200/     DeepSpeed's state of all ranks, the averaged weights,
                                   and model/, a model folder that open_clip loads
RUN/checkpoints/latest             the name of the newest complete one
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from pydantic import Field, NonNegativeInt, PositiveInt

from clipsys.config import Settings
from clipsys.errors import TrainingError
from clipsys.models.open_clip_models import ModelParts, save_model
from clipsys.training.distributed.collectives import on_first_rank
from clipsys.training.engine.deepspeed_engine import Engine

FOLDER = "checkpoints"
_LATEST = "latest"


class CheckpointConfig(Settings):
    """What is kept of a run."""

    every_epochs: NonNegativeInt = Field(1, description="0: only at the end")
    every_steps: NonNegativeInt = Field(0, description="besides; 0: not inside an epoch")
    keep: PositiveInt = Field(2, description="newest checkpoints that stay")


@dataclass(frozen=True)
class TrainState:
    """Everything a run needs to go on, beside weights and optimizer.

    The order of samples, their augmentation and dropout are functions of the seed and the step, so
    the step is all there is to remember of them.

    Attributes:
        order: fingerprint of the order of samples; empty in checkpoints of older versions.
        skipped: samples that could not be used so far, by reason.
    """

    step: int
    steps_per_epoch: int
    batch_size: int
    world_size: int
    seed: int
    order: str = ""
    skipped: dict[str, int] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, run: Path, *, keep: int) -> None:
        self._folder = run / FOLDER
        self._keep = keep

    def save(
        self,
        engine: Engine,
        state: TrainState,
        parts: ModelParts,
        provenance: dict[str, Any],
    ) -> Path:
        """Writes a checkpoint, from every rank together. It counts only when it is complete."""
        name = f"step-{state.step:08d}"
        partial = f"{name}.partial"
        on_first_rank(lambda: shutil.rmtree(self._folder / partial, ignore_errors=True))
        engine.save(self._folder, partial, asdict(state))
        weights = engine.state_dict()
        _wait_for_all()

        def publish() -> None:
            target = self._folder / partial / "model"
            save_model(parts, target, weights=weights, provenance=provenance)
            final = self._folder / name
            shutil.rmtree(final, ignore_errors=True)
            (self._folder / partial).rename(final)
            self._point_to(name)
            self._forget_old()
            for script in self._folder.glob("zero_to_*.py"):
                script.unlink()  # DeepSpeed's recovery scripts; model/ makes them needless

        on_first_rank(publish)
        return self._folder / name

    def _point_to(self, name: str) -> None:
        pointer = self._folder / f"{_LATEST}.partial"
        pointer.write_text(name + "\n", encoding="utf-8")
        pointer.replace(self._folder / _LATEST)

    def _forget_old(self) -> None:
        complete = sorted(self._folder.glob("step-????????"))
        for old in complete[: -self._keep]:
            shutil.rmtree(old)

    def latest(self) -> str | None:
        """The name of the newest complete checkpoint."""
        pointer = self._folder / _LATEST
        if not pointer.is_file():
            return None
        name = pointer.read_text(encoding="utf-8").strip()
        if not (self._folder / name).is_dir():
            raise TrainingError(
                f"{pointer}: names {name!r}, which is not there; write another name of "
                f"{self._folder} into it, or delete it to start anew"
            )
        return name

    def load(self, engine: Engine, name: str) -> TrainState:
        """Puts a checkpoint into the engine, on every rank together.

        Raises:
            ConfigError: it does not fit the model, the ZeRO stage or the number of ranks.
        """
        saved = engine.load(self._folder, name)
        known = TrainState.__dataclass_fields__.keys() & saved.keys()
        return TrainState(**{name: saved[name] for name in known})


def latest_model(run: Path, step: int | None = None) -> Path:
    """The model folder of a run's newest checkpoint, or of the one at a step.

    Raises:
        TrainingError: this is not a run folder, or it has no such checkpoint.
    """
    folder = run / FOLDER
    if not folder.is_dir():
        raise TrainingError(
            f"{run}: not a run folder (no {FOLDER}/); name what `clipsys train` wrote"
        )
    if step is not None:
        found = folder / f"step-{step:08d}" / "model"
        if not found.is_dir():
            there = ", ".join(
                str(int(path.name[5:])) for path in sorted(folder.glob("step-????????"))
            )
            raise TrainingError(f"{run}: no checkpoint at step {step}; there are {there or 'none'}")
        return found
    if (run / "model").is_dir():
        return run / "model"
    name = Checkpoints(run, keep=1).latest()
    if name is None:
        raise TrainingError(f"{run}: the run has no checkpoint yet")
    return folder / name / "model"


def read_provenance(model_folder: Path) -> dict[str, Any]:
    """What a checkpoint's model folder says of its origin."""
    card = json.loads((model_folder / "clipsys.json").read_text(encoding="utf-8"))
    return dict(card["provenance"])


def _wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()
