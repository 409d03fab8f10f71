"""One step of a run: from decoded micro-batches to an update of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from pydantic import Field, PositiveInt

from clipsys.config import Settings
from clipsys.errors import TrainingError
from clipsys.images.preprocessing import Preprocessing
from clipsys.training.data.augmentation import AugmentationConfig, augment, normalisation
from clipsys.training.data.order import step_seed
from clipsys.training.data.samples import Batch, Positives
from clipsys.training.distributed.collectives import gather_objects, rank, world_size
from clipsys.training.engine.deepspeed_engine import Engine, Inputs
from clipsys.training.losses import info_nce, sigmoid_loss
from clipsys.training.model.towers import Features


class ObjectiveConfig(Settings):
    """What is minimised."""

    loss: Literal["infonce", "sigmoid"] = Field(
        "infonce", description="softmax over all pairs (CLIP) or a decision for each (SigLIP)"
    )
    positives: Positives = Field(
        "image",
        description="which samples are positives of each other: none but the pair, equal images, "
        "equal captions or equal labels",
    )
    duplicates: Literal["attract", "ignore"] = Field(
        "attract",
        description="what such samples are to each other: positives too, or left out of the "
        "negatives",
    )
    tile_size: PositiveInt | None = Field(
        None, description="rows of logits held at once; default what suits the device"
    )


@dataclass(frozen=True)
class StepFigures:
    """What a step measured, over all ranks.

    Attributes:
        loss: of the whole batch, before the update.
        logit_scale: that the loss was taken at.
        gradient_norm: global, before clipping.
        num_skipped: samples that could not be used.
    """

    loss: float
    logit_scale: float
    gradient_norm: float
    num_skipped: int


class TrainingStep:
    """Carries out steps with an engine."""

    def __init__(
        self,
        engine: Engine,
        preprocessing: Preprocessing,
        *,
        objective: ObjectiveConfig,
        augmentation: AugmentationConfig,
        tile_size: int,
        seed: int,
    ) -> None:
        self._engine = engine
        self._objective = objective
        self._augmentation = augmentation
        self._seed = seed
        self._size = preprocessing.size
        self._mean, self._std = normalisation(preprocessing, engine.device)
        self._tile_size = tile_size

    def __call__(self, batches: Sequence[Batch], step: int, lr_factor: float) -> StepFigures:
        """Trains on the micro-batches of a step (0-based). Every rank calls it.

        Raises:
            TrainingError: the loss is not finite; weights and checkpoints are as they were.
        """
        inputs = self._seeded_inputs(batches, step)
        groups_B = torch.cat([batch.groups_B for batch in batches]).to(self._engine.device)
        loss = objective(self._objective, groups_B, self._tile_size)
        share, logit_scale = self._engine.accumulate(inputs, loss)
        value, num_skipped = self._over_ranks(share, batches, step)
        norm = self._engine.update(lr_factor)
        return StepFigures(value, logit_scale, norm, num_skipped)

    def losses_in(self, precisions: Sequence[str], batch: Batch, step: int) -> list[float]:
        """Loss of one micro-batch over all ranks in fp32 or bf16, without an update.

        Every rank calls it. `__call__` draws the same random numbers afterwards.
        """
        losses = []
        loss = objective(self._objective, batch.groups_B.to(self._engine.device), self._tile_size)
        for precision in precisions:
            (inputs,) = self._seeded_inputs([batch], step)
            share = self._engine.loss_in(precision, inputs, loss)
            if world_size() > 1:
                dist.all_reduce(share)
            losses.append(float(share) / world_size())
        return losses

    def _seeded_inputs(self, batches: Sequence[Batch], step: int) -> list[Inputs]:
        # Augmentation and dropout are functions of seed, step and rank: a resumed run repeats them.
        seed = step_seed(self._seed, step, rank())
        torch.manual_seed(seed)
        return [
            self._inputs(batch, (seed * 65_537 + number) % (1 << 63))
            for number, batch in enumerate(batches)
        ]

    def _inputs(self, batch: Batch, seed: int) -> Inputs:
        def make() -> tuple[torch.Tensor, torch.Tensor]:
            image_BCHW = augment(
                batch.image_BCHW.to(self._engine.device, non_blocking=True),
                self._augmentation,
                self._size,
                self._mean,
                self._std,
                torch.Generator().manual_seed(seed),
            )
            return image_BCHW, batch.tokens_BL.to(self._engine.device, non_blocking=True)

        return make

    def _over_ranks(
        self, share: torch.Tensor, batches: Sequence[Batch], step: int
    ) -> tuple[float, int]:
        """The loss averaged over ranks, and how many samples all ranks had to skip.

        One collective for both: each one makes the ranks wait for the slowest. Every rank stops if
        any rank's loss is not finite.
        """
        skipped = sum(len(batch.skipped) for batch in batches)
        totals = torch.stack([share, share.new_tensor(skipped)])
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
        return value, int(totals[1])


def objective(
    config: ObjectiveConfig, groups_B: torch.Tensor | None, tile_size: int
) -> Callable[[Features], torch.Tensor]:
    """The loss that a recipe names, as a function of this rank's features."""
    ignore = config.duplicates == "ignore"

    def loss(features: Features) -> torch.Tensor:
        if config.loss == "infonce":
            return info_nce(
                features.image_BD,
                features.text_BD,
                features.logit_scale,
                tile_size,
                groups_B,
                ignore_groups=ignore,
            )
        assert features.logit_bias is not None, "initial_model gives the sigmoid loss its bias"
        return sigmoid_loss(
            features.image_BD,
            features.text_BD,
            features.logit_scale,
            features.logit_bias,
            tile_size,
            groups_B,
            ignore_groups=ignore,
        )

    return loss
