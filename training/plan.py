"""What a run is going to take, said before its first step.

Shapes: N pairs of a batch, D embedding width, T rows of a tile.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from torch import nn

from clipsys.training.engine.zero import bucket_elements, num_buckets
from clipsys.training.model.trained import MOMENTUM_PREFIX
from clipsys.training.recipe import Recipe

_logger = logging.getLogger(__name__)

#: Values of optimizer state per trained parameter.
_STATE_VALUES = {"adamw": 2, "lamb": 2, "lars": 1, "muon": 2, "sgd": 1}

#: Steps that are not timed: they compile, allocate and fill caches.
WARM_UP_STEPS = 2

#: A batch of more than this share of the data is warned of.
LARGEST_SHARE = 1 / 20


@dataclass(frozen=True)
class Plan:
    """The size of a run; bytes are those of one rank.

    Attributes:
        num_parameters: parameters of the model and its heads.
        num_trained: those that are not frozen.
        weights_bytes: parameters as they are kept for forward passes.
        gradients_bytes: at the end of a backward pass.
        optimizer_bytes: moments, and float32 masters where ZeRO or 16 bits need them.
        buckets_bytes: buckets in which gradients are exchanged.
        offloaded_bytes: part of all this that is in the host's memory instead of the GPU's.
        loss_bytes: gathered features, their gradients and the tiles of logits.
        images_bytes: decoded images of a step, in the host's memory.
        micro_batches: micro-batches that each rank computes in a step.
        warnings: what the user may not have meant.
    """

    num_parameters: int
    num_trained: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    buckets_bytes: int
    offloaded_bytes: int
    loss_bytes: int
    images_bytes: int
    micro_batches: int
    warnings: tuple[str, ...] = ()

    @property
    def model_bytes(self) -> int:
        """Everything on the device that grows with the model, but for activations."""
        held = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes
        return held + self.buckets_bytes - self.offloaded_bytes

    def __str__(self) -> str:
        frozen = self.num_parameters - self.num_trained
        parts = [
            f"{self.num_parameters / 1e6:.1f} M parameters"
            + (f", {frozen / 1e6:.1f} M of them locked" if frozen else ""),
            f"each process: {_size(self.model_bytes)} for weights, gradients, optimizer and "
            f"buckets ({_size(self.buckets_bytes)} of them), "
            + (
                f"{_size(self.offloaded_bytes)} offloaded to the host, "
                * bool(self.offloaded_bytes)
            )
            + f"{_size(self.loss_bytes)} for the loss, beside the activations of "
            + ("its share of the batch" if self.micro_batches == 1 else "a micro-batch"),
            (f"{_size(self.images_bytes)} of decoded images" if self.images_bytes else "no images")
            + (f" in {self.micro_batches} micro-batches" if self.micro_batches > 1 else ""),
        ]
        return "; ".join(parts)


def plan_run(
    recipe: Recipe,
    model: nn.Module,
    *,
    precision: str,
    world_size: int,
    num_samples: int,
    embed_dim: int,
    image_size: tuple[int, int],
    tile_size: int,
    num_frames: int = 1,
) -> Plan:
    """Works out what a run takes.

    Args:
        recipe: the run.
        model: before ZeRO partitions it.
        precision: what `choose_training_precision` chose: never ``auto``.
        world_size: number of ranks.
        num_samples: samples of the training data.
        embed_dim: D.
        image_size: (height, width) of the decoded images.
        tile_size: T.
        num_frames: images of a sample: more than one for windows of frames.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    copied = sum(p.numel() for n, p in model.named_parameters() if n.startswith(MOMENTUM_PREFIX))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    stage, batch = recipe.engine.zero_stage, recipe.data.batch_size
    width = 2 if precision in ("bf16_params", "fp16") else 4
    states = _STATE_VALUES[recipe.optimizer.name] * 4 * trained
    masters = 4 * trained if stage or width == 2 else 0
    share = batch // world_size
    # Momentum towers have weights, and masters of them where weights have 16 bits.
    weights = (width * parameters + (4 * copied if width == 2 else 0)) // (
        world_size if stage == 3 else 1
    )
    optimizer = (states + masters) // (world_size if stage else 1)
    engine = recipe.engine
    # ZeRO splits optimizer states (1), gradients too (2), weights too (3).
    return Plan(
        num_parameters=parameters - copied,
        num_trained=trained,
        weights_bytes=weights,
        gradients_bytes=width * trained // (world_size if stage >= 2 else 1),
        optimizer_bytes=optimizer,
        buckets_bytes=width * num_buckets(engine) * bucket_elements(engine, trained, width=width),
        offloaded_bytes=optimizer * engine.offload_optimizer + weights * engine.offload_parameters,
        loss_bytes=4 * batch * (4 * embed_dim + 2 * min(tile_size, share)),
        images_bytes=share * num_frames * 3 * image_size[0] * image_size[1],
        micro_batches=share // (recipe.data.micro_batch_size or share),
        warnings=tuple(_warnings(recipe, num_samples)),
    )


def _warnings(recipe: Recipe, num_samples: int) -> list[str]:
    batch, found = recipe.data.batch_size, []
    if batch > num_samples * LARGEST_SHARE:
        found.append(
            f"data.batch_size {batch:,} is more than a twentieth of the {num_samples:,} samples: "
            f"an epoch has only {max(1, num_samples // batch)} steps, and the same negatives come "
            "again and again; small data are usually learnt better in smaller batches"
        )
    if recipe.data.micro_batch_size and recipe.engine.precision in ("bf16_params", "fp16"):
        found.append(
            f"with engine.precision {recipe.engine.precision} DeepSpeed adds up the gradients of "
            "micro-batches in 16 bits; bf16 (autocast) adds them up in float32"
        )
    return found


def _size(size_bytes: float) -> str:
    if size_bytes >= 1e9:
        return f"{size_bytes / 1e9:.1f} GB"
    return f"{max(1, round(size_bytes / 1e6))} MB"


class StepClock:
    """Times the first steps of a run and says how long the rest will take."""

    def __init__(self, *, remaining_steps: int, batch_size: int) -> None:
        self._left = remaining_steps
        self._batch_size = batch_size
        self._steps = 0
        self._started = 0.0

    def tick(self) -> None:
        """After each step. Logs once, when a step after the warm-up has ended."""
        self._steps += 1
        if self._steps == WARM_UP_STEPS:
            self._started = time.monotonic()
        elif self._steps == WARM_UP_STEPS + 1:
            step_s = time.monotonic() - self._started
            _logger.info(
                "a step takes %.2f s (%.0f samples/s): about %s for %s steps",
                step_s,
                self._batch_size / step_s,
                duration(step_s * (self._left - self._steps)),
                f"{self._left - self._steps:,}",
            )


def duration(seconds: float) -> str:
    """Seconds as people say them: 40 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(0.0, seconds):.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
