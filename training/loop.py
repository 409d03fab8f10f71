"""The training loop: from a recipe to a run folder.

RUN/config.yaml       the resolved recipe
RUN/metrics.jsonl     loss, rate, temperature, validation figures
RUN/skipped.jsonl     samples that could not be used, with the reason
RUN/checkpoints/      what --resume goes on from
RUN/tensorboard/
RUN/curves.png
RUN/model/            the trained model, when the run is complete
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from clipsys import __version__
from clipsys.config import dump_settings
from clipsys.devices import choose_training_precision
from clipsys.errors import TrainingError
from clipsys.models import ModelParts
from clipsys.preprocessing import Preprocessing
from clipsys.progress import Advance, progress
from clipsys.training.checkpoints import Checkpoints, TrainState
from clipsys.training.data import (
    Batch,
    Decoder,
    Skipped,
    TrainingBatches,
    load_batches,
    open_shards,
)
from clipsys.training.distributed import gather_objects, on_first_rank, rank, world_size
from clipsys.training.engine import Engine
from clipsys.training.journal import Journal, plot_curves
from clipsys.training.processes import start_processes
from clipsys.training.recipe import Recipe
from clipsys.training.schedule import lr_factor
from clipsys.training.starting import initial_model
from clipsys.training.step import StepFigures, TrainingStep
from clipsys.training.towers import ContrastiveModel, TowerOptions
from clipsys.training.validation import Validation

_logger = logging.getLogger(__name__)

#: Steps between two lines of metrics.jsonl.
LOG_INTERVAL = 10


def train(recipe: Recipe, *, resume: bool = False) -> Path:
    """Runs a recipe on this rank. Every rank of the process group calls it.

    Returns:
        The run folder, the same on every rank.

    Raises:
        ClipsysError: whatever is wrong with recipe, data or run folder.
    """
    recipe.check_world(int(os.environ.get("WORLD_SIZE", "1")))
    device = start_processes(recipe.engine.device)
    run = recipe.run_folder
    on_first_rank(lambda: _check_folder(run, resume=resume))
    torch.manual_seed(recipe.seed)
    trainer = _Trainer(recipe, run, device)
    if resume:
        trainer.resume()
    # Only now, when data and model are known to be usable, something is written.
    on_first_rank(lambda: _write_recipe(run, recipe))
    trainer.run_all()
    return run


def _check_folder(run: Path, *, resume: bool) -> None:
    if resume:
        if not (run / "config.yaml").is_file():
            raise TrainingError(f"{run}: there is no run to resume; start it without --resume")
        return
    if run.is_dir() and any(run.iterdir()):
        raise TrainingError(
            f"{run}: the run folder is not empty; go on with --resume, choose another folder "
            "(output=…) or remove it"
        )


def _write_recipe(run: Path, recipe: Recipe) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(dump_settings(recipe), encoding="utf-8")


@dataclass
class _Window:
    """Sums since the last line of metrics.jsonl."""

    started: float = field(default_factory=time.monotonic)
    loss: float = 0.0
    steps: int = 0
    waited_s: float = 0.0


class _Trainer:
    def __init__(self, recipe: Recipe, run: Path, device: torch.device) -> None:
        self.recipe, self.run, self.device = recipe, run, device
        self.parts = self._new_model()
        self.shard_set = on_first_rank(lambda: open_shards(recipe.data.train))
        self.steps_per_epoch = self.shard_set.steps_per_epoch(recipe.data.batch_size)
        self.total_steps = self.steps_per_epoch * recipe.schedule.epochs
        self.validation = Validation(
            recipe.evaluation,
            recipe.data.validation,
            self.parts.preprocessing,
            self.parts.tokenizer,
        )
        precision = choose_training_precision(recipe.engine.precision, device)
        options = TowerOptions(precision, recipe.engine.grad_checkpointing, recipe.engine.compile)
        self.engine = Engine(
            ContrastiveModel(self.parts, options),
            config=recipe.engine,
            optimizer=recipe.optimizer,
            local_batch_size=recipe.data.batch_size // world_size(),
            device=device,
        )
        # The engine trains its own copy's parameters in place; this one is for export, so that
        # averaged or gathered weights never pass through the model that trains.
        self.export_parts = (
            initial_model(recipe.model, loss=recipe.objective.loss) if rank() == 0 else self.parts
        )
        self.train_step = TrainingStep(recipe, self.engine, self.parts.preprocessing)
        share = recipe.data.batch_size // world_size()
        self.micro_steps = share // (recipe.data.micro_batch_size or share)
        self.checkpoints = Checkpoints(run, keep=recipe.checkpoint.keep)
        self.journal: Journal | None = None
        self.window = _Window()
        self.step = 0
        self.skipped = 0
        self.figures: dict[str, float] = {}
        self._announce(precision)

    def _new_model(self) -> ModelParts:
        return initial_model(self.recipe.model, loss=self.recipe.objective.loss)

    def _announce(self, precision: str) -> None:
        if rank() != 0:
            return
        size = sum(parameter.numel() for parameter in self.export_parts.model.parameters())
        data = self.recipe.data
        _logger.info(
            "%.1f M parameters, %s, ZeRO stage %d, %d process(es) on %s; %s samples in %d shards, "
            "%d epochs of %d steps, %d pairs each",
            size / 1e6,
            precision,
            self.recipe.engine.zero_stage,
            world_size(),
            self.device.type,
            f"{self.shard_set.num_samples:,}",
            len(self.shard_set.shards),
            self.recipe.schedule.epochs,
            self.steps_per_epoch,
            data.batch_size,
        )
        dropped = self.shard_set.num_samples - self.steps_per_epoch * data.batch_size
        if dropped:
            _logger.info("the last %d samples of each epoch's order are dropped", dropped)

    def resume(self) -> None:
        latest = self.checkpoints.latest()
        if latest is None:
            _logger.info("%s: no checkpoint yet, starting at the first step", self.run)
            return
        state = self.checkpoints.load(self.engine, latest)
        expected = self._state()
        for name in ("steps_per_epoch", "batch_size", "world_size", "seed"):
            was, now = getattr(state, name), getattr(expected, name)
            if was != now:
                raise TrainingError(
                    f"{self.run}: the run was started with {name} {was}, now it is {now}; "
                    "resume it as it was, or start a new run from its model (model.pretrained)"
                )
        self.step = state.step
        _logger.info("resuming after step %d of %d", self.step, self.total_steps)

    def _state(self) -> TrainState:
        return TrainState(
            step=self.step,
            steps_per_epoch=self.steps_per_epoch,
            batch_size=self.recipe.data.batch_size,
            world_size=world_size(),
            seed=self.recipe.seed,
        )

    def run_all(self) -> None:
        """Trains to the end, evaluating and saving on the way."""
        if rank() == 0:
            self.journal = Journal(self.run)
        self.engine.train()
        remaining = self.total_steps - self.step
        self.window = _Window()
        batches = load_batches(self._dataset(), self.recipe.data.workers)
        title = "Training" if rank() == 0 else None
        with _bar(title, remaining) as advance:
            while self.step < self.total_steps:
                asked = time.monotonic()
                own = list(islice(batches, self.micro_steps))
                self.window.waited_s += time.monotonic() - asked
                self._train_step(own)
                advance(1, note=self._note())
                if self._due(self.recipe.evaluation.every_epochs):
                    with self._pause():
                        self._evaluate()
                if self._due(self.recipe.checkpoint.every_epochs) and self.step < self.total_steps:
                    with self._pause():
                        self._save()
        self._finish()

    @contextmanager
    def _pause(self) -> Iterator[None]:
        """Keeps evaluation and saving out of the training rate."""
        paused = time.monotonic()
        yield
        self.window.started += time.monotonic() - paused

    def _dataset(self) -> TrainingBatches:
        data = self.recipe.data
        side = data.load_size
        target = self.parts.preprocessing
        loading = Preprocessing(**{**vars(target), "size": (side, side) if side else target.size})
        return TrainingBatches(
            self.shard_set,
            Decoder(
                preprocessing=loading,
                tokenizer=self.parts.tokenizer,
                captions=data.captions,
                positives=self.recipe.objective.positives,
                label_key=data.label_key,
                max_image_pixels=data.max_image_pixels,
                seed=self.recipe.seed,
            ),
            batch_size=data.batch_size,
            micro_batch_size=data.micro_batch_size,
            shuffle_buffer=data.shuffle_buffer,
            cache_bytes=data.cache_mb * 1_000_000,
            rank=rank(),
            world_size=world_size(),
            epochs=self.recipe.schedule.epochs,
            start_step=self.step,
        )

    def _due(self, every_epochs: int) -> bool:
        if self.step == self.total_steps:
            return True
        return bool(every_epochs) and self.step % (self.steps_per_epoch * every_epochs) == 0

    def _train_step(self, batches: Sequence[Batch]) -> None:
        factor = lr_factor(self.step, self.total_steps, self.recipe.schedule)
        figures = self.train_step(batches, self.step, factor)
        self.step += 1
        self.window.loss += figures.loss
        self.window.steps += 1
        if figures.num_skipped:
            self._count_skipped([one for batch in batches for one in batch.skipped])
        if self.step % LOG_INTERVAL == 0 or self.step == self.total_steps:
            self._log(factor, figures)

    def _count_skipped(self, own: Sequence[Skipped]) -> None:
        gathered = gather_objects(own)
        for skipped in gathered:
            self.skipped += len(skipped)
            if skipped and self.journal:
                self.journal.skip(skipped)
        allowed = self.recipe.data.max_bad_share * self.shard_set.num_samples
        if self.skipped > max(1.0, allowed * (1 + self.step / self.steps_per_epoch)):
            last = next(one for skipped in gathered for one in skipped)
            raise TrainingError(
                f"{self.skipped} samples could not be used, more than data.max_bad_share = "
                f"{self.recipe.data.max_bad_share:.1%}; the last: {last.shard}#{last.key}: "
                f"{last.reason}; all are in {self.run / 'skipped.jsonl'}"
            )

    def _log(self, factor: float, figures: StepFigures) -> None:
        window = self.window
        elapsed = time.monotonic() - window.started
        self.figures = {
            "epoch": round(self.step / self.steps_per_epoch, 4),
            "loss": window.loss / window.steps,
            "lr": self.recipe.optimizer.lr * factor,
            "logit_scale": figures.logit_scale,
            "gradient_norm": figures.gradient_norm,
            "samples_per_s": window.steps * self.recipe.data.batch_size / elapsed,
            "data_wait_share": window.waited_s / elapsed,
        }
        if self.journal:
            self.journal.write(self.step, self.figures)
        self.window = _Window()

    def _note(self) -> str:
        if not self.figures:
            return ""
        return f"loss {self.figures['loss']:.3f}  epoch {self.figures['epoch']:.1f}"

    def _evaluate(self) -> None:
        if not self.validation:
            return
        figures = self.validation.measure(self.engine)
        if self.journal:
            self.journal.write(self.step, {f"val/{name}": value for name, value in figures.items()})
            shown = ("text_to_image/recall@10", "image_to_text/recall@10", "zeroshot/accuracy@1")
            texts = [f"{name} {figures[name]:.3f}" for name in shown if name in figures]
            _logger.info("epoch %.3g: %s", self.step / self.steps_per_epoch, ", ".join(texts))

    def _save(self) -> Path:
        return self.checkpoints.save(
            self.engine, self._state(), self.export_parts, self._provenance()
        )

    def _provenance(self) -> dict[str, Any]:
        return {
            "run": str(self.run.resolve()),
            "step": self.step,
            "epochs": round(self.step / self.steps_per_epoch, 4),
            "clipsys": __version__,
            "recipe": self.recipe.model_dump(mode="json"),
        }

    def _finish(self) -> None:
        folder = self._save()

        def publish() -> None:
            partial = self.run / ".model.partial"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(folder / "model", partial)
            shutil.rmtree(self.run / "model", ignore_errors=True)
            partial.rename(self.run / "model")
            plot_curves(self.run, self.run / "curves.png")
            if self.skipped:
                _logger.warning(
                    "%d samples could not be used; see %s", self.skipped, self.run / "skipped.jsonl"
                )
            if self.journal:
                self.journal.close()

        on_first_rank(publish)


def _bar(title: str | None, total: int) -> AbstractContextManager[Advance]:
    if title is None:
        return nullcontext(lambda n=1, *, note=None: None)
    return progress(title, total, unit="steps")
