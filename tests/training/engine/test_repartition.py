"""Which files are divided again. That the state is the same: test_deepspeed_engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clipsys.errors import ConfigError, TrainingError
from clipsys.training.engine.repartition import SavedBy, parts_to_divide, read_saved_by


def _touch_parts(checkpoint: Path, *ranks: int) -> None:
    for rank in ranks:
        (checkpoint / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()


def test_the_number_of_ranks_that_saved_decides_and_not_the_number_of_files(tmp_path: Path) -> None:
    assert parts_to_divide(tmp_path, SavedBy(3, 0, "fp32")) == []  # the state is whole
    _touch_parts(tmp_path, *range(11))
    assert parts_to_divide(tmp_path, SavedBy(1, 1, "fp32")) == []
    names = [path.name for path in parts_to_divide(tmp_path, SavedBy(11, 1, "fp32"))]
    assert [name.split("_")[3] for name in names] == [str(number) for number in range(11)]
    with pytest.raises(TrainingError, match=r"zero_pp_rank_11_mp_rank_00_optim_states.pt is m"):
        parts_to_divide(tmp_path, SavedBy(12, 2, "fp32"))


def test_what_zero_stage_3_cannot_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="3 processes, and ZeRO stage 3 cannot divide it again"):
        parts_to_divide(tmp_path, SavedBy(3, 3, "fp32"))


def test_a_checkpoint_without_a_manifest_is_asked_who_saved_it(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"mp_rank_00_model_states.pt is missing"):
        read_saved_by(tmp_path)
    path = tmp_path / "mp_rank_00_model_states.pt"
    config = {
        "zero_optimization": {"stage": 2}, "bf16": {"enabled": True}, "fp16": {"enabled": False},
    }  # fmt: skip
    torch.save({"world_size": 2, "ds_config": config}, path)
    _touch_parts(tmp_path, 0)
    with pytest.raises(TrainingError, match=r"zero_pp_rank_1_\w+.pt is missing"):
        read_saved_by(tmp_path)
    _touch_parts(tmp_path, 1)
    assert read_saved_by(tmp_path) == SavedBy(2, 2, "bf16_params")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TrainingError, match=r"mp_rank_00_model_states.pt: cannot be read"):
        read_saved_by(tmp_path)
