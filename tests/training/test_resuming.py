"""Resuming with other settings, other stages and damaged checkpoints, by ranks of a real group."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clipsys.config import Settings, load_settings
from clipsys.errors import TrainingError
from clipsys.training.checkpoints import FOLDER, TrainState
from clipsys.training.data.shard_set import ShardSet
from clipsys.training.engine.repartition import SavedBy
from clipsys.training.loop import _check_folder, _check_same_run
from clipsys.training.manifest import MANIFEST_NAME
from clipsys.training.objectives import BUILT_IN, objective_class
from clipsys.training.recipe import Recipe
from clipsys.training.resuming import (
    CHANGEABLE,
    FIXED,
    Change,
    Resumption,
    changed_settings,
    is_fixed,
    write_recipe,
)
from tests.training import runs
from tests.training.runs import (
    STEPS_PER_EPOCH,
    Attempt,
    Outcome,
    have_same_weights,
    train_in_group,
)

_HALF = f"step-{STEPS_PER_EPOCH:08d}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shards: str) -> Path:
    """The recipe of a finished run of two ranks, two epochs and a checkpoint after each."""
    recipe = runs.write_recipe(
        tmp_path_factory.mktemp("run"), shards, evaluation={"every_epochs": 0}
    )
    for outcome in train_in_group([Attempt(recipe)], 2):
        assert not outcome[0].error
    return recipe


def _copy(finished: Path, name: str) -> Path:
    """A copy of the run as it was after its first epoch."""
    copy = finished.parent / name
    shutil.copytree(finished.parent / "run", copy)
    shutil.rmtree(copy / "model")
    shutil.rmtree(copy / FOLDER / f"step-{2 * STEPS_PER_EPOCH:08d}")
    (copy / FOLDER / "latest").write_text(_HALF)
    return copy


def _resume(finished: Path, changes: dict[str, tuple[str, ...]]) -> dict[str, Outcome]:
    """Resumes a copy of the run for each set of changes; what rank 1 met with."""
    attempts = [
        Attempt(finished, (f"output={_copy(finished, name)}", *overrides), resume=True)
        for name, overrides in changes.items()
    ]
    return dict(zip(changes, train_in_group(attempts, 2)[1], strict=True))


def test_what_can_change_takes_effect_and_nothing_else_does(finished: Path) -> None:
    overrides = {
        "same": (),
        "decay": ("optimizer.weight_decay=5.0",),
        "betas": ("optimizer.betas=[0.5, 0.98]",),
        "eps": ("optimizer.eps=1e-2",),
        "factor": ("optimizer.logit_scale_lr_factor=10",),
        "clipping": ("engine.gradient_clipping=0.01",),
        "stage": ("engine.zero_stage=2",),
    }
    outcomes = _resume(finished, overrides)
    assert [outcome.error for outcome in outcomes.values()] == [""] * len(overrides)
    whole = finished.parent / "run"
    same = {name for name in overrides if have_same_weights(whole, finished.parent / name)}
    # Stages 1 and 2 divide the same state in the same way.
    assert same == {"same", "stage"}
    text = (finished.parent / "decay" / "config.yaml").read_text()
    assert text.startswith("# after step 6: optimizer.weight_decay 5.0 instead of 0.2\n")
    assert not (finished.parent / "same" / "config.yaml").read_text().startswith("#")


def test_what_cannot_change_is_refused_with_its_name_and_both_values(finished: Path) -> None:
    changes = {
        "optimizer.name=sgd": "optimizer.name was 'adamw' at step 6, now it is 'sgd'",
        "optimizer.layer_decay=0.5": "optimizer.layer_decay was None at step 6, now it is 0.5",
        "engine.zero_stage=3": "engine.zero_stage was 1 at step 6, now it is 3",
        "engine.precision=bf16_params": "at step 6, now it is 'bf16_params'",
        "objective.loss=sigmoid": "objective.name was 'infonce' at step 6",
        "data.batch_size=4": "data.batch_size was 8 at step 6, now it is 4",
        "data.resampled=true": "data.resampled was False at step 6",
        "model.unlocked_image_blocks=1": "model.unlocked_image_blocks was None at step 6",
    }
    plain = {f"r{number}": (change,) for number, change in enumerate(changes)}
    outcomes = _resume(finished, plain)
    for outcome, (change, message) in zip(outcomes.values(), changes.items(), strict=True):
        assert message in outcome.error, change
        assert "which a resumed run cannot change" in outcome.error
        assert "or start a new run from its model (model.pretrained=" in outcome.error


def test_a_checkpoint_without_a_rank_s_file_is_refused_by_every_rank(finished: Path) -> None:
    part = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    copies = [_copy(finished, name) for name in ("lacking", "old-lacking", "old")]
    for copy in copies[:2]:
        (copy / FOLDER / _HALF / part).unlink()
    for copy in copies[1:]:  # what the version before wrote
        (copy / FOLDER / _HALF / MANIFEST_NAME).unlink()
    attempts = [Attempt(finished, (f"output={copy}",), resume=True) for copy in copies]
    for lacking, old_lacking, old in train_in_group(attempts, 2):
        assert f"the checkpoint is not whole: {part} is missing" in lacking.error
        assert f"the checkpoint is not whole: {part} is missing" in old_lacking.error
        assert not old.error
    assert have_same_weights(finished.parent / "run", copies[2])


def _leaves(settings: type[Settings], prefix: str = "") -> Iterator[str]:
    for name, info in settings.model_fields.items():
        inner = info.annotation
        if name == "objective":
            classes = [objective_class(one).config for one in BUILT_IN]
            yield from {leaf for one in classes for leaf in _leaves(one, "objective.")}
        elif isinstance(inner, type) and issubclass(inner, Settings):
            yield from _leaves(inner, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_every_setting_is_decided_and_documented() -> None:
    rules = (*FIXED, *CHANGEABLE)
    assert len(set(rules)) == len(rules)
    leaves = list(_leaves(Recipe))
    for leaf in leaves:
        assert any(f"{leaf}.".startswith(f"{rule}.") for rule in rules), leaf
    for rule in rules:
        assert any(f"{leaf}.".startswith(f"{rule}.") for leaf in leaves), rule
    page = Path(__file__).resolve().parents[2] / "docs" / "training.md"
    table = page.read_text(encoding="utf-8").partition("## Resuming")[2].partition("\n## ")[0]
    for rule in rules:
        assert f"`{rule}`" in table, rule


def test_a_setting_that_no_table_names_must_stay() -> None:
    assert is_fixed("model.something_new") and is_fixed("something.else")
    assert is_fixed("objective.name") and not is_fixed("objective.tile_size")
    assert not is_fixed("schedule.epochs") and is_fixed("model.architecture")


def _recipe(**sections: Any) -> Recipe:
    return load_settings(Recipe, {"data": {"train": "x"}, **sections})


def test_settings_that_a_record_lacks_are_not_compared() -> None:
    was = _recipe().model_dump(mode="json")
    del was["optimizer"]["betas"]
    now = _recipe(optimizer={"betas": [0.5, 0.9], "lr": 1.0})
    assert list(changed_settings(was, now)) == [Change("optimizer.lr", 5e-4, 1.0)]


def test_a_record_that_names_its_objective_as_a_loss_is_compared() -> None:
    was = _recipe().model_dump(mode="json")
    was["objective"]["loss"] = was["objective"].pop("name")
    assert not list(changed_settings(was, _recipe()))
    (change,) = changed_settings(was, _recipe(objective={"name": "sigmoid"}))
    assert change == Change("objective.name", "infonce", "sigmoid")


def test_auto_is_the_precision_that_ran() -> None:
    ran, unknown = (Resumption("", SavedBy(1, 1, precision), 4, ()) for precision in ("bf16", ""))
    assert ran.settle(_recipe()).engine.precision == "bf16"
    assert ran.settle(_recipe(engine={"precision": "fp32"})).engine.precision == "fp32"
    assert unknown.settle(_recipe()).engine.precision == "auto"


def test_the_recorded_recipe_keeps_the_changes_of_the_course_that_was_kept(tmp_path: Path) -> None:
    def resume(step: int, value: float) -> list[str]:
        saved: Any = None
        changes = (Change("optimizer.lr", 1.0, value),)
        write_recipe(tmp_path, _recipe(), Resumption("", saved, step, changes))
        lines = (tmp_path / "config.yaml").read_text().splitlines()
        assert load_settings(Recipe, tmp_path / "config.yaml") == _recipe()
        return [line for line in lines if line.startswith("#")]

    write_recipe(tmp_path, _recipe(), None)
    assert resume(4, 2.0) == ["# after step 4: optimizer.lr 2.0 instead of 1.0"]
    assert len(resume(8, 3.0)) == 2
    # Back to the checkpoint of step 4: what was changed there and later did not happen.
    assert resume(4, 5.0) == ["# after step 4: optimizer.lr 5.0 instead of 1.0"]


def test_other_shards_of_equal_counts_are_another_order() -> None:
    def state(*shards: str) -> TrainState:
        found = ShardSet(shards, (8,) * len(shards), (0,) * len(shards))
        return TrainState(4, 6, 8, 1, 0, order="same", shards=found.name_fingerprint())

    saved = state("/a/0.tar", "/a/1.tar")
    _check_same_run(Path("run"), saved, state("/moved/0.tar", "/moved/1.tar"))
    _check_same_run(Path("run"), replace(saved, shards=""), state("/a/1.tar", "/a/0.tar"))
    for other in (state("/a/1.tar", "/a/0.tar"), state("/a/0.tar", "/a/2.tar")):
        with pytest.raises(TrainingError, match="the samples or their order have changed"):
            _check_same_run(Path("run"), saved, other)
    sized = replace(saved, shard_sizes="a")
    _check_same_run(Path("run"), sized, saved)  # some are remote now
    with pytest.raises(TrainingError, match="the samples or their order have changed"):
        _check_same_run(Path("run"), sized, replace(saved, shard_sizes="b"))


def test_a_run_folder_that_cannot_be_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for run in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(TrainingError, match="is a file, not a folder; set output"):
            _check_folder(run, resume=False)
    (tmp_path / "run" / FOLDER).mkdir(parents=True)
    with pytest.raises(TrainingError, match=r"config\.yaml is missing"):
        _check_folder(tmp_path / "run", resume=True)
