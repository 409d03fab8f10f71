from __future__ import annotations

import json
from pathlib import Path

import pytest

from clipsys.errors import TrainingError
from clipsys.training.data.samples import Skipped
from clipsys.training.data.skips import SkipLedger


def _ledger(run: Path, *, max_share: float = 0.01, writes: bool = True) -> SkipLedger:
    return SkipLedger(run, max_share=max_share, epoch_samples=1000, writes=writes)


def _bad(number: int, reason: str = "corrupt") -> Skipped:
    return Skipped("a.tar", f"{number}", reason)


def _listed(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]


def test_skipped_samples_are_listed_and_counted_by_reason(tmp_path: Path) -> None:
    ledger = _ledger(tmp_path)
    assert ledger.summary() is None
    ledger.add([_bad(1), _bad(2, "truncated")], step=3, seen=30)
    ledger.add([_bad(3)], step=4, seen=40)
    assert _listed(tmp_path)[1] == {
        "step": 3, "shard": "a.tar", "key": "2", "reason": "truncated"
    }  # fmt: skip
    summary = ledger.summary()
    assert summary is not None and "3 samples" in summary
    assert summary.endswith("(2 corrupt, 1 truncated)")


def test_the_run_stops_when_the_share_is_passed_and_not_before(tmp_path: Path) -> None:
    ledger = _ledger(tmp_path)
    ledger.add([_bad(number) for number in range(10)], step=1, seen=50)  # 1 % of an epoch
    with pytest.raises(TrainingError, match=r"11 samples .* data\.max_bad_share = 1\.0%; the last"):
        ledger.add([_bad(10)], step=2, seen=100)
    # Later, the share is that of what was seen.
    ledger = _ledger(tmp_path)
    ledger.add([_bad(number) for number in range(30)], step=9, seen=3000)
    with pytest.raises(TrainingError):
        ledger.add([_bad(30)], step=9, seen=3000)


def test_a_share_of_nothing_lets_one_pass(tmp_path: Path) -> None:
    ledger = _ledger(tmp_path, max_share=0.0)
    ledger.add([_bad(0)], step=1, seen=8)
    with pytest.raises(TrainingError):
        ledger.add([_bad(1)], step=2, seen=16)


def test_a_resumed_run_forgets_the_steps_that_it_does_again(tmp_path: Path) -> None:
    ledger = _ledger(tmp_path)
    for step in (2, 4, 6):
        ledger.add([_bad(step)], step=step, seen=8 * step)
    with (tmp_path / "skipped.jsonl").open("a") as file:
        file.write('null\n\x00\x00\n{"step": 7, "sha')  # the kill came while this was written
    resumed = _ledger(tmp_path)
    resumed.resume(4, {"corrupt": 2})
    assert [entry["step"] for entry in _listed(tmp_path)] == [2, 4]
    resumed.add([_bad(6)], step=6, seen=48)
    assert [entry["step"] for entry in _listed(tmp_path)] == [2, 4, 6]
    assert resumed.reasons == {"corrupt": 3}


def test_one_rank_writes_and_all_count(tmp_path: Path) -> None:
    ledger = _ledger(tmp_path, writes=False)
    ledger.add([_bad(1)], step=1, seen=8)
    assert ledger.reasons.total() == 1
    assert not list(tmp_path.iterdir())
