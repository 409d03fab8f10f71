"""What holds for every objective: finite on degenerate batches, a gradient for all it trains."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from clipsys.training.model.outputs import Inputs, Outputs
from clipsys.training.model.trained import TrainedModel
from clipsys.training.objectives import BUILT_IN, Labels, make_objective, objective_class
from tests.training.objectives.exact import Subject, initial_state, make_batch, make_model

#: Smaller than by default, for speed alone.
_SMALL: dict[str, Any] = {
    "queue_size": 30, "head_width": 8, "num_prototypes": 10, "num_noise": 8,
    "num_permutations": 6,
}  # fmt: skip
_OTHERS: dict[str, dict[str, Any]] = {
    "memory_bank": {"form": "nce"}, "swav": {"frozen_prototype_steps": 0},
    "distillation": {"teacher": "any"},
}  # fmt: skip
#: The sigmoid loss needs another model, with a bias; it has tests of its own.
_NAMES = [name for name in BUILT_IN if not objective_class(name).needs_bias]


def _make(name: str, **settings: Any) -> Any:
    config = objective_class(name).config
    small = {key: value for key, value in _SMALL.items() if key in config.model_fields}
    return make_objective(config(name=name, **{**small, **_OTHERS.get(name, {}), **settings}))


def _take_step(objective: Any, model: TrainedModel, inputs: Inputs, labels: Labels) -> torch.Tensor:
    """The loss after a forward and a backward pass, without the engine."""
    model.zero_grad()
    outputs: Any = model(inputs)
    targets: Any = inputs.teacher or {}
    if objective.momentum is not None:
        with torch.no_grad():
            targets = model(inputs, wants_targets=True)
    loss, state = objective.loss(outputs, targets, labels, initial_state(objective))
    loss.backward()
    # A second step meets what the first one remembered.
    outputs = Outputs(*(_detached(part) for part in outputs))
    again, _ = objective.loss(outputs, targets, labels, state)
    assert bool(torch.isfinite(again))
    return loss.detach()  # type: ignore[no-any-return]


def _detached(part: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in part.items()}


def _all_equal(inputs: Inputs, labels: Labels) -> tuple[Inputs, Labels]:
    """One image and one text for all rows and views: all features are equal."""
    views = tuple(view[:1].expand_as(view) for view in inputs.views)
    return inputs._replace(
        views=views, texts=tuple(inputs.texts[0][:1].expand_as(text) for text in inputs.texts)
    ), labels


def _one_class(inputs: Inputs, labels: Labels) -> tuple[Inputs, Labels]:
    classes = None if labels.classes_B is None else torch.zeros_like(labels.classes_B)
    return inputs, labels._replace(groups_B=torch.zeros_like(labels.groups_B), classes_B=classes)


def _lonely_class(inputs: Inputs, labels: Labels) -> tuple[Inputs, Labels]:
    """All rows of one class but a single row of another."""
    groups = torch.zeros_like(labels.groups_B)
    groups[0] = 1
    classes = None if labels.classes_B is None else groups.clone()
    return inputs, labels._replace(groups_B=groups, classes_B=classes)


def _huge(inputs: Inputs, labels: Labels) -> tuple[Inputs, Labels]:
    return inputs._replace(views=tuple(1e4 * view for view in inputs.views)), labels


_BATCHES: dict[str, Any] = {
    "all features equal": _all_equal,
    "a batch of one class": _one_class,
    "a class with one member": _lonely_class,
    "huge values": _huge,
}


@pytest.mark.parametrize("name", _NAMES)
def test_degenerate_batches_at_a_low_temperature_stay_finite(name: str) -> None:
    fields = objective_class(name).config.model_fields
    objective = _make(name, **({"temperature": 0.01} if "temperature" in fields else {}))
    model = make_model(objective)
    with torch.no_grad():
        if objective.trains_temperature:
            model.clip.logit_scale.fill_(math.log(100))
    for case, change in _BATCHES.items():
        if case == "huge values":  # the last one
            with torch.no_grad():
                for parameter in model.heads.parameters():
                    parameter.mul_(100)
        loss = _take_step(objective, model, *change(*make_batch(objective, 0)))
        assert bool(torch.isfinite(loss)), case
        for of, parameter in model.named_parameters():
            finite = parameter.grad is None or bool(torch.isfinite(parameter.grad).all())
            assert finite, (case, of)


@pytest.mark.parametrize("name", _NAMES)
def test_everything_that_is_trained_gets_a_gradient(name: str) -> None:
    """Heads beside the model were silently never trained once."""
    objective = _make(name)
    model = make_model(objective)
    _take_step(objective, model, *make_batch(objective, 0))
    without = {
        of
        for of, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not bool(parameter.grad.any()))
    }
    assert not without


@pytest.mark.parametrize("name", _NAMES)
def test_the_state_that_follows_has_the_shapes_of_the_first(name: str) -> None:
    objective = _make(name)
    inputs, labels = make_batch(objective, 0)
    model = make_model(objective)
    with torch.no_grad():
        outputs = model(inputs)
        targets = inputs.teacher or {}
        if objective.momentum is not None:
            targets = model(inputs, wants_targets=True)
        state = initial_state(objective)
        before = {key: value.clone() for key, value in state.items()}
        _, following = objective.loss(outputs, targets, labels, state)
    assert {key: (one.shape, one.dtype) for key, one in following.items()} == {
        key: (one.shape, one.dtype) for key, one in before.items()
    }
    for key, value in before.items():  # a value: nothing is written into it
        torch.testing.assert_close(state[key], value, rtol=0, atol=0, equal_nan=True)


def test_every_objective_is_compared_with_a_naive_process() -> None:
    compared = {"infonce", "sigmoid"}  # in tests/training/test_exactness.py
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        module = importlib.import_module(f"tests.training.objectives.{path.stem}")
        for value in vars(module).values():
            for one in value.values() if isinstance(value, dict) else ():
                if isinstance(one, Subject):
                    compared.add(one.settings.name)
    assert compared >= set(BUILT_IN)
