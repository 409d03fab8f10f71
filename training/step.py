"""One step of a run: from decoded micro-batches to an update of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from clipsys.errors import TrainingError
from clipsys.images.preprocessing import Preprocessing
from clipsys.training.data.augmentation import (
    AugmentationConfig,
    Shared,
    augment,
    normalisation,
)
from clipsys.training.data.order import step_seed
from clipsys.training.data.samples import Batch
from clipsys.training.distributed.collectives import gather_objects, rank, world_size
from clipsys.training.engine.deepspeed_engine import Engine, Loss, MakeInputs
from clipsys.training.engine.gradient_check import NonFiniteGradientError
from clipsys.training.features.taught import StoredTeacher
from clipsys.training.model.outputs import Inputs, Outputs, Rows, State
from clipsys.training.model.teacher import Teacher
from clipsys.training.objectives import Labels, Objective

#: Apart from each other for the seeds of views; the first view's share is 0.
_VIEW_STRIDE = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class StepFigures:
    """What a step measured, over all ranks.

    Attributes:
        loss: loss of the whole batch, before the update.
        scalars: values that the loss was computed with, by name: ``logit_scale``, ``logit_bias``,
            and what the objective measures besides: ``accuracy``.
        gradient_norm: global, before clipping.
        num_skipped: samples that could not be used.
    """

    loss: float
    scalars: dict[str, float]
    gradient_norm: float
    num_skipped: int


class TrainingStep:
    """Carries out steps with an engine."""

    def __init__(
        self,
        engine: Engine,
        preprocessing: Preprocessing,
        *,
        objective: Objective[Any],
        augmentation: AugmentationConfig,
        seed: int,
        teacher: Teacher | StoredTeacher | None = None,
    ) -> None:
        self._engine = engine
        self._objective = objective
        self._views = objective.views(augmentation)
        self._seed = seed
        self._size = preprocessing.size
        self._mean, self._std = normalisation(preprocessing, engine.device)
        self._teacher = teacher

    def __call__(self, batches: Sequence[Batch], step: int, lr_factor: float) -> StepFigures:
        """Trains on the micro-batches of a step (0-based). Every rank calls it.

        Raises:
            TrainingError: the loss or a gradient is not finite; weights and checkpoints are as
                they were.
        """
        inputs = self._seeded_inputs(batches, step)
        measured: dict[str, torch.Tensor] = {}
        found = self._engine.accumulate(inputs, self._loss(batches, measured))
        value, num_skipped, figures = self._over_ranks(found.loss, measured, batches, step)
        try:
            norm = self._engine.update(lr_factor)
        except NonFiniteGradientError as error:
            raise TrainingError(
                f"step {step}: {error}, while the loss is; lower optimizer.lr or use "
                "engine.precision fp32; the last checkpoint is kept"
            ) from error
        scalars = {name: float(one) for name, one in found.shared.items() if one.numel() == 1}
        return StepFigures(value, scalars | figures, norm, num_skipped)

    def losses_in(self, precisions: Sequence[str], batch: Batch, step: int) -> list[float]:
        """Loss of one micro-batch over all ranks in fp32 or bf16, without an update.

        Every rank calls it. `__call__` draws the same random numbers afterwards.
        """
        losses, loss = [], self._loss([batch], {})
        for precision in precisions:
            (inputs,) = self._seeded_inputs([batch], step)
            share = self._engine.loss_in(precision, inputs, loss)
            if world_size() > 1:
                dist.all_reduce(share)
            losses.append(float(share) / world_size())
        return losses

    def _loss(self, batches: Sequence[Batch], measured: dict[str, torch.Tensor]) -> Loss:
        """The objective's loss; each call puts what else it measures into ``measured``."""
        labels = Labels(
            self._joined([batch.groups_B for batch in batches]),
            self._joined([batch.samples_B for batch in batches]),
            self._joined([batch.classes_B for batch in batches]),
            self._joined([batch.present_BT for batch in batches]),
            self._joined([batch.further_groups_BT for batch in batches]),
        )

        def loss(outputs: Outputs, targets: Rows, state: State) -> tuple[torch.Tensor, State]:
            with torch.no_grad():
                measured.update(self._objective.figures(outputs, targets, labels, state))
            return self._objective.loss(outputs, targets, labels, state)

        return loss

    def _joined(self, parts: Sequence[torch.Tensor | None]) -> Any:
        present = [part for part in parts if part is not None]
        return torch.cat(present).to(self._engine.device) if present else None

    def _seeded_inputs(self, batches: Sequence[Batch], step: int) -> list[MakeInputs]:
        # Augmentation and dropout are functions of seed, step and rank: a resumed run repeats them.
        seed = step_seed(self._seed, step, rank())
        torch.manual_seed(seed)
        return [
            self._made_of(batch, seed * 65_537 + number) for number, batch in enumerate(batches)
        ]

    def _made_of(self, batch: Batch, seed: int) -> MakeInputs:
        """Makes a micro-batch's inputs; what a teacher says of it is asked for once."""
        if self._teacher is None:
            return partial(self._inputs, batch, seed)
        said: list[Rows] = []

        def make() -> Inputs:
            if not said:
                said.append(self._taught(batch, seed))
            return self._inputs(batch, seed)._replace(teacher=said[0])

        return make

    def _taught(self, batch: Batch, seed: int) -> Rows:
        """The teacher's vectors of the first view, drawn as for the student, and of the text."""
        teacher, view, device = self._teacher, self._views[0], self._engine.device
        if isinstance(teacher, StoredTeacher):
            return {name: rows.to(device) for name, rows in teacher.rows(batch).items()}
        assert teacher is not None and batch.teacher_BL is not None
        assert batch.image_BCHW is not None
        image_BCHW = augment(
            batch.image_BCHW.to(device, non_blocking=True),
            view.augmentation,
            teacher.size,
            *teacher.normalisation,
            _generator(seed, 0),
            drawn_for=view.size or self._size,
        )
        return teacher.rows(image_BCHW, batch.teacher_BL.to(device, non_blocking=True))

    def _inputs(self, batch: Batch, seed: int) -> Inputs:
        """What a micro-batch shows to the towers: the same for the same seed."""
        device = self._engine.device
        if batch.is_encoded:
            assert batch.image_BCHW is not None
            moved = [one.to(device, non_blocking=True) for one in (batch.image_BCHW, *batch.texts)]
            image, *rest = [one.float() if one.is_floating_point() else one for one in moved]
            return Inputs((image,), tuple(rest))
        texts = tuple(tokens_BL.to(device, non_blocking=True) for tokens_BL in batch.texts)
        seeds_B = torch.randint(1 << 62, (len(batch.keys),), generator=_generator(seed, -1))
        if batch.image_BCHW is None:
            return Inputs((), texts, seeds_B.to(device))
        pixels_BCHW = batch.image_BCHW.to(device, non_blocking=True)
        # Frames of a row lie side by side.
        frames = pixels_BCHW.view(len(batch.keys), -1, *pixels_BCHW.shape[1:]).unbind(1)
        views = tuple(
            augment(
                frames[view.frame],
                view.augmentation,
                view.size or self._size,
                self._mean,
                self._std,
                self._drawn_from(batch, seed, number),
                Shared(_generator(seed, 0), view.shares) if view.shares else None,
            )
            for number, view in enumerate(self._views)
        )
        return Inputs(views, texts, seeds_B.to(device))

    def _drawn_from(
        self, batch: Batch, seed: int, number: int
    ) -> torch.Generator | list[torch.Generator]:
        """The random numbers of a view; those of the first one are a stored teacher's."""
        if isinstance(self._teacher, StoredTeacher) and number == 0:
            return self._teacher.generators(batch)
        return _generator(seed, number)

    def _over_ranks(
        self,
        share: torch.Tensor,
        measured: dict[str, torch.Tensor],
        batches: Sequence[Batch],
        step: int,
    ) -> tuple[float, int, dict[str, float]]:
        """The loss and other figures averaged over ranks, and how many samples were skipped.

        One collective for all: each one makes the ranks wait for the slowest. Every rank stops if
        any rank's loss is not finite.
        """
        skipped = sum(len(batch.skipped) for batch in batches)
        figures = [one.to(share) for one in measured.values()]
        totals = torch.stack([share, share.new_tensor(skipped), *figures])
        if world_size() > 1:
            dist.all_reduce(totals)
        value = float(totals[0]) / world_size()
        if not math.isfinite(value):
            finite = gather_objects(math.isfinite(float(share)))
            culprit = finite.index(False) if False in finite else 0
            keys = gather_objects([one for batch in batches for one in batch.places])[culprit]
            raise TrainingError(
                f"step {step}: the loss is not finite on rank {culprit} "
                f"(samples {', '.join(keys[:4])}, …); lower optimizer.lr or use engine.precision "
                "fp32; the last checkpoint is kept"
            )
        means = (float(total) / world_size() for total in totals[2:])
        return value, int(totals[1]), dict(zip(measured, means, strict=True))


def _generator(seed: int, stream: int) -> torch.Generator:
    """One of the independent streams of a micro-batch: a view's, or -1 for an objective's own."""
    return torch.Generator().manual_seed((seed + stream * _VIEW_STRIDE) % (1 << 63))
