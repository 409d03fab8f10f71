"""The teacher of a run, where its objective has one."""

from __future__ import annotations

import logging
from typing import Any

import torch

from clipsys.models.open_clip_models import ModelParts
from clipsys.training.distributed.agreement import on_every_rank, require_equal
from clipsys.training.distributed.collectives import rank
from clipsys.training.model.teacher import Teacher, load_teacher
from clipsys.training.objectives import Objective
from clipsys.training.recipe import Recipe

_logger = logging.getLogger(__name__)


def begin_teacher(
    recipe: Recipe, objective: Objective[Any], model: ModelParts, device: torch.device
) -> Teacher | None:
    """The objective's teacher, the same on every rank; None where it has none."""
    spec = objective.teacher
    if spec is None:
        return None
    precision = recipe.engine.precision
    teacher = on_every_rank(lambda: Teacher(load_teacher(spec), device=device, precision=precision))
    require_equal(
        {"a teacher with the fingerprint": teacher.fingerprint},
        remedy="give every machine the same files of objective.teacher",
    )
    if rank() == 0:
        _announce(teacher, recipe, model)
    return teacher


def _announce(teacher: Teacher, recipe: Recipe, model: ModelParts) -> None:
    height, width = teacher.size
    _logger.info(
        "objective.teacher %s: %.1f M parameters, images of %d x %d px, vectors of width %d, "
        "scale %.1f",
        *(teacher.name, teacher.num_parameters / 1e6, height, width, *teacher.sizes),
    )
    side = recipe.data.load_size
    loaded = (side, side) if side else model.preprocessing.size
    if loaded[0] < height and loaded[1] < width:
        _logger.warning(
            "images are loaded with %d x %d px and enlarged to the teacher's %d x %d; with "
            "data.load_size %d it sees what they hold",
            *(*loaded, height, width, max(height, width)),
        )
