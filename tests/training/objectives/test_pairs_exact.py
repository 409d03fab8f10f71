"""Triplets, margins, N-pair and NCE on real ranks, against one naive float64 process."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from clipsys.config import load_settings
from clipsys.errors import ConfigError
from clipsys.training.model.outputs import State
from clipsys.training.objectives.margin import MarginConfig
from clipsys.training.objectives.n_pair import NPairConfig
from clipsys.training.objectives.nce import NCEConfig
from clipsys.training.objectives.triplet import TripletConfig
from clipsys.training.recipe import Recipe
from tests.training.losses.test_metric import naive_margin, naive_triplet
from tests.training.losses.test_n_pairs import naive_n_pair
from tests.training.losses.test_noise_contrastive import (
    naive_info_nce_views,
    naive_logistic,
    naive_nce,
)
from tests.training.objectives.exact import (
    HEAD,
    Case,
    Seen,
    Subject,
    all_cases,
    check_exact,
    check_resume,
    few_cases,
)


def _projected(seen: Seen) -> list[torch.Tensor]:
    return [seen.heads["projection"](seen.clip.visual(view)) for view in seen.inputs.views]


def _rows(seen: Seen) -> tuple[torch.Tensor, torch.Tensor]:
    """All views below one another, with their labels."""
    return torch.cat(_projected(seen)), seen.labels.groups_B.repeat(len(seen.inputs.views))


def _triplet(seen: Seen) -> tuple[torch.Tensor, State]:
    rows, labels = _rows(seen)
    settings = seen.settings
    loss = naive_triplet(F.normalize(rows, dim=-1), labels, settings.margin, settings.mining)
    return loss, seen.state


def _margin(seen: Seen) -> tuple[torch.Tensor, State]:
    rows, labels = _rows(seen)
    if seen.settings.unit_norm:
        rows = F.normalize(rows, dim=-1)
    return naive_margin(rows, labels, seen.settings.margin), seen.state


def _n_pair(seen: Seen) -> tuple[torch.Tensor, State]:
    labels = seen.labels.groups_B if seen.settings.positives == "label" else None
    first, second = _projected(seen)
    return naive_n_pair(first, second, seen.settings.l2, labels), seen.state


def _nce(seen: Seen) -> tuple[torch.Tensor, State]:
    settings = seen.settings
    groups = seen.labels.groups_B if settings.positives == "label" else None
    first, second = (F.normalize(rows, dim=-1) for rows in _projected(seen))
    if settings.form == "infonce":
        loss = naive_info_nce_views(first, second, seen.temperature(), groups)
    elif settings.form == "logistic":
        loss = naive_logistic(first, second, seen.temperature(), groups)
    else:
        log_z: Any = settings.log_normalizer
        if log_z is None:
            log_z = math.log(settings.num_outcomes or 11)
        if settings.learn_normalizer:
            log_z = log_z + seen.heads["normalizer"].offset
        loss = naive_nce(first, second, seen.temperature(), log_z, settings.num_outcomes, groups)
    return loss, seen.state


_SUBJECTS = {
    "triplet": Subject(TripletConfig(**HEAD, num_views=2), _triplet),
    "triplet, all, one view": Subject(TripletConfig(**HEAD, mining="all", margin=0.7), _triplet),
    "triplet, hard": Subject(TripletConfig(**HEAD, mining="hard"), _triplet),
    "margin": Subject(MarginConfig(**HEAD), _margin),
    "margin, three views, any length": Subject(
        MarginConfig(**HEAD, num_views=3, unit_norm=False, margin=2.0), _margin
    ),
    "n_pair": Subject(NPairConfig(**HEAD), _n_pair),
    "n_pair of views": Subject(NPairConfig(**HEAD, positives="pair", l2=0.1), _n_pair),
    "nce": Subject(NCEConfig(**HEAD, learn_temperature=True), _nce),
    "nce, fixed normaliser": Subject(
        NCEConfig(**HEAD, learn_normalizer=False, log_normalizer=3.0, num_outcomes=90), _nce
    ),
    "logistic": Subject(NCEConfig(**HEAD, form="logistic", learn_temperature=True), _nce),
    "infonce": Subject(
        NCEConfig(**HEAD, form="infonce", positives="label", learn_temperature=True), _nce
    ),
}
_NAMES = list(_SUBJECTS)
#: Every subject once, every stage twice or more.
_THIN = [
    Case(name, number % 4, 1 + number % 2, ("sgd", "adamw")[number // 4 % 2])
    for number, name in enumerate(_NAMES)
]


def test_loss_gradients_and_weights_are_exact_on_two_ranks() -> None:
    check_exact(_SUBJECTS, _THIN, 2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("world_size", "cases"),
    [(1, few_cases(_NAMES)), (2, all_cases(_NAMES)), (3, few_cases(_NAMES))],
)
def test_the_whole_matrix_is_exact(world_size: int, cases: list[Case]) -> None:
    check_exact(_SUBJECTS, cases, world_size)


def test_a_learned_normaliser_resumes_bit_for_bit(tmp_path: Path) -> None:
    check_resume(_SUBJECTS, [Case("nce", 1, 2), Case("nce", 3, precision="bf16_params")], tmp_path)


@pytest.mark.parametrize(
    ("objective", "data", "message"),
    [
        ({"name": "triplet"}, {"batch_size": 1}, "objective.name triplet no negatives; raise it"),
        ({"name": "margin"}, {"batch_size": 1}, "objective.name margin no negatives; raise it"),
        ({"name": "n_pair"}, {"batch_size": 1}, "objective.name n_pair no negatives; raise it"),
        ({"name": "nce"}, {"batch_size": 1}, "objective.name nce no negatives; raise it"),
        ({"name": "triplet", "temperature": 1}, {}, "objective.temperature is not a setting"),
        ({"name": "triplet", "margin": 0}, {}, "objective.margin is 0; .* greater than 0"),
        ({"name": "n_pair", "positives": "pair"}, {"label_key": "k"}, "data.label_key is 'k'"),
        (
            {"name": "nce", "form": "logistic", "log_normalizer": 1.0},
            {},
            "log_normalizer does nothing while form is logistic; leave it out",
        ),
        (
            {"name": "nce", "form": "infonce", "learn_normalizer": False},
            {},
            "learn_normalizer does nothing while form is infonce; leave it out",
        ),
    ],
)
def test_settings_that_would_do_nothing_are_refused(
    objective: dict[str, Any], data: dict[str, Any], message: str
) -> None:
    sections = {"objective": objective, "data": {"train": "x", "batch_size": 8, **data}}
    with pytest.raises(ConfigError, match=message):
        load_settings(Recipe, sections)


def test_labels_may_have_a_key() -> None:
    for name in ("triplet", "margin", "n_pair"):
        data = {"train": "x", "batch_size": 8, "label_key": "topic"}
        recipe = load_settings(Recipe, {"objective": {"name": name}, "data": data})
        assert recipe.data.label_key == "topic"
