"""The plan of a run, and what a recipe refuses before any process starts."""

from __future__ import annotations

import logging
from typing import Any, get_args

import pytest

from clipsys.errors import ConfigError
from clipsys.models.open_clip_models import build_model
from clipsys.training.distributed.process_group import import_deepspeed
from clipsys.training.engine.config import EngineConfig
from clipsys.training.engine.optimizers import OptimizerConfig
from clipsys.training.engine.zero import bucket_elements, zero_section
from clipsys.training.plan import StepClock, duration, plan_run
from clipsys.training.recipe import Recipe
from tests.conftest import TINY_MODEL


def _recipe(**sections: Any) -> Recipe:
    data = {"train": "x", "batch_size": 64, **sections.pop("data", {})}
    return Recipe(data=data, **sections)


def _plan(
    recipe: Recipe,
    *,
    precision: str = "fp32",
    world_size: int = 2,
    frozen: bool = False,
    num_frames: int = 1,
):
    model = build_model(TINY_MODEL).model
    model.visual.requires_grad_(not frozen)
    return plan_run(
        recipe, model, precision=precision, world_size=world_size, num_samples=1_000,
        embed_dim=32, image_size=(32, 48), tile_size=16, num_frames=num_frames,
    )  # fmt: skip


def test_zero_divides_what_each_stage_promises() -> None:
    plans = [_plan(_recipe(engine={"zero_stage": stage})) for stage in range(4)]
    size = plans[0].num_parameters * 4
    # fp32 masters come with ZeRO 1, beside the weights that forward uses.
    assert [p.optimizer_bytes for p in plans] == [
        2 * size,
        3 * size / 2,
        3 * size / 2,
        3 * size / 2,
    ]
    assert [p.gradients_bytes for p in plans] == [size, size, size / 2, size / 2]
    assert [p.weights_bytes for p in plans] == [size, size, size, size / 2]
    assert plans[0].images_bytes == 32 * 3 * 32 * 48
    assert _plan(_recipe(), num_frames=5).images_bytes == 5 * plans[0].images_bytes


@pytest.mark.parametrize("name", get_args(OptimizerConfig.model_fields["name"].annotation))
def test_every_optimizer_has_a_plan(name: str) -> None:
    values = {"lars": 1, "sgd": 1}.get(name, 2)
    plan = _plan(_recipe(optimizer={"name": name}, engine={"zero_stage": 0}))
    assert plan.optimizer_bytes == values * 4 * plan.num_parameters


def test_buckets_are_no_larger_than_the_gradients_and_can_be_set() -> None:
    engines: list[dict[str, Any]] = [
        {"zero_stage": 0}, {"zero_stage": 1}, {"zero_stage": 2, "overlap_comm": True},
        {"zero_stage": 3, "bucket_mb": 1.0},
    ]  # fmt: skip
    plans = [_plan(_recipe(engine=engine)) for engine in engines]
    size = plans[0].num_trained * 4
    assert plans[0].buckets_bytes == size
    assert size <= plans[1].buckets_bytes < size + 4 * 1024
    assert plans[2].buckets_bytes == 2 * plans[1].buckets_bytes
    assert 1e6 <= plans[3].buckets_bytes < 1e6 + 4 * 1024
    assert plans[1].model_bytes > plans[1].buckets_bytes + plans[1].optimizer_bytes
    large = bucket_elements(EngineConfig(zero_stage=1), 10**9, width=4)
    assert large * 4 == pytest.approx(200e6, rel=1e-3)


def test_settings_of_zero_reach_deepspeed() -> None:
    config = EngineConfig(
        zero_stage=3, bucket_mb=1.0, overlap_comm=False, offload_optimizer=True,
        offload_parameters=True,
    )  # fmt: skip
    section = zero_section(config, 10**9, width=4, device_type="cuda")
    parsed = import_deepspeed().runtime.zero.config.DeepSpeedZeroConfig(**section)
    assert parsed.stage == 3 and parsed.overlap_comm is False
    assert 250_000 <= parsed.reduce_bucket_size < 251_024
    assert parsed.prefetch_bucket_size == parsed.allgather_bucket_size == parsed.reduce_bucket_size
    assert parsed.offload_optimizer.device == parsed.offload_param.device == "cpu"
    with pytest.raises(ConfigError, match="offload_optimizer moves memory from a GPU to the host"):
        zero_section(config, 10**9, width=4, device_type="cpu")


def test_what_is_offloaded_is_not_counted_for_the_device() -> None:
    held = _plan(_recipe(engine={"zero_stage": 1}))
    offloaded = _plan(_recipe(engine={"zero_stage": 1, "offload_optimizer": True}))
    assert offloaded.model_bytes == held.model_bytes - held.optimizer_bytes
    assert "offloaded to the host" in str(offloaded) and "offloaded" not in str(held)


def test_what_is_locked_costs_no_gradients() -> None:
    plan = _plan(_recipe(engine={"zero_stage": 0}), frozen=True)
    assert plan.num_trained < plan.num_parameters
    assert plan.gradients_bytes == 4 * plan.num_trained
    assert "locked" in str(plan)


