"""Whole runs of objectives over images: shards without captions, heads, kills, other packages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import clipsys
from clipsys.errors import TrainingError
from clipsys.models.open_clip_models import HEADS_NAME, load_model, read_card
from clipsys.training.export import export_model
from clipsys.training.journal import read_metrics
from tests.conftest import TINY_MODEL, noise_image, write_training_shards
from tests.training.objectives.test_registry import install
from tests.training.runs import (
    Attempt,
    Runs,
    have_same_weights,
    kill_ranks,
    train_in_group,
    weights_of,
    write_recipe,
)

_MOCO: dict[str, Any] = {"name": "moco", "head_width": 8, "queue_size": 20, "momentum": 0.9}
_BANK: dict[str, Any] = {"name": "memory_bank", "head_width": 8, "form": "nce", "num_noise": 9}
_SWAV: dict[str, Any] = {
    "name": "swav", "head_width": 8, "num_prototypes": 6, "frozen_prototype_steps": 1,
    "queue_size": 10, "queue_start_step": 2, "num_local": 2, "local_size": 16,
}  # fmt: skip
_SECTIONS: dict[str, dict[str, Any]] = {
    "whole": {"objective": _MOCO},
    "killed": {"objective": _MOCO},
    "bank": {"objective": _BANK, "engine": {"zero_stage": 2}},
    "killed bank": {"objective": _BANK, "engine": {"zero_stage": 2}},
    "simclr": {
        "objective": {"name": "simclr", "head_width": 8, "learn_temperature": True},
        "data": {"micro_batch_size": 2},
        "engine": {"zero_stage": 2, "ema_decay": 0.5},
        "evaluation": {"knn": "cls", "match": "family"},
    },
    "looc": {
        "objective": {"name": "looc", "head_width": 8, "queue_size": 20, "momentum": 0.9,
                      "augmentations": ["colour", "geometry"]},
        "data": {"micro_batch_size": 2},
        "engine": {"zero_stage": 1},
        "schedule": {"epochs": 1},
    },
    "cpc": {
        "objective": {"name": "cpc", "frames": 3, "past": 2},
        "data": {"frames": {"sequence": "clip", "index": "place", "length": 3}},
        "schedule": {"epochs": 1},
    },
    "jigsaw": {"objective": {"name": "jigsaw"}, "schedule": {"epochs": 1}},
    "swav": {
        "objective": _SWAV,
        "model": {
            "architecture": {
                **TINY_MODEL,
                "vision_cfg": {
                    "image_size": 32, "timm_model_name": "test_resnet", "timm_pool": "avg",
                    "timm_proj": "linear",
                },
            }
        },
        "optimizer": {"name": "lars", "lr": 1.0},
        "engine": {"zero_stage": 0},
        "schedule": {"epochs": 1},
    },
    "one size": {"objective": _SWAV},
    "compact": {"objective": {"name": "compact"}, "schedule": {"epochs": 1}},
    "resnet": {
        "objective": {"name": "simclr"},
        "data": {"micro_batch_size": 2},
        "model": {
            "architecture": {
                **TINY_MODEL,
                "vision_cfg": {
                    "image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32
                },
            }
        },
    },
    "pairs": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Runs of two ranks on shards without captions; two were killed in their fifth step."""
    folder = tmp_path_factory.mktemp("runs")
    shards = write_training_shards(folder / "shards", 50, with_captions=False)
    recipes = {
        name: write_recipe(folder / name, shards, **sections)
        for name, sections in _SECTIONS.items()
    }
    for name in ("killed", "killed bank"):
        kill_ranks(5, recipes[name], "checkpoint.every_steps=2")
    install(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        attempts = [
            Attempt(path, resume=name.startswith("killed")) for name, path in recipes.items()
        ]
        outcomes = train_in_group(attempts, 2)[0]
    yield Runs(folder, dict(zip(recipes, outcomes, strict=True)))


def test_objectives_without_text_train_from_shards_without_captions(runs: Runs) -> None:
    for name in ("whole", "killed", "simclr", "looc", "cpc", "jigsaw", "swav", "compact"):
        assert runs.outcomes[name].error == "", name
        before_and_after = [e["loss"] for e in read_metrics(runs.folder / name / "run")
                            if "loss" in e]  # fmt: skip
        assert all(loss == loss for loss in before_and_after) and before_and_after
        # The text tower rests: nothing has decayed it.
        assert clipsys.load(runs.folder / name / "run").encode_image([noise_image(0)]).shape
    assert "data.validation: no item has a caption" in runs.outcomes["pairs"].error


def test_a_killed_run_with_momentum_towers_and_a_queue_ends_bit_for_bit_the_same(
    runs: Runs,
) -> None:
    assert "resuming after step 4 of 12" in runs.outcomes["killed"].log
    assert have_same_weights(runs.folder / "whole" / "run", runs.folder / "killed" / "run")
    whole, resumed = (_saved_state(runs.folder / name / "run") for name in ("whole", "killed"))
    assert whole["objective"]["queue"].shape == (20, 8)
    torch.testing.assert_close(resumed["objective"], whole["objective"], rtol=0, atol=0)
    names = [name for name in whole["module"] if name.startswith("momentum.")]
    assert "momentum.heads.projection.0.weight" in names
    assert not any("token_embedding" in name for name in names)
    for name in names:
        assert torch.equal(resumed["module"][name], whole["module"][name]), name


def test_a_killed_run_with_a_memory_bank_ends_bit_for_bit_the_same(runs: Runs) -> None:
    assert "resuming after step 4 of 12" in runs.outcomes["killed bank"].log
    whole, killed = (runs.folder / name / "run" for name in ("bank", "killed bank"))
    assert have_same_weights(whole, killed)
    expected, resumed = (_saved_state(run)["objective"] for run in (whole, killed))
    assert expected["bank"].shape == (50, 8) and int(expected["step"]) == 12
    assert bool(expected["log_normaliser"].isfinite())
    torch.testing.assert_close(resumed, expected, rtol=0, atol=0)


def _saved_state(run: Path) -> dict[str, Any]:
    path = run / "checkpoints" / "step-00000012" / "mp_rank_00_model_states.pt"
    state: dict[str, Any] = torch.load(path, weights_only=False)
    return state


def test_what_an_objective_does_not_train_does_not_change(runs: Runs) -> None:
    first, second = (weights_of(runs.folder / name / "run") for name in ("whole", "simclr"))
    for name, weight in first.items():
        is_image = name.startswith("visual.")
        # Both began with the same weights; weight decay alone would have changed them.
        assert (weight == second[name]).all() != is_image, name


def test_nearest_neighbours_are_measured_where_text_is_not_trained(runs: Runs) -> None:
    log = runs.outcomes["simclr"].log
    assert "retrieval is not measured: the objective trains no text" in log
    (last,) = (e for e in read_metrics(runs.folder / "simclr" / "run")
               if "val/knn/accuracy@1" in e and e["step"] == 12)  # fmt: skip
    assert last["val/knn/images"] == 50
    assert not any("recall" in name for name in last)
    assert "data.validation is not used; set evaluation.knn" in runs.outcomes["whole"].log
    learned = [
        e["logit_scale"] for e in read_metrics(runs.folder / "simclr" / "run") if "loss" in e
    ]
    assert learned[-1] != 10.0  # 1 / objective.temperature, before the first step


def test_heads_are_exported_when_asked_for_and_open_clip_does_not_mind(
    runs: Runs, tmp_path: Path
) -> None:
    import open_clip

    run = runs.folder / "simclr" / "run"
    plain = export_model(run, tmp_path / "plain")
    with_heads = export_model(run, tmp_path / "heads", with_heads=True)
    assert plain == with_heads
    assert not (tmp_path / "plain" / HEADS_NAME).exists()
    heads = load_file(tmp_path / "heads" / HEADS_NAME)
    card = json.loads((tmp_path / "heads" / "clipsys.json").read_text())
    assert card["heads"]["file"] == HEADS_NAME
    assert card["heads"]["parameters"] == {name: list(one.shape) for name, one in heads.items()}
    assert heads["projection.2.weight"].shape == (8, 32)
    assert read_card(tmp_path / "heads") is not None
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'heads'}")
    ours = load_model(tmp_path / "plain").model.state_dict()
    theirs = model.state_dict()
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())
    with pytest.raises(TrainingError, match="trained no heads; export without --with-heads"):
        export_model(runs.folder / "compact" / "run", tmp_path / "none", with_heads=True)


