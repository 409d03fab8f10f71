"""Joining a process group; on a GPU by its number, with float32 that is float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from clipsys.training.distributed import process_group


def test_a_rank_on_a_gpu_takes_its_own_and_computes_convolutions_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[torch.device] = []
    joined: dict[str, Any] = {}

    class DeepSpeed:
        @staticmethod
        def init_distributed(**options: Any) -> None:
            joined.update(options)

    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(process_group, "choose_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(process_group, "import_deepspeed", lambda: DeepSpeed)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert process_group.start_processes("auto") == torch.device("cuda", 1)
    assert taken == [torch.device("cuda", 1)]
    assert joined["dist_backend"] == "nccl"
    assert not torch.backends.cudnn.allow_tf32
