"""Objectives over texts alone, on real ranks, against one naive float64 process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clipsys.config import load_settings
from clipsys.errors import ConfigError
from clipsys.training.model.outputs import State
from clipsys.training.objectives.scl import SCLConfig
from clipsys.training.recipe import Recipe
from tests.training.losses.test_classified import naive_scl
from tests.training.objectives.exact import (
    Case,
    Seen,
    Subject,
    all_cases,
    check_exact,
    check_resume,
    few_cases,
)


def _scl(seen: Seen) -> tuple[torch.Tensor, State]:
    features = seen.clip.encode_text(seen.inputs.texts[0])
    logits = seen.heads["classifier"](features)
    weight = seen.settings.weight
    temperature = seen.temperature() if weight else 1.0
    assert seen.labels.classes_B is not None
    return naive_scl(logits, features, seen.labels.classes_B, weight, temperature), seen.state


_SUBJECTS = {
    "scl": Subject(SCLConfig(), _scl),
    "scl, learned temperature": Subject(SCLConfig(weight=0.5, learn_temperature=True), _scl),
    "cross-entropy": Subject(SCLConfig(weight=0), _scl),
}


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_split_is_exact(world_size: int) -> None:
    cases = few_cases(list(_SUBJECTS))
    check_exact(_SUBJECTS, cases if world_size == 2 else cases[::5], world_size)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_whole_matrix_is_exact(world_size: int) -> None:
    check_exact(_SUBJECTS, all_cases(list(_SUBJECTS)), world_size)


def test_a_loaded_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    check_resume(_SUBJECTS, [Case("scl, learned temperature", 2, 2, "adamw")], tmp_path)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"batch_size": 1}}, "scl nothing to contrast; raise it, or set objective.weight"),
        ({"objective": {"weight": 0, "temperature": 0.1}}, "temperature does nothing while weight"),
        ({"objective": {"weight": 0, "learn_temperature": True}}, "learn_temperature does nothing"),
        ({"objective": {"weight": 1}}, "less than 1"),
        ({"augmentation": {"flip": 0.5}}, "augmentation does nothing for objective.name scl"),
        ({"evaluation": {"match": "k"}, "data": {"validation": "v"}}, "evaluation.match does noth"),
        ({"evaluation": {"classifier": True}}, "classifier does nothing without data.validation"),
        (
            {"objective": {"name": "simclr"}, "evaluation": {"classifier": True}},
            "simclr, which trains no classifier; leave it out",
        ),
        (
            {"objective": {"name": "simclr"}, "data": {"label_noise": 0.1}},
            "data.label_noise does nothing for objective.name simclr",
        ),
        ({"data": {"subset_seed": 1}}, "subset_seed does nothing without data.num_samples or"),
        (
            {
                "data": {
                    "num_samples": 9, "resampled": True, "train": [{"shards": "x", "weight": 1}],
                }
            },
            "data.num_samples draws from all sources alike",
        ),
    ],
)  # fmt: skip
def test_settings_that_would_do_nothing_are_refused(sections: dict[str, Any], message: str) -> None:
    objective = {"name": "scl", **sections.get("objective", {})}
    data = {"train": "x", "batch_size": 8, **sections.get("data", {})}
    with pytest.raises(ConfigError, match=message):
        load_settings(Recipe, {**sections, "objective": objective, "data": data})


def test_a_batch_of_one_is_enough_for_cross_entropy() -> None:
    recipe = {"objective": {"name": "scl", "weight": 0}, "data": {"train": "x", "batch_size": 1}}
    assert load_settings(Recipe, recipe).data.batch_size == 1
