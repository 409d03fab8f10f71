"""Objectives that learn from labels, on real ranks, against one naive float64 process."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from clipsys.config import load_settings
from clipsys.training.model.outputs import State
from clipsys.training.objectives.classification import ClassificationConfig
from clipsys.training.objectives.supcon import SupConConfig
from clipsys.training.recipe import Recipe
from tests.training.losses.test_supervised import naive_supcon
from tests.training.objectives.exact import (
    HEAD,
    Seen,
    Subject,
    all_cases,
    check_exact,
    few_cases,
)


def _supcon(seen: Seen) -> tuple[torch.Tensor, State]:
    rows = list(map(seen.project, seen.inputs.views))
    for tokens in seen.inputs.texts:
        features = seen.heads["text_projection"](seen.clip.encode_text(tokens))
        rows.append(F.normalize(features, dim=-1))
    features = torch.stack(rows, dim=1)
    form = seen.settings.form
    return naive_supcon(features, seen.labels.groups_B, seen.temperature(), form), seen.state


def _classification(seen: Seen) -> tuple[torch.Tensor, State]:
    logits = seen.heads["classifier"](seen.clip.visual(seen.inputs.views[0]))
    classes, smoothing = seen.labels.classes_B, seen.settings.label_smoothing
    losses = []
    for logit, number in zip(logits, classes, strict=True):
        target = torch.full_like(logit, smoothing / len(logit))
        target[number] += 1 - smoothing
        losses.append(-(target * (logit - torch.logsumexp(logit, 0))).sum())
    return torch.stack(losses).mean(), seen.state


_SUBJECTS = {
    "supcon": Subject(SupConConfig(**HEAD), _supcon),
    "supcon in, three views, learned temperature": Subject(
        SupConConfig(head="linear", head_width=8, form="in", num_views=3, learn_temperature=True),
        _supcon,
    ),
    "supcon with texts": Subject(SupConConfig(**HEAD, num_views=1, texts=True), _supcon),
    "classification": Subject(ClassificationConfig(label_smoothing=0.1), _classification),
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


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"objective": {"name": "supcon"}, "data": {"batch_size": 1}}, "no negatives; raise it"),
        (
            {"objective": {"name": "supcon"}, "data": {"classes": ["a", "b"]}},
            "trains no classifier",
        ),
        ({"objective": {"name": "simclr"}, "data": {"label_key": "k"}}, "data.label_key is 'k'"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(sections: dict, message: str) -> None:  # type: ignore[type-arg]
    data = {"train": "x", "batch_size": 8, **sections["data"]}
    with pytest.raises(Exception, match=message):
        load_settings(Recipe, {**sections, "data": data})


def test_labels_may_have_a_key() -> None:
    for name in ("supcon", "classification"):
        data = {"train": "x", "batch_size": 8, "label_key": "topic"}
        recipe = load_settings(Recipe, {"objective": {"name": name}, "data": data})
        assert recipe.data.label_key == "topic"
