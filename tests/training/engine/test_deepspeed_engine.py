"""Saving and loading, precisions and averages. That gradients are exact: test_exactness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clipsys.models.open_clip_models import build_model
from clipsys.training.engine.deepspeed_engine import Engine
from clipsys.training.engine.ema import WeightAverage
from clipsys.training.engine.gradient_check import NonFiniteGradientError
from clipsys.training.engine.optimizers import OptimizerConfig
from clipsys.training.engine.repartition import SavedBy
from clipsys.training.model.outputs import Inputs, Sizes
from clipsys.training.model.towers import TowerOptions
from clipsys.training.model.trained import TrainedModel
from clipsys.training.objectives.infonce import InfoNCE, InfoNCEConfig
from clipsys.training.objectives.protocol import Labels
from clipsys.training.recipe import EngineConfig
from tests.conftest import TINY_MODEL, no_tokenizer
from tests.ranks import run_ranks

_BATCH = 12
#: With CLIP's vocabulary nearly all of the weights would be those of words.
_MODEL = {**TINY_MODEL, "text_cfg": {**TINY_MODEL["text_cfg"], "vocab_size": 1000}}


_OBJECTIVE = InfoNCE(InfoNCEConfig(positives="pair"))
_RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}


def _engine(
    world_size: int, *, precision: str = "fp32", resnet: bool = False, **config: Any
) -> Engine:
    torch.manual_seed(0)
    architecture = {**_MODEL, "vision_cfg": _RESNET} if resnet else _MODEL
    clip = build_model(architecture, for_training=True, tokenizer=no_tokenizer).model
    model = TrainedModel(clip, _OBJECTIVE, TowerOptions(precision), sizes=Sizes(32))
    return Engine(
        model,
        config=EngineConfig(**config),
        optimizer=OptimizerConfig(lr=1e-3, eps=1e-4, weight_decay=0.1),
        local_batch_size=_BATCH // world_size,
        device=torch.device("cpu"),
    )


def _batch(step: int, rank: int, world_size: int) -> tuple[Inputs, Labels]:
    generator = torch.Generator().manual_seed(step)
    image = torch.randn(_BATCH, 3, 32, 32, generator=generator)
    tokens = torch.randint(1, 999, (_BATCH, 16), generator=generator)
    tokens[:, 6] = 999
    tokens[:, 7:] = 0
    rows = slice(rank * _BATCH // world_size, (rank + 1) * _BATCH // world_size)
    numbers = torch.arange(_BATCH)[rows]
    return Inputs((image[rows],), (tokens[rows],)), Labels(numbers, numbers)


def _advance(engine: Engine, steps: range, rank: int, world_size: int) -> list[float]:
    scales = []
    for step in steps:
        inputs, labels = _batch(step, rank, world_size)
        _, shared = engine.accumulate(
            [lambda inputs=inputs: inputs],
            lambda outputs, targets, state, labels=labels: _OBJECTIVE.loss(
                outputs, targets, labels, state
            ),
        )
        engine.update(1.0)
        scales.append(float(shared["logit_scale"]))
    return scales


def _save_and_load(
    rank: int, world_size: int, folder: str, precision: str, config: dict[str, Any]
) -> bool:
    first = _engine(world_size, precision=precision, **config)
    first.train()
    _advance(first, range(3), rank, world_size)
    first.save(Path(folder), "tag", {"step": 3})
    _advance(first, range(3, 5), rank, world_size)
    second = _engine(world_size, precision=precision, **config)
    second.train()
    saved = SavedBy(world_size, config["zero_stage"], precision)
    assert second.load(Path(folder), "tag", saved)["step"] == 3
    _advance(second, range(3, 5), rank, world_size)
    one, two = first.state_dict(), second.state_dict()
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("precision", "config"),
    [
        ("fp32", {"zero_stage": 1}),
        ("fp32", {"zero_stage": 1, "ema_decay": 0.9}),
        ("bf16_params", {"zero_stage": 2}),
    ],
)
def test_a_loaded_engine_goes_on_bit_for_bit(
    tmp_path: Path, precision: str, config: dict[str, Any]
) -> None:
    assert run_ranks(_save_and_load, 2, str(tmp_path), precision, config) == [True, True]


def _save_masters(
    rank: int, world_size: int, folder: str, splits: list[tuple[str, int]]
) -> list[dict[str, Any]]:
    states = []
    for precision, stage in splits:
        engine = _engine(world_size, precision=precision, zero_stage=stage)
        _advance(engine, range(3), rank, world_size)
        engine.save(Path(folder), f"{precision}-{stage}", {"step": 3})
        states.append({name: value.numpy() for name, value in engine.state_dict().items()})
    return states


def _load_masters(
    rank: int, world_size: int, folder: str, splits: list[tuple[str, int]]
) -> list[tuple[dict[str, Any], float]]:
    found = []
    for precision, stage in splits:
        engine = _engine(world_size, precision=precision, zero_stage=stage)
        engine.load(Path(folder), f"{precision}-{stage}", SavedBy(2, stage, precision))
        state = {name: value.numpy() for name, value in engine.state_dict().items()}
        (scale,) = _advance(engine, range(3, 4), rank, world_size)
        found.append((state, scale))
    return found


@pytest.mark.parametrize("world_size", [1, 3])
def test_another_number_of_ranks_goes_on_with_the_same_masters(
    tmp_path: Path, world_size: int
) -> None:
    splits = [("bf16_params", 1), ("bf16_params", 2), ("fp32", 1)]
    expected = run_ranks(_save_masters, 2, str(tmp_path), splits)[0]
    for found in run_ranks(_load_masters, world_size, str(tmp_path), splits):
        for (state, scale), saved in zip(found, expected, strict=True):
            for name, value in saved.items():
                np.testing.assert_array_equal(state[name], value, err_msg=name)
            # The temperature that the next loss is taken at comes from the master too.
            assert scale == pytest.approx(np.exp(saved["logit_scale"]).item(), rel=1e-7)


def test_running_statistics_of_all_ranks_go_on_bit_for_bit(tmp_path: Path) -> None:
    # Three ranks: the sum of three equal float32 values, divided by three, is not always the value.
    config = {"zero_stage": 1, "resnet": True, "ema_decay": 0.9}
    assert run_ranks(_save_and_load, 3, str(tmp_path), "fp32", config) == [True] * 3


def _shared_statistics(rank: int, world_size: int) -> list[float]:
    engine = _engine(world_size, resnet=True, zero_stage=0, ema_decay=0.9)
    engine.train()
    _advance(engine, range(2), rank, world_size)
    with engine.evaluating() as model:
        return [float(value.sum()) for name, value in model.named_buffers() if "running_" in name]


def test_ranks_evaluate_with_the_same_average_of_running_statistics() -> None:
    first, *others = run_ranks(_shared_statistics, 2)
    assert others == [first]


def _spoil(rank: int, world_size: int, splits: list[tuple[str, int]]) -> list[tuple[str, bool]]:
    found = []
    for precision, stage in splits:
        engine = _engine(world_size, precision=precision, zero_stage=stage)
        _advance(engine, range(2), rank, world_size)
        before = engine.state_dict()
        if rank == 1:  # one value of one rank
            spoilt = engine.module.clip.ln_final.weight
            spoilt.register_hook(lambda gradient: gradient * float("inf"))
        message = ""
        try:
            _advance(engine, range(2, 3), rank, world_size)
        except NonFiniteGradientError as error:
            message = str(error)
        after = engine.state_dict()
        found.append((message, all(torch.equal(before[name], after[name]) for name in before)))
    return found


def test_a_gradient_that_is_not_finite_stops_every_rank_before_the_weights_change() -> None:
    splits = [*(("fp32", stage) for stage in range(4)), ("bf16", 1)]
    splits += [("bf16_params", stage) for stage in (1, 2, 3)]
    for found in run_ranks(_spoil, 2, splits):
        for split, (message, unchanged) in zip(splits, found, strict=True):
            assert message == "the gradient of ln_final.weight is not finite", split
            assert unchanged, split


_MANY_STEPS = 16


def _scales(
    rank: int, world_size: int, splits: list[tuple[str, int]]
) -> list[tuple[list[float], dict[str, Any]]]:
    found = []
    for precision, stage in splits:
        engine = _engine(world_size, precision=precision, zero_stage=stage)
        scales = _advance(engine, range(_MANY_STEPS), rank, world_size)
        state = {name: value.numpy() for name, value in engine.state_dict().items()}
        found.append((scales, state))
    return found


def test_weights_of_16_bits_train_with_an_exact_temperature() -> None:
    splits = [("fp32", 1), *(("bf16_params", stage) for stage in (1, 2, 3))]
    (exact, expected), *others = run_ranks(_scales, 2, splits)[0]
    for scales, state in others:
        # AdamW moves the log-scale by about lr = 0.001 a step; bf16 knows it in steps of 0.016,
        # and would not move at all.
        assert scales == pytest.approx(exact, rel=1e-3)
        assert len(set(scales)) == _MANY_STEPS
        for name, value in expected.items():
            # AdamW moved each weight by up to 16 · 0.001; rounded gradients stray little from it.
            assert abs(state[name] - value).mean() < 2e-3, name


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_fp16_supported(), reason="the processor has no fp16"
)
def test_fp16_finds_a_loss_scale_and_then_trains() -> None:
    splits = [("fp16", stage) for stage in (1, 2, 3)]
    for scales, state in run_ranks(_scales, 2, splits)[1]:
        # The first loss scale of 2^16 overflows here, and is halved until a step succeeds.
        assert scales[0] == pytest.approx(1 / 0.07, rel=1e-6)
        assert scales[-1] < scales[0] * 0.999
        assert all(abs(value).max() < 10 for value in state.values())


def _scaling(rank: int, world_size: int) -> tuple[dict[str, float], int, str]:
    engine = _engine(world_size, precision="fp16", zero_stage=1)
    _advance(engine, range(_MANY_STEPS), rank, world_size)
    figures, applied = engine.scaling_figures(), engine.num_applied_steps
    if rank == 1:
        engine.module.clip.ln_final.weight.register_hook(lambda gradient: gradient * float("nan"))
    try:
        _advance(engine, range(40), rank, world_size)
    except NonFiniteGradientError as error:
        return figures, applied, str(error)
    return figures, applied, ""


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_fp16_supported(), reason="the processor has no fp16"
)
def test_fp16_counts_the_steps_that_it_leaves_out_and_gives_up_at_the_smallest_scale() -> None:
    for figures, applied, error in run_ranks(_scaling, 2):
        assert 0 < figures["skipped_steps"] == _MANY_STEPS - applied
        # The first overflow is forgiven (hysteresis), each one after it halves the scale.
        assert figures["loss_scale"] == 2 ** (17 - figures["skipped_steps"])
        assert error == "the gradient of ln_final.weight is not finite at any loss scale of fp16"


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
