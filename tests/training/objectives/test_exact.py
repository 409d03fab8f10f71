"""The harness itself: it agrees where an objective is right, and notices where it is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clipsys.training.model.outputs import State
from clipsys.training.objectives.moco import MoCoConfig
from clipsys.training.objectives.simclr import SimCLRConfig
from tests.training.objectives.exact import (
    HEAD,
    Case,
    Seen,
    Subject,
    check_exact,
    check_resume,
)
from tests.training.objectives.test_two_views_exact import naive_moco_step, naive_simclr


def _simclr_of_half(seen: Seen) -> tuple[torch.Tensor, State]:
    loss, state = naive_simclr(seen)
    return loss * 1.0001, state


_SUBJECTS = {
    "simclr": Subject(SimCLRConfig(**HEAD), naive_simclr),
    "moco": Subject(MoCoConfig(**HEAD, momentum=0.7, queue_size=30), naive_moco_step),
}


@pytest.mark.parametrize("world_size", [1, 3])
def test_right_objectives_agree_on_one_rank_and_on_three(world_size: int) -> None:
    check_exact(_SUBJECTS, [Case("simclr", 1, 2), Case("moco", 2, 1, "adamw")], world_size)


def test_a_ten_thousandth_of_a_difference_is_noticed() -> None:
    wrong = {"simclr": Subject(SimCLRConfig(**HEAD), _simclr_of_half)}
    with pytest.raises(AssertionError):
        check_exact(wrong, [Case("simclr")], 1)


def test_a_loaded_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    check_resume(_SUBJECTS, [Case("moco", 3), Case("simclr", 1, 2)], tmp_path)
