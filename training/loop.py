"""The training loop: from a recipe to a run folder.

RUN/config.yaml       the resolved recipe, below what was changed by a resumed run
RUN/metrics.jsonl     loss, rate, temperature, validation figures
RUN/skipped.jsonl     samples that could not be used, with the reason
RUN/checkpoints/      what --resume goes on from
RUN/mining/           the hard negatives in use, of an objective that mines them
RUN/tensorboard/
RUN/curves.png
RUN/locked/           the first phase, of a run with one for locked towers
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
from clipsys.background.captions import write_captions
from clipsys.errors import TrainingError
from clipsys.models.model_folders import set_place
from clipsys.progress import Advance, progress
from clipsys.training.agreement import agree_on_recipe
from clipsys.training.checkpoints import FOLDER, TrainState
from clipsys.training.data.captions import sample_training_captions
from clipsys.training.data.samples import Batch, Skipped
from clipsys.training.distributed.agreement import require_shared
from clipsys.training.distributed.collectives import gather_objects, on_first_rank, rank, world_size
from clipsys.training.distributed.process_group import start_processes
from clipsys.training.engine.config import EngineConfig
from clipsys.training.engine.schedule import lr_factor
from clipsys.training.journal import Journal, described, plot_curves
from clipsys.training.phases import LOCKED_FOLDER, locked_phase, unlocked_phase
from clipsys.training.plan import StepClock
from clipsys.training.precision import agrees
from clipsys.training.recipe import Recipe
from clipsys.training.resuming import Resumption, find_resumption, write_recipe
from clipsys.training.run import Run, build_run
from clipsys.training.step import StepFigures

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
    for phase in (recipe, *_phases(recipe)):
        phase.check_world(int(os.environ.get("WORLD_SIZE", "1")))
    device = start_processes(recipe.engine.device)
    recipe = agree_on_recipe(recipe)
    on_first_rank(lambda: _check_folder(recipe.run_folder, resume=resume))
    require_shared(recipe.run_folder)
    if recipe.unlock is None:
        _train_phase(recipe, recipe, device, resume=resume)
        return recipe.run_folder
    locked, unlocked = _phases(recipe)
    if on_first_rank((locked.run_folder / "model").is_dir):
        find_resumption(locked.run_folder, locked)  # refuses what must not have changed
        _logger.info("%s: the heads are trained already", locked.run_folder)
    else:
        begun = on_first_rank((locked.run_folder / "config.yaml").is_file)
        _logger.info("first phase: the heads of locked towers, in %s", locked.run_folder)
        _train_phase(locked, locked, device, resume=begun)
    begun = on_first_rank((recipe.run_folder / "config.yaml").is_file)
    _logger.info("second phase: blocks of the towers are unlocked")
    _train_phase(unlocked, recipe, device, resume=begun)
    return recipe.run_folder


def _phases(recipe: Recipe) -> tuple[Recipe, ...]:
    if recipe.unlock is None:
        return ()
    return locked_phase(recipe), unlocked_phase(recipe)


def _train_phase(recipe: Recipe, stated: Recipe, device: torch.device, *, resume: bool) -> None:
    """Trains one phase of a run.

    Args:
        recipe: what is carried out.
        stated: the recipe that it comes from, which is written down and compared.
        device: this rank's.
        resume: goes on from the last checkpoint.
    """
    folder = recipe.run_folder
    resumption = find_resumption(folder, stated) if resume else None
    settled = resumption.settle(recipe) if resumption else recipe
    run = build_run(settled, device, resumption.name if resumption else None)
    loop = TrainingLoop(run, stated)
    if resumption:
        loop.resume(resumption)
    elif resume:
        _logger.info("%s: no checkpoint yet, starting at the first step", folder)
    # Only now, when data and model are known to be usable, something is written.
    on_first_rank(lambda: write_recipe(folder, loop.stated, resumption))
    loop.train()


def _check_folder(run: Path, *, resume: bool) -> None:
    place = next(path for path in (run, *run.parents) if path.exists())
    if not place.is_dir():
        raise TrainingError(f"{run}: {place} is a file, not a folder; set output to another one")
    if not os.access(place, os.W_OK | os.X_OK):
        raise TrainingError(
            f"{run}: {place} may not be written to by this user; set output to another folder"
        )
    if resume:
        if (run / LOCKED_FOLDER / "config.yaml").is_file():
            return
        if not (run / "config.yaml").is_file() and (run / FOLDER).is_dir():
            raise TrainingError(
                f"{run}: config.yaml is missing, in which a run states its settings; put it back, "
                "or start a new run from the model (model.pretrained)"
            )
        if not (run / "config.yaml").is_file():
            raise TrainingError(f"{run}: there is no run to resume; start it without --resume")
        return
    if run.is_dir() and any(run.iterdir()):
        raise TrainingError(
            f"{run}: the run folder is not empty; go on with --resume, choose another folder "
            "(output=…) or remove it"
        )


@dataclass
class _Window:
    """Sums since the last line of metrics.jsonl."""

    started: float = field(default_factory=time.monotonic)
    loss: float = 0.0
    steps: int = 0
    waited_s: float = 0.0


class TrainingLoop:
    """Takes the steps of a run; evaluates, saves and writes down on the way."""

    def __init__(self, run: Run, stated: Recipe | None = None) -> None:
        """
        Args:
            run: the parts of the run.
            stated: the recipe that the run's own was made from; it is what is written down.
                None: its own.
        """
        self.run = run
        self.recipe = run.recipe
        #: With what was chosen at the start: precision and threads.
        stated = stated or run.recipe
        self.stated = stated.model_copy(update={"engine": _settled(stated, run.recipe)})
        self.step = 0
        self.figures: dict[str, float] = {}
        self._window = _Window()
        self._journal: Journal | None = None

    def resume(self, resumption: Resumption) -> None:
        """Goes back to a checkpoint.

        Raises:
            TrainingError: it has seen other samples.
        """
        state = self.run.checkpoints.load(self.run.engine, resumption.name, resumption.saved)
        _check_same_run(self.run.folder, state, self._state())
        if state.step > self.run.total_steps:
            raise TrainingError(
                f"{self.run.folder}: step {state.step} is done, and schedule.epochs "
                f"{self.recipe.schedule.epochs} ends at step {self.run.total_steps}; raise it"
            )
        self.step = state.step
        self.run.skips.resume(state.step, state.skipped)
        self.run.canaries.resume(state.canaries)
        if self.run.miner is not None:
            self.run.miner.resume(self.run.checkpoints.folder / resumption.name, state.step)
        _logger.info("resuming after step %d of %d", self.step, self.run.total_steps)
        if state.world_size != world_size():
            _logger.info(
                "%d process(es) instead of %d: the batches go on with the samples that they would "
                "have had; augmentation and dropout are drawn per process, so they differ",
                world_size(),
                state.world_size,
            )

    def _state(self) -> TrainState:
        return TrainState(
            step=self.step,
            steps_per_epoch=self.run.steps_per_epoch,
            batch_size=self.recipe.data.batch_size,
            world_size=world_size(),
            seed=self.recipe.seed,
            order=self.run.order.fingerprint(),
            skipped=dict(self.run.skips.reasons),
            shards=self.run.shard_set.name_fingerprint(),
            shard_sizes=self.run.shard_set.size_fingerprint(),
            canaries=self.run.canaries.state(),
        )

    def train(self) -> None:
        """Trains to the end."""
        run = self.run
        on_first_rank(self._open_journal)
        if self.step == 0:
            run.skips.resume(0, {})
            run.skips.note(run.shard_set.faults, step=0)
        run.engine.train()
        remaining = run.total_steps - self.step
        self._window = _Window()
        if self._mining_is_due():
            with self._pause():
                self._mine()
        batches = run.batches(self.step)
        title = "Training" if rank() == 0 else None
        clock = StepClock(remaining_steps=remaining, batch_size=self.recipe.data.batch_size)
        with _bar(title, remaining) as advance:
            while self.step < run.total_steps:
                asked = time.monotonic()
                own = list(islice(batches, run.plan.micro_batches))
                self._window.waited_s += time.monotonic() - asked
                if self.step == 0 and run.checks_precision:
                    self._check_precision(own[0])
                # In the precision that is trained in, so after that check.
                if run.canaries and not run.canaries.is_known():
                    with self._pause():
                        self._write_figures(self._canary_figures())
                self._train_step(own)
                clock.tick()
                advance(1, note=self._note())
                if self._due(self.recipe.evaluation.every_epochs):
                    with self._pause():
                        self._evaluate()
                # Before saving: a resumed run goes on with the list of its checkpoint.
                if self._mining_is_due():
                    batches.close()
                    with self._pause():
                        self._mine()
                    batches = run.batches(self.step)
                if self._saving_is_due() and self.step < run.total_steps:
                    with self._pause():
                        self._save()
        self._finish()

    def _open_journal(self) -> None:
        self._journal = Journal(self.run.folder)

    @contextmanager
    def _pause(self) -> Iterator[None]:
        """Keeps evaluation and saving out of the training rate."""
        paused = time.monotonic()
        yield
        self._window.started += time.monotonic() - paused

    def _due(self, every_epochs: int) -> bool:
        if self.step == self.run.total_steps:
            return True
        return bool(every_epochs) and self.step % (self.run.steps_per_epoch * every_epochs) == 0

    def _saving_is_due(self) -> bool:
        config = self.recipe.checkpoint
        inside = bool(config.every_steps) and self.step % config.every_steps == 0
        return inside or self._due(config.every_epochs)

    def _mining_is_due(self) -> bool:
        miner = self.run.miner
        return miner is not None and miner.is_due(self.step)

    def _mine(self) -> None:
        assert self.run.miner is not None
        figures = self.run.miner.mine(self.run.engine, self.step)
        if self._journal:
            self._journal.write(
                self.step, {f"mining/{name}": value for name, value in figures.items()}
            )

    def _train_step(self, batches: Sequence[Batch]) -> None:
        factor = lr_factor(self.step, self.run.total_steps, self.recipe.schedule)
        figures = self.run.step(batches, self.step, factor)
        self.step += 1
        self._window.loss += figures.loss
        self._window.steps += 1
        if figures.num_skipped:
            self._count_skipped([one for batch in batches for one in batch.skipped])
        if self.step % LOG_INTERVAL == 0 or self.step == self.run.total_steps:
            self._log(factor, figures)

    def _check_precision(self, batch: Batch) -> None:
        """Goes on in fp32 where the first loss in bf16 is another one."""
        exact, loss = self.run.step.losses_in(("fp32", "bf16"), batch, self.step)
        if agrees(loss, exact):
            _logger.info("precision: bf16 (first loss %.4f; %.4f in fp32)", loss, exact)
            return
        _logger.warning(
            "precision: fp32, not bf16 (the first loss is %.4f in bf16 and %.4f in fp32)",
            *(loss, exact),
        )
        self.run.engine.module.use_precision("fp32")
        engine = self.recipe.engine.model_copy(update={"precision": "fp32"})
        self.recipe = self.recipe.model_copy(update={"engine": engine})
        self.stated = self.stated.model_copy(update={"engine": _settled(self.stated, self.recipe)})
        on_first_rank(lambda: write_recipe(self.run.folder, self.stated, None))

    def _count_skipped(self, own: Sequence[Skipped]) -> None:
        gathered = gather_objects(own)
        self.run.skips.add(
            [one for skipped in gathered for one in skipped],
            step=self.step,
            seen=self.step * self.recipe.data.batch_size,
        )

    def _log(self, factor: float, figures: StepFigures) -> None:
        window = self._window
        elapsed = time.monotonic() - window.started
        self.figures = {
            "epoch": round(self.step / self.run.steps_per_epoch, 4),
            "loss": window.loss / window.steps,
            "lr": self.recipe.optimizer.lr * factor,
            **figures.scalars,
            "gradient_norm": figures.gradient_norm,
            **self.run.engine.scaling_figures(),
            "samples_per_s": window.steps * self.recipe.data.batch_size / elapsed,
            "data_wait_share": window.waited_s / elapsed,
        }
        if self._journal:
            self._journal.write(self.step, self.figures)
        self._window = _Window()

    def _note(self) -> str:
        if not self.figures:
            return ""
        return f"loss {self.figures['loss']:.3f}  epoch {self.figures['epoch']:.1f}"

    def _evaluate(self) -> None:
        figures: dict[str, float] = {}
        if self.run.validation:
            measured = self.run.validation.measure(self.run.engine)
            figures |= {f"val/{name}": value for name, value in measured.items()}
        if self.run.canaries:
            figures |= self._canary_figures()
        self._write_figures(figures)

    def _canary_figures(self) -> dict[str, float]:
        measured = self.run.canaries.measure(self.run.engine, self.step)
        return {f"canary/{name}": value for name, value in measured.items()}

    def _write_figures(self, figures: dict[str, float]) -> None:
        """What was measured beside the loss: into the journal and the log, on rank 0."""
        if not self._journal or not figures:
            return
        self._journal.write(self.step, figures)
        of_canaries = {
            name.removeprefix("canary/"): value
            for name, value in figures.items()
            if name.startswith("canary/")
        }
        texts = [
            *described(figures),
            *(f"canary {text}" for text in self.run.canaries.describe(of_canaries)),
        ]
        _logger.info("epoch %.3g: %s", self.step / self.run.steps_per_epoch, ", ".join(texts))
        self.run.canaries.warn(of_canaries)

    def _save(self) -> Path:
        return self.run.checkpoints.save(
            self.run.engine,
            self._state(),
            self.run.model,
            self._provenance(),
            {} if self.run.miner is None else self.run.miner.attachments(),
        )

    def _provenance(self) -> dict[str, Any]:
        return {
            "run": str(self.run.folder.resolve()),
            "step": self.step,
            "epochs": round(self.step / self.run.steps_per_epoch, 4),
            "clipsys": __version__,
            "recipe": self.stated.model_dump(mode="json"),
            **({"classes": list(self.run.classes)} if self.run.classes else {}),
        }

    def _finish(self) -> None:
        if not self.run.engine.num_applied_steps:
            raise TrainingError(
                f"{self.run.folder}: every one of the {self.step} steps was left out, because "
                "gradients overflow in fp16: nothing was learnt, and no model is written; use "
                "engine.precision bf16 or fp32, or train for longer"
            )
        checkpoint, run = self._save(), self.run.folder

        def publish() -> None:
            partial = run / ".model.partial"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(checkpoint / "model", partial)
            set_place(partial, run / "model")
            self._add_captions(partial)
            shutil.rmtree(run / "model", ignore_errors=True)
            partial.rename(run / "model")
            plot_curves(run, run / "curves.png")
            if summary := self.run.skips.summary():
                _logger.warning("%s", summary)
            if self._journal:
                self._journal.close()

        on_first_rank(publish)

    def _add_captions(self, folder: Path) -> None:
        """Puts a sample of the captions beside the model, which searches are judged by."""
        if self.run.objective.num_texts == 0:
            return
        captions = sample_training_captions(self.recipe.data, self.run.shard_set)
        if captions is not None:
            write_captions(folder, captions)


def _settled(stated: Recipe, carried_out: Recipe) -> EngineConfig:
    chosen = carried_out.engine
    return stated.engine.model_copy(
        update={"precision": chosen.precision, "threads": chosen.threads}
    )


def _check_same_run(run: Path, saved: TrainState, now: TrainState) -> None:
    """Refuses to go on with another number or order of samples."""
    if saved.steps_per_epoch != now.steps_per_epoch:
        raise TrainingError(
            f"{run}: an epoch had {saved.steps_per_epoch} steps, now it has "
            f"{now.steps_per_epoch}: the shards of data.train hold another number of samples; "
            "resume it as it was, or start a new run from its model (model.pretrained)"
        )
    shards_differ = saved.shards not in ("", now.shards) or (
        saved.shard_sizes and now.shard_sizes not in ("", saved.shard_sizes)
    )
    if saved.order not in ("", now.order) or shards_differ:
        raise TrainingError(
            f"{run}: the samples or their order have changed since the run was started "
            "(the shards of data.train, their names, sizes, order or weights, data.shuffle_shards, "
            "data.resampled or data.samples_per_epoch); resume it as it was, or start a new "
            "run from its model (model.pretrained)"
        )


def _bar(title: str | None, total: int) -> AbstractContextManager[Advance]:
    if title is None:
        return nullcontext(lambda n=1, *, note=None: None)
    return progress(title, total, unit="steps")
