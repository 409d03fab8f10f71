from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from clipsys.errors import TrainingError
from clipsys.training.distributed import collectives
from tests.ranks import run_ranks


def _wait_for_rank_0(rank: int, world_size: int, folder: Path) -> list[str]:
    """In a group whose collectives wait for a second."""

    def join(name: str, timeout_s: float) -> None:
        dist.destroy_process_group()
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / name}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )

    join("impatient", 1)
    outcomes = [collectives.on_first_rank(lambda: time.sleep(2) or "counted")]
    collectives.HEARTBEAT_LOST_S = 0.5
    try:
        collectives._HEARTBEAT_S = 0.1
        outcomes.append(collectives.on_first_rank(lambda: time.sleep(1) or "alive"))
        collectives._HEARTBEAT_S = 30.0
        collectives.on_first_rank(lambda: time.sleep(2))
    except TrainingError as error:
        outcomes.append(str(error))
    except RuntimeError:  # rank 0 finds itself alone
        outcomes.append("alone")
    join("patient", 60)
    return outcomes


def test_rank_0_may_take_longer_than_a_collective_waits_while_it_lives(tmp_path: Path) -> None:
    first, second = run_ranks(_wait_for_rank_0, 2, tmp_path)
    assert first == ["counted", "alive", "alone"]
    assert second[:2] == ["counted", "alive"]
    assert "rank 0 has not answered for 0.5 s" in second[2]