def test_a_run_over_frames_takes_windows_for_samples(runs: Runs) -> None:
    # 50 frames in clips of 10: 8 windows of 3 frames in each.
    assert "50 samples (40 windows) in" in runs.outcomes["cpc"].log
    steps = [e["step"] for e in read_metrics(runs.folder / "cpc" / "run") if "loss" in e]
    assert steps[-1] == 5


def test_what_an_objective_measures_is_logged_as_the_mean_over_ranks(runs: Runs) -> None:
    logged = [e for e in read_metrics(runs.folder / "jigsaw" / "run") if "loss" in e]
    # Of the eight images of a batch, which two ranks share.
    assert all(float(8 * e["accuracy"]).is_integer() and 0 <= e["accuracy"] <= 1 for e in logged)
    assert not any("accuracy" in e for e in read_metrics(runs.folder / "looc" / "run"))


def test_batch_norm_in_a_tower_refuses_micro_batches(runs: Runs) -> None:
    message = runs.outcomes["resnet"].error
    assert "data.micro_batch_size is 2, but clip.visual.bn1 is batch normalisation" in message
    assert not (runs.folder / "resnet" / "run").exists()


def test_a_tower_of_one_size_refuses_local_views_before_the_first_step(runs: Runs) -> None:
    message = runs.outcomes["one size"].error
    assert "does not take views of 16 x 16 pixels, only of 32 x 32; leave obj" in message
    assert not (runs.folder / "one size" / "run").exists()
