"""Ranks that differ in what each takes for granted are found before the first step."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clipsys.errors import ClipsysError, DataError, TrainingError
from clipsys.training.distributed.agreement import (
    on_every_rank,
    require_equal,
    require_same_files,
    require_shared,
)
from tests.ranks import run_ranks
from tests.training.runs import Attempt, have_same_weights, train_in_group, write_recipe


def _message(action: Callable[[], Any]) -> str:
    try:
        action()
    except ClipsysError as error:
        return str(error)
    return ""


def _disagree(rank: int, world_size: int, folder: str) -> list[str]:
    own = Path(folder, f"node-{rank}")
    own.mkdir(exist_ok=True)
    (own / "a.tar").write_bytes(b"x" * (10 + rank))
    os.chdir(own)  # so that relative names mean other files on each rank
    Path("data").mkdir()
    (Path("data") / "b.tar").write_bytes(b"x")
    if rank == 1:
        (Path("data") / "b.tar").unlink()

    def fail() -> None:
        if rank == 1:
            raise DataError("no usable image")

    return [
        _message(lambda: require_shared(own / "run", wait_s=0.2)),
        _message(lambda: require_shared(Path(folder, "shared", "run"))),
        _message(lambda: require_equal({"torch": "2", "lr": rank}, remedy="start it again")),
        _message(lambda: require_same_files(["a.tar"], setting="data.train")),
        _message(lambda: require_same_files(["data/b.tar"], setting="data.train")),
        _message(lambda: require_same_files([f"{folder}/node-0/a.tar"], setting="data.train")),
        _message(lambda: on_every_rank(fail)),
    ]


def test_every_rank_names_what_differs(tmp_path: Path) -> None:
    first, second, third = run_ranks(_disagree, 3, str(tmp_path))
    unshared, shared, unequal, other_size, missing, same, failed = first
    assert f"{tmp_path}/node-0/run: rank 1 on " in unshared
    assert "does not see the folder, which rank 0 on " in unshared
    assert "set output to a folder on storage that every machine sees" in unshared
    assert not shared and not same
    assert "has lr 1, and rank 0 on " in unequal and unequal.endswith("has 0; start it again")
    assert "data.train: a.tar has 11 bytes for rank 1 on " in other_size
    assert "data.train: data/b.tar cannot be read for rank 1 on " in missing
    assert failed.endswith(": no usable image") and failed.startswith("rank 1 on ")
    assert third[1:] == first[1:]
    assert second[-1] == "no usable image"
    # A run that is refused leaves nothing.
    assert not (tmp_path / "shared").exists()
    assert not list(tmp_path.glob("node-*/run"))


def test_one_process_proves_nothing(tmp_path: Path) -> None:
    require_shared(tmp_path / "run")
    require_equal({"lr": 1}, remedy="")
    require_same_files(["/nowhere"], setting="data.train")
    assert not (tmp_path / "run").exists()
    with pytest.raises(TrainingError):
        on_every_rank(lambda: (_ for _ in ()).throw(TrainingError("no")))


def _train_elsewhere(rank: int, world_size: int, recipes: list[Attempt]) -> list[str]:
    from tests.training.runs import _attempt_all

    folder = recipes[0].recipe.parent / f"rank-{rank}"
    folder.mkdir()
    os.chdir(folder)
    differing = (*recipes[0].overrides, f"optimizer.lr=1e-{3 + rank}")
    attempts = [*recipes, recipes[0]._replace(overrides=differing)]
    return [outcome.error for outcome in _attempt_all(rank, world_size, attempts)]


def test_ranks_started_in_other_folders_write_one_run(tmp_path: Path, shards: str) -> None:
    recipe = write_recipe(tmp_path, shards, evaluation={"every_epochs": 0})
    half = ("output=out/run", "schedule.epochs=1", "schedule.decay=constant")
    whole = ("output=out/run", "schedule.decay=constant")
    attempts = [Attempt(recipe, half), Attempt(recipe, whole, resume=True)]
    for first, resumed, differing in run_ranks(_train_elsewhere, 2, attempts):
        assert not first and not resumed
        assert "has optimizer.lr 0.0001, and rank 0 on " in differing
        assert "start every rank with the same recipe and overrides" in differing
    train_in_group([Attempt(recipe, (f"output={tmp_path}/plain", whole[1]))], 2)
    assert have_same_weights(tmp_path / "plain", tmp_path / "rank-0" / "out" / "run")
    assert not list((tmp_path / "rank-1").iterdir())
