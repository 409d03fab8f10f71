"""Whole runs and what they leave: exports, curves, and resuming after real kills."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import clipsys
from clipsys.background.captions import read_captions, words_of
from clipsys.config import load_settings
from clipsys.errors import TrainingError
from clipsys.training.export import export_model
from clipsys.training.journal import plot_curves, read_metrics
from clipsys.training.loop import TrainingLoop
from clipsys.training.recipe import Recipe
from tests.conftest import noise_image
from tests.training.runs import (
    PLAIN,
    STEPS_PER_EPOCH,
    Attempt,
    have_same_weights,
    kill_ranks,
    train,
    train_in_group,
    wait_until_nothing_is_left,
    weights_of,
    write_recipe,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shards: str) -> Path:
    """A run of two processes that went through to the end."""
    folder = tmp_path_factory.mktemp("finished")
    done = train(write_recipe(folder, shards, data={"workers": 1}), "--nproc", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(folder / "run" / "model")]
    return folder / "run"


def test_a_run_leaves_everything_that_was_promised(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "tensorboard",
        "model",
        "curves.png",
    } <= names
    assert not list(finished.rglob("*.partial"))
    figures = read_metrics(finished)
    losses = [entry["loss"] for entry in figures if "loss" in entry]
    assert all(np.isfinite(losses))
    last = [entry for entry in figures if "val/text_to_image/recall@10" in entry][-1]
    assert last["step"] == 2 * STEPS_PER_EPOCH
    assert last["val/text_to_image/candidates"] == 50


def test_the_exported_model_measures_as_it_did_in_training(
    finished: Path, shards: str, tmp_path: Path
) -> None:
    from clipsys.evaluation.measuring import evaluate

    export_model(finished, tmp_path / "m")
    (result,) = evaluate(tmp_path / "m", "retrieval", shards, cache=False)
    metrics = result.metrics()
    last = [entry for entry in read_metrics(finished) if "val/text_to_image/recall@10" in entry][-1]
    for name in ("text_to_image/recall@10", "image_to_text/recall@5", "text_to_image/median_rank"):
        assert metrics[name] == pytest.approx(last[f"val/{name}"], abs=0.02)
    assert {name for name in last if name.startswith("val/text_to_image/")} == {
        f"val/{name}" for name in metrics if name.startswith("text_to_image/")
    }


def test_the_captions_that_searches_are_judged_by_go_with_the_model(
    finished: Path, tmp_path: Path
) -> None:
    captions = read_captions(finished / "model")
    assert captions is not None
    assert len(captions.captions) > 10
    assert set(words_of(" ".join(captions.captions))) <= captions.words.keys()
    for name, step in (("last", None), ("earlier", STEPS_PER_EPOCH)):
        export_model(finished, tmp_path / name, step=step)
        assert read_captions(tmp_path / name) == captions


def test_a_checkpoint_of_an_earlier_step_can_be_exported(finished: Path, tmp_path: Path) -> None:
    first = export_model(finished, tmp_path / "a", step=STEPS_PER_EPOCH)
    last = export_model(finished, tmp_path / "b")
    assert first != last
    with pytest.raises(TrainingError, match="no checkpoint at step 5; there are 6, 12"):
        export_model(finished, tmp_path / "c", step=5)
    with pytest.raises(TrainingError, match="not a run folder"):
        export_model(tmp_path, tmp_path / "c")
    assert clipsys.load(finished).encode_image([noise_image(0)]).shape == (1, 32)


def test_a_run_whose_launcher_was_killed_ends_bit_for_bit_the_same(
    finished: Path, shards: str, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, shards, data={"workers": 1})
    command = [sys.executable, "-m", "clipsys", "train", str(recipe), "--nproc", "2"]
    mark = f"CLIPSYS_TEST_MARK={tmp_path}"
    running = subprocess.Popen(
        command,
        env={**os.environ, "CLIPSYS_TEST_MARK": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    latest = tmp_path / "run" / "checkpoints" / "latest"
    deadline = time.monotonic() + 200
    while not latest.exists() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)  # the launcher; its ranks notice and end by themselves
    running.wait()
    wait_until_nothing_is_left(mark)
    assert latest.exists()
    done = train(recipe, "--nproc", 2, "--resume")
    assert done.returncode == 0, done.stderr
    # How far the ranks came before they noticed is the machine's business.
    assert re.search("resuming after step (6|12) of 12", done.stderr)
    assert have_same_weights(finished, tmp_path / "run")


@pytest.mark.parametrize("zero_stage", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_step_ends_bit_for_bit_the_same(
    finished: Path, shards: str, tmp_path: Path, zero_stage: int
) -> None:
    settings: dict[str, Any] = {"engine": {"zero_stage": zero_stage}}
    expected = finished
    if zero_stage != 1:  # what `finished` has
        train_in_group([Attempt(write_recipe(tmp_path / "whole", shards, **settings))], 2)
        expected = tmp_path / "whole" / "run"
    # Resumed with other numbers of workers each time: they change nothing either.
    settings["checkpoint"] = {"every_epochs": 0, "every_steps": 2}
    recipe = write_recipe(tmp_path, shards, **settings)
    kills = sorted(random.Random(4).sample(range(3, 2 * STEPS_PER_EPOCH + 1), 3))
    sys.stderr.write(f"killed in steps {kills}\n")
    saved = 0
    for workers, step in enumerate(kills):
        resume = ["--resume"] if saved else []
        kill_ranks(step - saved, recipe, f"data.workers={workers}", *resume)
        saved = (step - 1) // 2 * 2
        latest = (tmp_path / "run" / "checkpoints" / "latest").read_text().strip()
        assert latest == f"step-{saved:08d}"
    resumed = train_in_group([Attempt(recipe, resume=True)], 2)[0][0]
    assert f"resuming after step {saved} of 12" in resumed.log
    assert have_same_weights(expected, tmp_path / "run")


@pytest.mark.parametrize("zero_stage", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_another_number_of_processes(
    shards: str, tmp_path: Path, zero_stage: int
) -> None:
    # No augmentation and no dropout: then the number of processes may change nothing but rounding.
    sections: dict[str, Any] = {
        "engine": {"zero_stage": zero_stage},
        "augmentation": PLAIN,
        "evaluation": {"every_epochs": 0},
    }
    whole, parted = (
        write_recipe(tmp_path / name, shards, **sections) for name in ("whole", "parted")
    )
    kill_ranks(9, parted, "checkpoint.every_steps=4")
    ((_, resumed),) = train_in_group([Attempt(whole), Attempt(parted, resume=True)], 1)
    assert "resuming after step 8 of 12" in resumed.log
    assert "1 process(es) instead of 2: the batches go on" in resumed.log
    expected, actual = (weights_of(recipe.parent / "run") for recipe in (whole, parted))
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-3, atol=2e-5)


def test_a_run_folder_is_neither_overwritten_nor_resumed_as_another_run(finished: Path) -> None:
    recipe = finished.parent / "recipe.yaml"
    attempts = [Attempt(recipe), Attempt(recipe, ("seed=5",), resume=True)]
    for used, other in train_in_group(attempts, 2):
        assert "the run folder is not empty; go on with --resume" in used.error
        assert "seed was 0 at step 12, now it is 5" in other.error


def test_muon_goes_on_bit_for_bit_from_a_checkpoint(shards: str, tmp_path: Path) -> None:
    muon = {"name": "muon", "lr": 1e-3}
    recipe = write_recipe(tmp_path, shards, optimizer=muon, engine={"zero_stage": 0})
    whole, again = tmp_path / "run", tmp_path / "again"
    ((begun,),) = train_in_group([Attempt(recipe)], 1)
    assert not begun.error
    shutil.copytree(whole, again)
    shutil.rmtree(again / "model")
    name = f"step-{STEPS_PER_EPOCH:08d}"
    (again / "checkpoints" / "latest").write_text(name, encoding="utf-8")
    ((resumed,),) = train_in_group([Attempt(recipe, (f"output={again}",), resume=True)], 1)
    assert not resumed.error
    assert f"resuming after step {STEPS_PER_EPOCH}" in resumed.log
    assert have_same_weights(whole, again)


def test_micro_batches_change_no_result(shards: str, tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "schedule": {"epochs": 1},
        "augmentation": PLAIN,
        "optimizer": {"name": "sgd", "lr": 0.05},
        "engine": {"zero_stage": 2},
    }
    recipes = [write_recipe(tmp_path / name, shards, **sections) for name in ("whole", "parts")]
    attempts = [Attempt(recipes[0]), Attempt(recipes[1], ("data.micro_batch_size=2",))]
    outcomes = train_in_group(attempts, 2)[0]
    losses = []
    for recipe, outcome, parted in zip(recipes, outcomes, (False, True), strict=True):
        assert ("2 micro-batches" in outcome.log) == parted
        assert "a step takes" in outcome.log
        (last,) = (entry for entry in read_metrics(recipe.parent / "run") if "loss" in entry)
        losses.append(last["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    whole, parts = (weights_of(recipe.parent / "run") for recipe in recipes)
    for name, weight in whole.items():
        np.testing.assert_allclose(parts[name], weight, atol=1e-5, rtol=0, err_msg=name)


def test_a_run_that_left_out_every_step_writes_no_model(tmp_path: Path) -> None:
    engine = SimpleNamespace(num_applied_steps=0)
    recipe = load_settings(Recipe, {"data": {"train": "x"}})
    run: Any = SimpleNamespace(engine=engine, folder=tmp_path, recipe=recipe)
    with pytest.raises(TrainingError, match="every one of the 0 steps was left out"):
        TrainingLoop(run)._finish()
    assert not list(tmp_path.iterdir())


def test_curves_are_drawn_even_of_an_empty_run(tmp_path: Path) -> None:
    plot_curves(tmp_path, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_steps_done_twice_count_once(tmp_path: Path) -> None:
    lines = [{"step": 10, "loss": 2.0}, {"step": 10, "val/x": 1}, {"step": 10, "loss": 1.5}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert read_metrics(tmp_path) == [{"step": 10, "val/x": 1}, {"step": 10, "loss": 1.5}]
