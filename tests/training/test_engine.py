"""The DeepSpeed engine against plain autograd in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clipsys.models import build_model
from clipsys.training.engine import Engine, WeightAverage
from clipsys.training.losses import info_nce
from clipsys.training.optimizers import OptimizerConfig, build_optimizer, parameter_groups
from clipsys.training.recipe import EngineConfig
from clipsys.training.towers import ContrastiveModel
from tests.conftest import TINY_MODEL
from tests.ranks import run_ranks

_STEPS, _BATCH = 5, 12
# eps stands far above rounding: an attention's key bias has a gradient of exactly zero, and Adam
# would blow up the rounding error that stands in its place.
_OPTIMIZER = OptimizerConfig(lr=1e-3, betas=(0.9, 0.98), eps=1e-4, weight_decay=0.1)


def _model() -> ContrastiveModel:
    torch.manual_seed(0)
    return ContrastiveModel(build_model(TINY_MODEL, for_training=True))


def _batch(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    image = torch.randn(_BATCH, 3, 32, 32, generator=generator)
    tokens = torch.randint(1, 1000, (_BATCH, 16), generator=generator)
    tokens[:, 6] = 49407
    tokens[:, 7:] = 0
    return image, tokens, torch.randint(0, 8, (_BATCH,), generator=generator)


def _one_process(clipping: float) -> dict[str, torch.Tensor]:
    """Plain torch on the full batch."""
    model = _model()
    optimizer = build_optimizer(parameter_groups(model, _OPTIMIZER), _OPTIMIZER)
    norms = []
    for step in range(_STEPS):
        image, tokens, groups = _batch(step)
        optimizer.zero_grad()
        info_nce(*model(image, tokens), groups=groups).backward()
        limit = clipping or float("inf")
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))
        optimizer.step()
    return {**model.clip.state_dict(), "norms": torch.stack(norms)}


def _rank(rank: int, world_size: int, stage: int, clipping: float) -> dict[str, Any]:
    local = _BATCH // world_size
    engine = Engine(
        _model(),
        config=EngineConfig(zero_stage=stage, gradient_clipping=clipping),
        optimizer=_OPTIMIZER,
        local_batch_size=local,
        device=torch.device("cpu"),
    )
    rows = slice(rank * local, (rank + 1) * local)
    norms = []
    for step in range(_STEPS):
        image, tokens, groups = (part[rows] for part in _batch(step))
        features = engine.forward(image, tokens)
        norms.append(engine.update(info_nce(*features, groups=groups), 1.0))
    state = {name: tensor.numpy() for name, tensor in engine.state_dict().items()}
    return {**state, "norms": norms}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("clipping", [0.0, 0.5])
def test_two_ranks_train_like_one_process(stage: int, clipping: float) -> None:
    expected = _one_process(clipping)
    for state in run_ranks(_rank, 2, stage, clipping):
        norms = torch.tensor(state.pop("norms"))
        torch.testing.assert_close(norms, expected["norms"], rtol=1e-4, atol=1e-6)
        for name, actual in state.items():
            torch.testing.assert_close(
                torch.as_tensor(actual),
                expected[name],
                rtol=1e-5,
                atol=1e-5,
                msg=lambda text, name=name: f"{name}: {text}",
            )


def _save_and_load(rank: int, world_size: int, folder: str, decay: float) -> bool:
    def engine() -> Engine:
        return Engine(
            _model(),
            config=EngineConfig(zero_stage=1, ema_decay=decay),
            optimizer=_OPTIMIZER,
            local_batch_size=_BATCH // world_size,
            device=torch.device("cpu"),
        )

    def advance(target: Engine, steps: range) -> None:
        rows = slice(rank * _BATCH // world_size, (rank + 1) * _BATCH // world_size)
        for step in steps:
            image, tokens, groups = (part[rows] for part in _batch(step))
            target.update(info_nce(*target.forward(image, tokens), groups=groups), 1.0)

    first = engine()
    advance(first, range(3))
    first.save(Path(folder), "tag", {"step": 3})
    advance(first, range(3, 5))
    second = engine()
    assert second.load(Path(folder), "tag")["step"] == 3
    advance(second, range(3, 5))
    one, two = first.state_dict(), second.state_dict()
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_loaded_engine_goes_on_bit_for_bit(tmp_path: Path, decay: float) -> None:
    assert run_ranks(_save_and_load, 2, str(tmp_path), decay) == [True, True]


def test_the_average_follows_weights_and_running_statistics() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    model.register_buffer("mask", torch.tensor(float("-inf")))
    average = WeightAverage(model, 0.5)
    weight = model[0].weight.detach().clone()
    expected, statistic = weight.clone(), torch.zeros(2)
    for step in range(3):
        with torch.no_grad():
            model[0].weight += 1.0
            model[1].running_mean += 1.0
        average.update(model)
        decay = min(0.5, (2 + step) / (11 + step))  # the naive recurrence
        expected = decay * expected + (1 - decay) * (weight + step + 1)
        statistic = decay * statistic + (1 - decay) * (step + 1)
    with average.swapped(model):
        torch.testing.assert_close(model[0].weight.detach(), expected)
        torch.testing.assert_close(model[1].running_mean, statistic)
    torch.testing.assert_close(model[0].weight.detach(), weight + 3)
    assert float(model.mask) == float("-inf")
