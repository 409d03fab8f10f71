"""What a run computes in: measured once, recorded, the same on every rank and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from clipsys.config import load_settings
from clipsys.errors import ConfigError
from clipsys.inference.threads import Arrangement
from clipsys.probe.figures import Figures
from clipsys.probe.probing import Work
from clipsys.training import precision
from clipsys.training.model.initial import initial_model
from clipsys.training.precision import agrees, choose_training_precision, training_work
from clipsys.training.recipe import Recipe
from tests.ranks import run_ranks
from tests.training.runs import Attempt, write_recipe

CPU = torch.device("cpu")


def _recipe(folder: Path, **engine: Any) -> Recipe:
    return load_settings(Recipe, write_recipe(folder, "shards/*.tar", engine=engine))


def _choose(recipe: Recipe) -> tuple[str, int | None]:
    """Precision and threads, with the number of torch's threads as it was."""
    threads = torch.get_num_threads()
    try:
        engine = choose_training_precision(recipe, initial_model(recipe.model), CPU).engine
    finally:
        torch.set_num_threads(threads)
    return engine.precision, engine.threads


def _measured(monkeypatch: pytest.MonkeyPatch, figures: Figures | None) -> list[Work]:
    asked: list[Work] = []

    def probe(work: Work) -> Figures | None:
        asked.append(work)
        return figures

    monkeypatch.setattr(precision, "probe", probe)
    return asked


EPYC = Figures({"fp32": 88.0, "bf16": 378.0}, "bf16", (), Arrangement(1))


def test_auto_is_what_is_measured_to_be_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _measured(monkeypatch, EPYC)
    assert _choose(_recipe(tmp_path)) == ("bf16", None)
    asked = _measured(monkeypatch, Figures({"fp32": 9.0, "bf16": 5.0}, "fp32", (), Arrangement(3)))
    assert _choose(_recipe(tmp_path)) == ("fp32", 3)
    assert [work.trains for work in asked] == [True]
    _measured(monkeypatch, None)
    assert _choose(_recipe(tmp_path)) == ("fp32", None)


def test_what_the_recipe_says_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = _measured(monkeypatch, EPYC)
    assert _choose(_recipe(tmp_path, precision="fp32")) == ("fp32", None)
    assert _choose(_recipe(tmp_path, precision="bf16", threads=2)) == ("bf16", 2)
    assert asked == []
    assert _choose(_recipe(tmp_path, threads=2)) == ("bf16", 2)
    monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_fp16_supported", lambda: False)
    with pytest.raises(ConfigError, match="this processor cannot compute in fp16"):
        _choose(_recipe(tmp_path, precision="fp16"))


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [
        ({"precision": "fp32", "threads": 2}, ("fp32", 2)),
        ({"precision": "bf16"}, ("bf16", None)),
        ({"precision": "auto"}, ("fp32", None)),  # of clipsys 0.1, on a processor without AMX
    ],
)
def test_a_run_that_is_resumed_computes_as_it_did(
    recorded: dict[str, Any],
    expected: tuple[str, int | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = _measured(monkeypatch, EPYC)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    recipe = _recipe(tmp_path)
    recipe.run_folder.mkdir()
    (recipe.run_folder / "config.yaml").write_text(yaml.safe_dump({"engine": recorded}))
    assert _choose(recipe) == expected
    assert asked == []


def test_a_record_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    recipe.run_folder.mkdir()
    (recipe.run_folder / "config.yaml").write_text("engine: [")
    with pytest.raises(ConfigError, match=r"config\.yaml: .* state engine\.precision"):
        _choose(recipe)


def test_the_work_of_a_step_is_that_of_a_micro_batch_on_each_rank(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    model = initial_model(recipe.model)
    products = training_work(recipe, model).products()
    (patches,) = (product for product in products if product.convolution)
    assert patches.left == (8, 3, 32, 32)
    smaller = recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"micro_batch_size": 2})}
    )
    (patches,) = (one for one in training_work(smaller, model).products() if one.convolution)
    assert patches.left == (2, 3, 32, 32)
    assert training_work(smaller, model).signature != training_work(recipe, model).signature


@pytest.mark.parametrize(
    ("loss", "exact", "expected"),
    [
        (4.852, 4.851, True),
        (0.04, 0.01, True),
        (5.0, 4.7, False),
        (0.2, 0.01, False),
        (float("nan"), 4.0, False),
        (4.0, float("inf"), False),
    ],
)
def test_a_first_loss_agrees_within_what_bf16_may_change(
    loss: float, exact: float, expected: bool
) -> None:
    assert agrees(loss, exact) == expected


def _choose_on_each(rank: int, world_size: int, folder: str) -> tuple[str, int | None]:
    # Each rank would measure something else; what rank 0 measured counts.
    chosen = ("bf16", 1) if rank == 0 else ("fp32", 7)
    figures = Figures({"fp32": 1.0, "bf16": 2.0}, chosen[0], (), Arrangement(chosen[1]))
    precision.probe = lambda work: figures  # type: ignore[assignment]
    return _choose(_recipe(Path(folder, str(rank))))


def test_all_ranks_take_what_the_first_one_measured(tmp_path: Path) -> None:
    assert run_ranks(_choose_on_each, 2, str(tmp_path)) == [("bf16", None)] * 2


def _train_measured(rank: int, world_size: int, folder: str, shards: str, tolerance: float) -> Any:
    """A run whose machine is fast in bf16, killed and resumed on one that is not; and its log."""
    from tests.training.runs import _attempt_all

    precision.LOSS_MARGIN = precision.LOSS_TOLERANCE = tolerance
    logs = []
    for speed, resume in (("bf16", False), ("fp32", True)):
        figures = Figures({"fp32": 1.0, "bf16": 2.0}, speed, (), Arrangement(1))
        precision.probe = lambda work, figures=figures: figures  # type: ignore[assignment]
        recipe = Path(folder) / "recipe.yaml"
        overrides = () if resume else ("schedule.epochs=1",)
        (outcome,) = _attempt_all(rank, world_size, [Attempt(recipe, overrides, resume)])
        logs.append((outcome.error, outcome.log))
    return logs


@pytest.mark.parametrize(("tolerance", "expected"), [(0.5, "bf16"), (0.0, "fp32")])
def test_the_first_loss_decides_and_the_decision_is_recorded(
    tolerance: float, expected: str, shards: str, tmp_path: Path
) -> None:
    write_recipe(tmp_path, shards, evaluation={"every_epochs": 0})
    ((started, resumed), _) = run_ranks(_train_measured, 2, str(tmp_path), shards, tolerance)
    assert not started[0]
    word = "precision: bf16 (first loss" if expected == "bf16" else "precision: fp32, not bf16 (the"
    assert word in started[1]
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["engine"]
    assert recorded["precision"] == expected
    assert not resumed[0]
    assert f"2 process(es) on cpu, {expected}, ZeRO" in resumed[1]
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert "# after step 6: schedule.epochs 2 instead of 1" in text
    assert "precision" not in text[: text.index("output")]
