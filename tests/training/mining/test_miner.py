"""When a list is mined, and what a checkpoint without one leads to."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from clipsys.errors import TrainingError
from clipsys.training.mining.config import MiningConfig
from clipsys.training.mining.miner import Miner

_NOTHING: Any = None


def _miner(run: Path, **settings: Any) -> Miner:
    return Miner(
        MiningConfig(**settings), _NOTHING, _NOTHING, run=run, num_negatives=1, steps_per_epoch=6,
        epochs=5, num_samples=40, width=8, batch_size=8, workers=0, timeout_s=9.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("start", "refresh", "expected"),
    [
        (0, 1, [0, 6, 12, 18, 24]),
        (1, 2, [6, 18]),
        (2, 1, [12, 18, 24]),
        (0, 4, [0, 24]),
        (5, 1, []),
    ],
)
def test_lists_are_mined_at_the_beginning_of_epochs(
    start: int, refresh: int, expected: list[int], tmp_path: Path
) -> None:
    miner = _miner(tmp_path, start_epoch=start, refresh_epochs=refresh)
    assert [step for step in range(31) if miner.is_due(step)] == expected
    ends = [miner._next_refresh(step) * 6 for step in range(30)]
    for step, end in enumerate(ends):
        assert step < end
        assert not any(step < due < end for due in expected)


def test_a_checkpoint_that_lacks_its_list_is_refused(tmp_path: Path) -> None:
    miner = _miner(tmp_path, start_epoch=1, refresh_epochs=2)
    for step in (3, 6, 18):  # before the first, and where one is mined anyway
        miner.resume(tmp_path, step)
        assert cast("Any", miner).mined is None
    for step in (7, 12):
        with pytest.raises(TrainingError, match=r"has no list of mined texts \(mined/\), which"):
            miner.resume(tmp_path, step)
