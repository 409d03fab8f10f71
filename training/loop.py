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
from clipsys.errors import TrainingError
from clipsys.images.preprocessing import Preprocessing
from clipsys.models.devices import choose_training_precision
from clipsys.models.open_clip_models import ModelParts
from clipsys.progress import Advance, progress
from clipsys.training.checkpoints import Checkpoints, TrainState
from clipsys.training.data.batches import TrainingBatches, open_shards, sample_order
from clipsys.training.data.loader import load_batches
from clipsys.training.data.samples import Batch, Decoder, Skipped
from clipsys.training.data.skips import SkipLedger
from clipsys.training.distributed.collectives import gather_objects, on_first_rank, rank, world_size
from clipsys.training.distributed.process_group import start_processes
from clipsys.training.engine.deepspeed_engine import Engine
from clipsys.training.engine.schedule import lr_factor
from clipsys.training.journal import Journal, plot_curves
from clipsys.training.model.initial import initial_model
from clipsys.training.model.towers import ContrastiveModel, TowerOptions
from clipsys.training.plan import Plan, StepClock, plan_run
from clipsys.training.recipe import Recipe
from clipsys.training.step import StepFigures, TrainingStep
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
        self.shard_set = on_first_rank(lambda: open_shards(recipe.data))
        self.order = sample_order(recipe.data, self.shard_set, recipe.seed)
        self.steps_per_epoch = self.order.steps_per_epoch(recipe.data.batch_size)
        self.total_steps = self.steps_per_epoch * recipe.schedule.epochs
        self.validation = Validation(
            recipe.evaluation,
            recipe.data.validation,
            self.parts.preprocessing,
            self.parts.tokenizer,
            caption_key=recipe.data.caption_key,
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
        self.export_parts = self._new_model() if rank() == 0 else self.parts
        self.train_step = TrainingStep(
            self.engine,
            self.parts.preprocessing,
            objective=recipe.objective,
            augmentation=recipe.augmentation,
            batch_size=recipe.data.batch_size,
            seed=recipe.seed,
        )
        self.checkpoints = Checkpoints(run, keep=recipe.checkpoint.keep)
        self.journal: Journal | None = None
        self.window = _Window()
        self.step = 0
        self.skips = SkipLedger(
            run,
            max_share=recipe.data.max_bad_share,
            epoch_samples=self.order.num_positions,
            writes=rank() == 0,
        )
        self.figures: dict[str, float] = {}
        self.plan = self._plan(precision)
        self._announce(precision)

    def _new_model(self) -> ModelParts:
        return initial_model(self.recipe.model, loss=self.recipe.objective.loss)

    def _plan(self, precision: str) -> Plan:
        preprocessing = self.parts.preprocessing
        side = self.recipe.data.load_size
        return plan_run(
            self.recipe,
            self.export_parts.model,
            precision=precision,
            world_size=world_size(),
            num_samples=self.order.num_positions,
            embed_dim=int(self.parts.config["embed_dim"]),
            image_size=(side, side) if side else preprocessing.size,
            tile_size=self.train_step.tile_size,
        )

    def _announce(self, precision: str) -> None:
        """Says what the run is and what it takes; only rank 0 speaks."""
        if rank() != 0:
            return
        data, epochs = self.recipe.data, self.recipe.schedule.epochs
        _logger.info(
            "%d process(es) on %s, %s, ZeRO stage %d; %s samples in %d shards, %d epochs of %d "
            "steps, %d pairs each, %d rows of logits at once",
            world_size(),
            self.device.type,
            precision,
            self.recipe.engine.zero_stage,
            f"{self.shard_set.num_samples:,}",
            len(self.shard_set.shards),
            epochs,
            self.steps_per_epoch,
            data.batch_size,
            min(self.train_step.tile_size, data.batch_size),
        )
        _logger.info("%s", self.plan)
        for warning in self.plan.warnings:
            _logger.warning("%s", warning)
        dropped = self.order.num_positions - self.steps_per_epoch * data.batch_size
        if dropped:
            _logger.info("the last %d samples of each epoch's order are dropped", dropped)

    def resume(self) -> None:
        latest = self.checkpoints.latest()
        if latest is None:
            _logger.info("%s: no checkpoint yet, starting at the first step", self.run)
            return
        state = self.checkpoints.load(self.engine, latest)
        expected = self._state()
        for name in ("seed", "batch_size", "steps_per_epoch"):
            was, now = getattr(state, name), getattr(expected, name)
            if was != now:
                raise TrainingError(
                    f"{self.run}: the run was started with {name} {was}, now it is {now}; "
                    "resume it as it was, or start a new run from its model (model.pretrained)"
                )
        if state.order not in ("", expected.order):
            raise TrainingError(
                f"{self.run}: the samples or their order have changed since the run was started "
                "(the shards of data.train, their sizes or weights, data.shuffle_shards, "
                "data.resampled or data.samples_per_epoch); resume it as it was, or start a new "
                "run from its model (model.pretrained)"
            )
        self.step = state.step
        self.skips.resume(state.step, state.skipped)
        _logger.info("resuming after step %d of %d", self.step, self.total_steps)
        if state.world_size != expected.world_size:
            _logger.info(
                "%d process(es) instead of %d: the batches go on with the samples that they would "
                "have had; augmentation and dropout are drawn per process, so they differ",
                expected.world_size,
                state.world_size,
            )

    def _state(self) -> TrainState:
        return TrainState(
            step=self.step,
            steps_per_epoch=self.steps_per_epoch,
            batch_size=self.recipe.data.batch_size,
            world_size=world_size(),
            seed=self.recipe.seed,
            order=self.order.fingerprint(),
            skipped=dict(self.skips.reasons),
        )

    def run_all(self) -> None:
        """Trains to the end, evaluating and saving on the way."""
        if rank() == 0:
            self.journal = Journal(self.run)
        if self.step == 0:
            self.skips.resume(0, {})
            self.skips.note(self.shard_set.faults, step=0)
        self.engine.train()
        remaining = self.total_steps - self.step
        self.window = _Window()
        data = self.recipe.data
        batches = load_batches(self._dataset(), data.workers, timeout_s=data.timeout_s)
        title = "Training" if rank() == 0 else None
        clock = StepClock(remaining_steps=remaining, batch_size=self.recipe.data.batch_size)
        with _bar(title, remaining) as advance:
            while self.step < self.total_steps:
                asked = time.monotonic()
                own = list(islice(batches, self.plan.micro_batches))
                self.window.waited_s += time.monotonic() - asked
                self._train_step(own)
                clock.tick()
                advance(1, note=self._note())
                if self._due(self.recipe.evaluation.every_epochs):
                    with self._pause():
                        self._evaluate()
                if self._saving_is_due() and self.step < self.total_steps:
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
            self.order,
            Decoder(
                preprocessing=loading,
                tokenizer=self.parts.tokenizer,
                captions=data.captions,
                positives=self.recipe.objective.positives,
                label_key=data.label_key,
                max_image_pixels=data.max_image_pixels,
                seed=self.recipe.seed,
                decode=data.decode,
                caption_key=data.caption_key,
            ),
            cache=data.shard_cache,
            pixel_cache_bytes=int(data.pixel_cache_gb * 1e9),
            batch_size=data.batch_size,
            micro_batch_size=data.micro_batch_size,
            rank=rank(),
            world_size=world_size(),
            epochs=self.recipe.schedule.epochs,
            start_step=self.step,
        )

    def _due(self, every_epochs: int) -> bool:
        if self.step == self.total_steps:
            return True
        return bool(every_epochs) and self.step % (self.steps_per_epoch * every_epochs) == 0

    def _saving_is_due(self) -> bool:
        config = self.recipe.checkpoint
        inside = bool(config.every_steps) and self.step % config.every_steps == 0
        return inside or self._due(config.every_epochs)

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
        self.skips.add(
            [one for skipped in gathered for one in skipped],
            step=self.step,
            seen=self.step * self.recipe.data.batch_size,
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
            if summary := self.skips.summary():
                _logger.warning("%s", summary)
            if self.journal:
                self.journal.close()

        on_first_rank(publish)


def _bar(title: str | None, total: int) -> AbstractContextManager[Advance]:
    if title is None:
        return nullcontext(lambda n=1, *, note=None: None)
    return progress(title, total, unit="steps")