def test_16_bits_halve_weights_and_keep_masters() -> None:
    plan = _plan(_recipe(engine={"zero_stage": 1, "precision": "bf16_params"}),
                 precision="bf16_params", world_size=1)  # fmt: skip
    assert plan.weights_bytes == 2 * plan.num_parameters
    assert plan.optimizer_bytes == 12 * plan.num_parameters


def test_micro_batches_are_counted_and_said() -> None:
    plan = _plan(_recipe(data={"micro_batch_size": 8}))
    assert plan.micro_batches == 4
    assert "4 micro-batches" in str(plan)


@pytest.mark.parametrize(("batch_size", "warned"), [(50, False), (52, True)])
def test_a_batch_beyond_a_twentieth_of_the_data_is_warned_of(batch_size: int, warned: bool) -> None:
    warnings = _plan(_recipe(data={"batch_size": batch_size})).warnings
    assert bool(warnings) == warned
    assert all("more than a twentieth of the 1,000 samples" in warning for warning in warnings)


def test_gradients_that_add_up_in_16_bits_are_warned_of() -> None:
    recipe = _recipe(
        data={"batch_size": 16, "micro_batch_size": 4}, engine={"precision": "bf16_params"}
    )
    (warning,) = _plan(recipe).warnings
    assert "adds up the gradients of micro-batches in 16 bits" in warning


def test_the_clock_speaks_once_and_not_of_the_warm_up(caplog: pytest.LogCaptureFixture) -> None:
    clock = StepClock(remaining_steps=100, batch_size=64)
    with caplog.at_level(logging.INFO):
        clock.tick()
        clock.tick()
        assert not caplog.records
        for _ in range(5):
            clock.tick()
    assert len(caplog.records) == 1
    assert "for 97 steps" in caplog.text


@pytest.mark.parametrize(
    ("seconds", "text"), [(40, "40 s"), (720, "12 min"), (12_000, "3 h 20 min"), (-1, "0 s")]
)
def test_durations_are_said_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"data": {"micro_batch_size": 65}},
            "micro_batch_size is 65, more than data.batch_size 64",
        ),
        ({"engine": {"zero_stage": 0, "precision": "fp16"}}, "needs the masters that ZeRO keeps"),
        ({"engine": {"precision": "bf16_params", "ema_decay": 0.9}}, "ema_decay would average"),
        ({"engine": {"zero_stage": 3, "ema_decay": 0.9}}, "ema_decay needs whole parameters"),
        ({"engine": {"zero_stage": 3, "compile": True}}, "compile needs whole parameters"),
        ({"engine": {"cache_on_host": True}}, "cache_on_host does nothing"),
        ({"evaluation": {"classnames": "x"}}, "evaluation.classnames does nothing without"),
        (
            {"objective": {"name": "simclr"}, "data": {"caption_key": "x"}},
            "data.caption_key does nothing for objective.name simclr",
        ),
        (
            {"objective": {"name": "moco"}, "data": {"captions": "first"}},
            "data.captions does nothing for objective.name moco",
        ),
        ({"augmentation": {"crop_ratio": [0, 1]}}, "smaller one first"),
        ({"augmentation": {"crop_scale": [1, 0.5]}}, "smaller one first"),
        ({"augmentation": {"blur_sigma": [0, 1]}}, "smaller one first"),
        ({"optimizer": {"betas": [1.0, 0.9]}}, "from 0 to below 1"),
        ({"evaluation": {"knn": "cls"}}, "evaluation.knn does nothing without data.validation"),
        ({"engine": {"zero_stage": 0, "bucket_mb": 5}}, "bucket_mb does nothing with"),
        ({"engine": {"zero_stage": 0, "overlap_comm": True}}, "overlap_comm does nothing with"),
        ({"engine": {"zero_stage": 0, "offload_optimizer": True}}, "offload_optimizer does noth"),
        (
            {"engine": {"zero_stage": 2, "offload_parameters": True}},
            "offload_parameters needs parameters that are divided",
        ),
        (
            {"model": {"unlocked_image_blocks": 0, "unlocked_text_blocks": 0}},
            "nothing would be trained",
        ),
        ({"model": {"initial_logit_bias": -3.0}}, "is for objective.name sigmoid"),
        (
            {"objective": {"positives": "pair", "duplicates": "ignore"}},
            "no two samples are equal",
        ),
        ({"schedule": {"cooldown_steps": 5}}, "cooldown_steps does nothing"),
        ({"schedule": {"decay": "constant", "final_lr_share": 0.1}}, "final_lr_share does nothing"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _recipe(**sections)


@pytest.mark.parametrize(
    ("data", "world_size", "message"),
    [
        ({"batch_size": 64}, 3, "does not divide among 3 processes; try 63"),
        ({"batch_size": 64, "micro_batch_size": 12}, 2, "does not divide the 32 pairs.*try 8"),
        ({"batch_size": 64, "micro_batch_size": 64}, 2, "does not divide the 32 pairs.*try 32"),
    ],
)
def test_batches_that_do_not_divide_are_refused_with_a_size_that_does(
    data: dict[str, Any], world_size: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _recipe(data=data).check_world(world_size)
