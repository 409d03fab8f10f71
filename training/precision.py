"""The precision of a run: set, recorded by its first start, or measured; and the first loss.

``auto`` on a CPU is decided by the model's own products, forward and backward
(`clipsys.probe.probing`), on rank 0, for all ranks. The choice stands in RUN/config.yaml, so that a
run that is resumed computes as it did, bit for bit, on whatever machine. The first loss in bf16 is
compared with that in fp32; where they differ the run takes fp32.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
import yaml

from clipsys.errors import ConfigError
from clipsys.models.devices import choose_by_device
from clipsys.models.open_clip_models import ModelParts
from clipsys.probe.probing import Work, probe, signature, usual_threads
from clipsys.probe.products import Product, record
from clipsys.training.distributed.collectives import on_first_rank, world_size
from clipsys.training.objectives import make_objective
from clipsys.training.recipe import Recipe

_logger = logging.getLogger(__name__)

#: How far the first loss in bf16 may be from that in fp32, relative to it and beside that. With
#: random weights they differ by less than a thousandth; with trained ones and a scale of 100 an
#: error of 0.004 in a cosine moves a logit by 0.4, and a loss near 0 by some hundredths.
LOSS_TOLERANCE, LOSS_MARGIN = 0.02, 0.05


def choose_training_precision(recipe: Recipe, model: ModelParts, device: torch.device) -> Recipe:
    """The recipe with the precision and threads of the run; every rank of the group calls it.

    Also sets the number of torch's threads. What the recipe says is never measured; where the run
    folder has a recipe already, the run is being resumed and goes on with what stands there.

    Args:
        recipe: the recipe, whose `engine.precision` may be ``auto``.
        model: with whole weights, before ZeRO partitions them.
        device: this rank's.

    Raises:
        ConfigError: the device cannot compute in the requested precision.
    """
    precision: str = recipe.engine.precision
    recorded = on_first_rank(lambda: _recorded(recipe))
    threads = recipe.engine.threads or recorded.get("threads")
    if precision == "auto" and recorded:
        precision = _as_before(recorded, device)
    elif precision == "auto":
        precision, measured = _decide(recipe, model, device)
        threads = threads or measured
    _check_possible(precision, device)
    if device.type == "cpu":
        torch.set_num_threads(threads or usual_threads())
    engine = recipe.engine.model_copy(update={"precision": precision, "threads": threads})
    return recipe.model_copy(update={"engine": engine})


def _decide(recipe: Recipe, model: ModelParts, device: torch.device) -> tuple[str, int | None]:
    """What ``auto`` is, and the number of threads if it is another one than usual."""
    if device.type != "cpu":
        precision, reason = _by_device(device)
        _logger.info("precision: %s (%s)", precision, reason)
        return precision, None
    return on_first_rank(lambda: _measured(recipe, model))


def _measured(recipe: Recipe, model: ModelParts) -> tuple[str, int | None]:
    figures = probe(training_work(recipe, model))
    if figures is None:
        return "fp32", None
    threads = figures.arrangement.threads
    return figures.precision, None if threads == usual_threads() else threads


def _recorded(recipe: Recipe) -> dict[str, Any]:
    """The section ``engine`` of the run that is being resumed; empty for a new run."""
    path = recipe.run_folder / "config.yaml"
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        return dict(document.get("engine", {}))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{path}: the recipe of the run cannot be read ({reason}); state engine.precision to "
            "resume without it"
        ) from error


def _as_before(recorded: dict[str, Any], device: torch.device) -> str:
    precision = str(recorded.get("precision", "auto"))
    if precision == "auto":  # clipsys 0.1 decided by flags, and did not record what it chose
        precision = _by_device(device)[0]
        if device.type == "cpu":
            precision = "bf16" if torch.cpu._is_amx_tile_supported() else "fp32"
    _logger.info("precision: %s (as the run was started)", precision)
    return precision


def _by_device(device: torch.device) -> tuple[str, str]:
    """What a GPU trains in, and the reason in words."""
    precision, reason = choose_by_device(device)
    return ("fp16" if device.type == "cuda" and precision == "fp32" else precision), reason


def _check_possible(precision: str, device: torch.device) -> None:
    if (
        precision == "fp16"
        and device.type == "cpu"
        and not torch.ops.mkldnn._is_mkldnn_fp16_supported()
    ):
        raise ConfigError("engine.precision fp16: this processor cannot compute in fp16; use fp32")


def training_work(recipe: Recipe, model: ModelParts) -> Work:
    """What a step of this run computes over and over on each rank."""
    share = recipe.data.batch_size // world_size()
    rows = recipe.data.micro_batch_size or share
    objective = make_objective(recipe.objective)
    images = (rows * len(objective.views(recipe.augmentation)), 3, *model.preprocessing.size)
    texts = tuple(model.tokenizer([""]).shape[1:]) if objective.num_texts else ()

    def products() -> tuple[Product, ...]:
        image = record(model.model, lambda same: same.encode_image(_empty(images)))
        if not objective.num_texts:
            return image
        tokens = torch.empty(rows, *texts, dtype=torch.int64, device="meta")
        return image + record(model.model, lambda same: same.encode_text(tokens))

    return Work(
        name="this recipe's steps",
        signature=signature(model.model, images, texts),
        products=products,
        trains=True,
        channels_last=recipe.engine.channels_last,
    )


def _empty(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def agrees(loss: float, exact: float) -> bool:
    """Whether a loss is near enough to that in fp32; one that is NaN or infinite is not."""
    return math.isfinite(exact) and abs(loss - exact) <= LOSS_TOLERANCE * abs(exact) + LOSS_MARGIN
