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
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from clipsys import __version__
from clipsys.config import dump_settings
from clipsys.devices import choose_precision
from clipsys.errors import TrainingError
from clipsys.preprocessing import Preprocessing
from clipsys.progress import Advance, progress
from clipsys.training.augmentation import augment
from clipsys.training.checkpoints import Checkpoints, TrainState
from clipsys.training.data import TrainingBatches, open_shards, sample_order
from clipsys.training.distributed import gather_objects, on_first_rank, rank, world_size
from clipsys.training.engine import Engine, start_processes
from clipsys.training.journal import Journal, plot_curves
from clipsys.training.loader import load_batches
from clipsys.training.losses import info_nce
from clipsys.training.recipe import Recipe
from clipsys.training.samples import Batch, Decoder
from clipsys.training.schedule import lr_factor
from clipsys.training.skips import SkipLedger
from clipsys.training.towers import ContrastiveModel, initial_model
from clipsys.training.validation import Validation, normalisation

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
        self.parts = initial_model(recipe.model)
        self.shard_set = on_first_rank(lambda: open_shards(recipe.data))
        self.order = sample_order(recipe.data, self.shard_set, recipe.seed)
        self.steps_per_epoch = self.order.steps_per_epoch(recipe.data.batch_size)
        self.total_steps = self.steps_per_epoch * recipe.schedule.epochs
        self.validation = Validation(
            recipe.evaluation,
            recipe.data.validation,
            self.parts.preprocessing,
            self.parts.tokenizer,
        )
        precision = choose_precision(recipe.engine.precision, device)
        self.engine = Engine(
            ContrastiveModel(self.parts, precision=precision),
            config=recipe.engine,
            optimizer=recipe.optimizer,
            local_batch_size=recipe.data.batch_size // world_size(),
            device=device,
        )
        # The engine trains its own copy's parameters in place; this one is for export, so that
        # averaged or gathered weights never pass through the model that trains.
        self.export_parts = initial_model(recipe.model) if rank() == 0 else self.parts
        self.mean, self.std = normalisation(self.parts.preprocessing, device)
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
        self._announce(precision)

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
        batches = load_batches(self._dataset(), self.recipe.data.workers)
        title = "Training" if rank() == 0 else None
        with _bar(title, remaining) as advance:
            while self.step < self.total_steps:
                asked = time.monotonic()
                batch = next(batches)
                self.window.waited_s += time.monotonic() - asked
                self._train_step(batch)
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

    def _train_step(self, batch: Batch) -> None:
        # Dropout and augmentation are functions of seed, step and rank: a resumed run repeats them.
        own_seed = (self.recipe.seed * 1_000_003 + self.step) * 4096 + rank()
        torch.manual_seed(own_seed)
        image_BCHW = augment(
            batch.image_BCHW.to(self.device, non_blocking=True),
            self.recipe.augmentation,
            self.parts.preprocessing.size,
            self.mean,
            self.std,
            torch.Generator().manual_seed(own_seed),
        )
        features = self.engine.forward(
            image_BCHW, batch.tokens_BL.to(self.device, non_blocking=True)
        )
        loss = info_nce(
            *features,
            tile_size=self.recipe.objective.tile_size,
            groups=batch.groups_B.to(self.device),
        )
        value, num_skipped = self._share(loss, batch)
        factor = lr_factor(self.step, self.total_steps, self.recipe.schedule)
        gradient_norm = self.engine.update(loss, factor)
        self.step += 1
        self.window.loss += value
        self.window.steps += 1
        if num_skipped:
            self._count_skipped(batch)
        if self.step % LOG_INTERVAL == 0 or self.step == self.total_steps:
            self._log(factor, gradient_norm, float(features.logit_scale.detach()))

    def _share(self, loss: torch.Tensor, batch: Batch) -> tuple[float, int]:
        """The loss averaged over ranks, and how many samples all ranks had to skip.

        One collective for both: each one makes the ranks wait for the slowest. Every rank stops if
        any rank's loss is not finite.
        """
        totals = torch.stack([loss.detach(), loss.new_tensor(len(batch.skipped))])
        if world_size() > 1:
            dist.all_reduce(totals)
        value, num_skipped = float(totals[0]) / world_size(), int(totals[1].nan_to_num())
        if not math.isfinite(value):
            finite = gather_objects(math.isfinite(float(loss.detach())))
            culprit = finite.index(False) if False in finite else 0
            keys = gather_objects(batch.keys)[culprit]
            raise TrainingError(
                f"step {self.step}: the loss is not finite on rank {culprit} "
                f"(samples {', '.join(keys[:4])}, …); lower optimizer.lr or use engine.precision "
                "fp32; the last checkpoint is kept"
            )
        return value, num_skipped

    def _count_skipped(self, batch: Batch) -> None:
        gathered = gather_objects(batch.skipped)
        self.skips.add(
            [one for skipped in gathered for one in skipped],
            step=self.step,
            seen=self.step * self.recipe.data.batch_size,
        )

    def _log(self, factor: float, gradient_norm: float, logit_scale: float) -> None:
        window = self.window
        elapsed = time.monotonic() - window.started
        self.figures = {
            "epoch": round(self.step / self.steps_per_epoch, 4),
            "loss": window.loss / window.steps,
            "lr": self.recipe.optimizer.lr * factor,
            "logit_scale": logit_scale,
            "gradient_norm": gradient_norm,
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
