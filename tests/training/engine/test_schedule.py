from __future__ import annotations

from itertools import pairwise

import pytest

from clipsys.training.engine.schedule import ScheduleConfig, lr_factor


def test_it_warms_up_peaks_and_ends_near_zero() -> None:
    config = ScheduleConfig(warmup_steps=10)
    factors = [lr_factor(step, 100, config) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1.0
    assert all(a >= b for a, b in pairwise(factors[10:]))
    assert 0 < factors[-1] < 0.001
    assert factors[55] == pytest.approx(0.5)


def test_the_end_can_be_a_share_of_the_peak_and_the_decay_constant() -> None:
    assert lr_factor(200, 200, ScheduleConfig(final_lr_share=0.2)) == pytest.approx(0.2)
    constant = ScheduleConfig(warmup_steps=0, decay="constant")
    assert [lr_factor(step, 10, constant) for step in (0, 9)] == [1.0, 1.0]


def test_a_warm_up_longer_than_the_run_never_divides_by_zero() -> None:
    assert lr_factor(5, 5, ScheduleConfig(warmup_steps=10)) == pytest.approx(0.6)
    assert lr_factor(10, 10, ScheduleConfig(warmup_steps=10)) == 1.0


def test_a_cooldown_is_constant_and_then_falls_in_a_line() -> None:
    config = ScheduleConfig(decay="cooldown", warmup_steps=2, cooldown_steps=4, final_lr_share=0.2)
    factors = [lr_factor(step, 12, config) for step in range(12)]
    assert factors[2:9] == [1.0] * 7
    assert factors[8:] == pytest.approx([1.0, 0.8, 0.6, 0.4])
