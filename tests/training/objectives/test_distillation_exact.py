"""Distillation on real ranks, against one naive float64 process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from clipsys.config import load_settings
from clipsys.errors import ConfigError
from clipsys.training.losses import DistillationWeights, Pairs
from clipsys.training.model.outputs import State
from clipsys.training.model.teacher import TEACHER_IMAGE, TEACHER_TEXT
from clipsys.training.objectives.distillation import DistillationConfig
from clipsys.training.recipe import Recipe
from tests.training.losses.test_distilled import naive_distilled
from tests.training.objectives.exact import (
    SIZES,
    Case,
    Seen,
    Subject,
    all_cases,
    check_exact,
    check_resume,
    few_cases,
)


def _distillation(seen: Seen) -> tuple[torch.Tensor, State]:
    assert seen.inputs.teacher is not None and SIZES.teacher is not None
    settings = seen.settings
    image, text = (
        seen.clip.visual(seen.inputs.views[0]),
        seen.clip.encode_text(seen.inputs.texts[0]),
    )
    ours = Pairs(F.normalize(image, dim=1), F.normalize(text, dim=1))
    theirs = Pairs(*(seen.inputs.teacher[name].double() for name in (TEACHER_IMAGE, TEACHER_TEXT)))
    projected = theirs  # of no weight where there are no heads
    if len(seen.heads):
        projected = Pairs(
            F.normalize(seen.heads["image_to_teacher"](image), dim=1),
            F.normalize(seen.heads["text_to_teacher"](text), dim=1),
        )
    weights = DistillationWeights(
        settings.contrastive_weight,
        settings.feature_weight,
        settings.relational_weight,
        settings.interactive_weight,
    )
    loss = naive_distilled(
        *(ours, theirs, projected, seen.clip.logit_scale.exp().reshape(()), SIZES.teacher.scale),
        *(seen.labels.groups_B, weights),
    )
    return loss, seen.state


def _settings(**weights: Any) -> DistillationConfig:
    return DistillationConfig(teacher="any", **weights)


SUBJECTS = {
    # A weight of 20 at a width of 12 is about what 2,000 is at 1,024.
    "all terms": Subject(_settings(feature_weight=20.0), _distillation),
    "relations alone": Subject(
        _settings(contrastive_weight=0.0, feature_weight=0.0, interactive_weight=0.0),
        _distillation,
    ),
}


def test_two_ranks_at_each_stage_are_one_naive_process() -> None:
    check_exact(SUBJECTS, [*few_cases(["all terms"]), Case("relations alone", 3, 2)], 2)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_any_split_is_one_naive_process(world_size: int) -> None:
    check_exact(SUBJECTS, all_cases(list(SUBJECTS)), world_size)


def test_a_run_that_was_saved_goes_on_bit_for_bit(tmp_path: Path) -> None:
    check_resume(SUBJECTS, [Case("all terms", 1, 2)], tmp_path)


def test_settings_with_which_the_teacher_does_nothing_are_refused() -> None:
    recipe = {"data": {"train": "x.tar"}, "objective": {"name": "distillation", "teacher": "x"}}
    load_settings(Recipe, recipe)
    off = [f"objective.{name}_weight=0" for name in ("feature", "relational", "interactive")]
    with pytest.raises(ConfigError, match="are all 0, so that the teacher does nothing"):
        load_settings(Recipe, recipe, off)
    with pytest.raises(ConfigError, match=r"objective\.teacher is missing"):
        load_settings(Recipe, {**recipe, "objective": {"name": "distillation"}})
    with pytest.raises(ConfigError, match=r"model\.initial_logit_scale does nothing"):
        load_settings(
            Recipe,
            recipe,
            ["model.initial_logit_scale=2", "objective.contrastive_weight=0", *off[1:]],
        )
