"""SwAV on real ranks against one naive float64 process; what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from clipsys.config import load_settings
from clipsys.errors import ConfigError
from clipsys.models.open_clip_models import build_model
from clipsys.training.data.augmentation import AugmentationConfig
from clipsys.training.engine.optimizers import OptimizerConfig, parameter_groups
from clipsys.training.model.outputs import Outputs, Sizes, State
from clipsys.training.objectives import Labels, make_objective
from clipsys.training.objectives.swav import SwAVConfig
from clipsys.training.recipe import Recipe
from clipsys.training.run_model import check_view_sizes
from tests.conftest import TINY_MODEL
from tests.training.losses.test_swapped_codes import naive_swav
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


def _swav(seen: Seen) -> tuple[torch.Tensor, State]:
    settings = seen.settings
    prototypes = F.normalize(seen.heads["prototypes"].vectors, dim=-1)
    if seen.step < settings.frozen_prototype_steps:
        prototypes = prototypes.detach() + 0 * prototypes
    features = torch.stack([seen.project(view) for view in seen.inputs.views], dim=1)
    following = {"step": torch.tensor(seen.step + 1)}
    queued = None
    if settings.queue_size:
        queue = seen.state["queue"]
        following["queue"] = torch.cat([queue, features[:, :2].detach()])[-len(queue) :]
        if seen.step >= settings.queue_start_step:
            queued = queue @ prototypes.detach().T
    loss = naive_swav(
        features @ prototypes.T,
        temperature=settings.temperature,
        epsilon=settings.epsilon,
        iterations=settings.iterations,
        queued=queued,
    )
    return loss, following


_SUBJECTS = {
    # Prototypes are frozen for a step; the queue is no multiple of the batch or the ranks.
    "swav": Subject(
        SwAVConfig(
            **HEAD, num_prototypes=7, frozen_prototype_steps=1, queue_size=10, queue_start_step=1
        ),
        _swav,
    ),
    "swav with local views": Subject(
        SwAVConfig(
            head="linear", head_width=8, num_prototypes=20, frozen_prototype_steps=0, num_local=2,
            epsilon=0.1, iterations=2, temperature=0.2,
        ),
        _swav,
    ),
}  # fmt: skip


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_split_is_exact(world_size: int) -> None:
    cases = few_cases(list(_SUBJECTS))
    check_exact(_SUBJECTS, cases if world_size == 2 else cases[::3], world_size)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_whole_matrix_is_exact(world_size: int) -> None:
    check_exact(_SUBJECTS, all_cases(list(_SUBJECTS)), world_size)


def test_step_and_queue_resume_bit_for_bit(tmp_path: Path) -> None:
    cases = [Case("swav", 3, 2), Case("swav", 1, precision="bf16_params")]
    check_resume(_SUBJECTS, cases, tmp_path)


def _settings(**changes: Any) -> SwAVConfig:
    return SwAVConfig(
        **{"head": "none", "num_prototypes": 4, "frozen_prototype_steps": 0} | changes
    )


def _outputs(seed: int = 0) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    features = F.normalize(torch.randn(6, 2, 8, generator=generator), dim=-1)
    prototypes = F.normalize(torch.randn(4, 8, generator=generator), dim=-1)
    return Outputs({"features": features}, {"prototypes": prototypes.requires_grad_()})


def test_prototypes_are_frozen_for_a_number_of_steps_not_of_epochs() -> None:
    """Lightly 1050: an epoch passed for a step froze them for good."""
    objective = make_objective(_settings(frozen_prototype_steps=2))
    state = dict(objective.initial_state(Sizes(8), torch.Generator()))
    largest = []
    for _ in range(3):
        outputs = _outputs()
        loss, state = objective.loss(outputs, {}, Labels(*[torch.arange(6)] * 2), state)
        loss.backward()  # type: ignore[no-untyped-call]
        gradient = outputs.shared["prototypes"].grad
        assert gradient is not None  # of 0: the engine would wait for one that is missing
        largest.append(float(gradient.abs().max()))
    assert largest[:2] == [0.0, 0.0]
    assert largest[2] > 0


def test_a_queue_is_scored_by_the_present_prototypes_and_first_used_when_it_is_full() -> None:
    """Lightly 1148: with scores of former prototypes, or random ones, the loss rises at once."""
    objective = make_objective(_settings(queue_size=12, queue_start_step=2))
    without = make_objective(_settings())
    labels = Labels(*[torch.arange(6)] * 2)
    state = dict(objective.initial_state(Sizes(8), torch.Generator()))
    for step in range(4):
        outputs = _outputs(step)
        plain, _ = without.loss(outputs, {}, labels, {"step": state["step"]})
        loss, following = objective.loss(outputs, {}, labels, state)
        is_used = step >= 2
        assert bool(torch.equal(loss, plain)) != is_used
        if is_used:
            assert bool((state["queue"].norm(dim=-1) > 0.99).all())
            scores, prototypes = outputs.rows["features"], outputs.shared["prototypes"].T
            expected = naive_swav(scores @ prototypes, queued=state["queue"] @ prototypes)
            torch.testing.assert_close(loss, expected)
        state = following


def test_prototypes_do_not_decay() -> None:
    heads = nn.ModuleDict(make_objective(_settings()).heads(Sizes(8)))
    model = nn.Module()
    model.clip, model.heads = nn.Linear(2, 2), heads
    groups = parameter_groups(model, OptimizerConfig(weight_decay=0.1))
    (group,) = (g for g in groups for p in g["params"] if p is heads["prototypes"].vectors)
    assert group["weight_decay"] == 0.0


def test_local_views_have_their_own_size_and_crop() -> None:
    settings = _settings(num_local=3, local_size=16, local_crop_scale=(0.1, 0.3))
    views = make_objective(settings).views(AugmentationConfig(crop_scale=(0.4, 1.0), flip=0.5))
    assert [view.size for view in views] == [None] * 2 + [(16, 16)] * 3
    assert [view.augmentation.crop_scale for view in views] == [(0.4, 1.0)] * 2 + [(0.1, 0.3)] * 3
    assert {view.augmentation.flip for view in views} == {0.5}


_TIMM = {"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear"}
_TOWERS: dict[str, dict[str, Any]] = {
    "ViT": {},
    "ResNet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32},
    "timm's ViT": {
        "image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token",
        "timm_proj": "linear",
    },
    "timm's ResNet": {"image_size": 32, **_TIMM},
}  # fmt: skip


@pytest.mark.parametrize("name", _TOWERS)
def test_a_tower_that_takes_one_size_alone_is_refused_other_sizes(name: str) -> None:
    vision = _TOWERS[name] or TINY_MODEL["vision_cfg"]
    model = build_model({**TINY_MODEL, "vision_cfg": vision}, for_training=True).model
    side = vision["image_size"]
    before = {name: one.clone() for name, one in model.state_dict().items()}
    smaller = make_objective(_settings(num_local=1, local_size=side // 2))
    same = make_objective(_settings(num_local=1, local_size=side))
    check_view_sizes(model, same.views(AugmentationConfig()), (side, side))
    if "timm" in name:  # of timm's transformers only some, such as this one
        check_view_sizes(model, smaller.views(AugmentationConfig()), (side, side))
    else:
        message = f"does not take views of {side // 2} x {side // 2} .*leave objective.local_size"
        with pytest.raises(ConfigError, match=message):
            check_view_sizes(model, smaller.views(AugmentationConfig()), (side, side))
    assert model.visual.training
    after = model.state_dict()
    assert all(torch.equal(after[name], one) for name, one in before.items())


@pytest.mark.parametrize(
    ("section", "batch", "message"),
    [
        ({}, 1, "leaves objective.name swav no samples to share out prototypes among"),
        ({"queue_start_step": 3}, 8, "queue_start_step does nothing while queue_size is 0"),
        ({"local_size": 16}, 8, "local_size does nothing while num_local is 0"),
        ({"local_crop_scale": [0.1, 0.2]}, 8, "local_crop_scale does nothing while num_local is 0"),
        ({"num_local": 2, "local_crop_scale": [0.5, 0.2]}, 8, "expected two shares of the area"),
        ({"num_prototypes": 1}, 8, "greater than or equal to 2"),
        (
            {"queue_size": 20, "queue_start_step": 2}, 8,
            "before batches of 8 have filled objective.queue_size 20; use 3 or more",
        ),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(
    section: dict[str, Any], batch: int, message: str
) -> None:
    data = {"train": "x", "batch_size": batch}
    with pytest.raises(ConfigError, match=message):
        load_settings(Recipe, {"objective": {"name": "swav", **section}, "data": data})
