"""Whole runs over stored features of locked towers, with two ranks: resumed, reused, unlocked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import clipsys
from clipsys.config import load_settings
from clipsys.errors import ConfigError
from clipsys.images.decoding import decode_image
from clipsys.shards.reading import iterate_raw
from clipsys.shards.samples import parse_sample
from clipsys.training.data.augmentation import AugmentationConfig, augment, normalisation
from clipsys.training.features.extraction import view_seed
from clipsys.training.journal import read_metrics
from clipsys.training.model.initial import initial_model
from clipsys.training.phases import locked_phase, unlocked_phase
from clipsys.training.recipe import Recipe
from tests.training.runs import (
    Attempt,
    Runs,
    have_same_weights,
    kill_ranks,
    train_in_group,
    weights_of,
    write_recipe,
)
from tests.two_towers import tower_sections

_UNLOCK = {"image_blocks": 1, "text_blocks": 1, "epochs": 1, "lr": 1e-4}


def _sections(folder: Path, shards: str, name: str, **further: Any) -> Path:
    sections: dict[str, Any] = {
        "model": tower_sections(folder),
        "engine": {"precision": "fp32", "zero_stage": 1},
        "features": {"folder": str(folder / "features"), "views": 3, "batch_size": 7},
        "evaluation": {"every_epochs": 1},
        **further,
    }
    return write_recipe(folder / name, shards, **sections)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shards: str) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("locked")
    recipes = {
        name: _sections(folder, shards, name, **further)
        for name, further in (
            ("whole", {}),
            ("killed", {}),
            ("stages", {"engine": {"precision": "fp32", "zero_stage": 3}}),
            ("phases", {"unlock": _UNLOCK}),
            ("stopped", {"unlock": _UNLOCK}),
            (
                "texts",
                {"unlock": {**_UNLOCK, "image_blocks": 0}, "optimizer": {"layer_decay": 0.9}},
            ),
        )
    }
    kill_ranks(8, recipes["killed"])
    kill_ranks(14, recipes["stopped"])  # after the 12 steps of the first phase
    attempts = {
        "whole": Attempt(recipes["whole"]),
        "killed": Attempt(recipes["killed"], resume=True),
        "stages": Attempt(recipes["stages"]),
        "phases": Attempt(recipes["phases"]),
        "stopped": Attempt(recipes["stopped"], resume=True),
        "texts": Attempt(recipes["texts"]),
        "changed": Attempt(recipes["whole"], ("features.views=2",), resume=True),
    }
    first, _ = train_in_group(list(attempts.values()), 2)
    yield Runs(folder, dict(zip(attempts, first, strict=True)))
    shutil.rmtree(folder)


def test_a_locked_run_changes_its_heads_alone(runs: Runs) -> None:
    assert runs.outcomes["whole"].error == ""
    begun = load_settings(Recipe, runs.folder / "whole" / "recipe.yaml", ())
    torch.manual_seed(begun.seed)
    before = initial_model(begun.model).model.state_dict()
    after = weights_of(runs.folder / "whole" / "run")
    changed = {
        name for name, tensor in after.items() if not np.array_equal(before[name].numpy(), tensor)
    }
    assert changed <= {"logit_scale", "visual.head.proj.weight", "text.proj.weight"}
    assert "visual.head.proj.weight" in changed
    assert clipsys.load(runs.folder / "whole" / "run").dim == 16


def test_validation_over_features_is_that_of_the_exported_model(runs: Runs, shards: str) -> None:

    run = runs.folder / "whole" / "run"
    measured = [
        line["val/text_to_image/recall@10"]
        for line in read_metrics(run)
        if "val/text_to_image/recall@10" in line
    ][-1]
    encoder = clipsys.load(run, precision="fp32")
    samples = [parse_sample(raw) for raw in iterate_raw([*map(str, _shards(shards))])]
    image_ND = encoder.encode_image([decode_image(one.image, uri="") for one in samples])
    texts = [(caption, place) for place, one in enumerate(samples) for caption in one.captions]
    text_MD = encoder.encode_text([caption for caption, _ in texts])
    best = np.argsort(-(text_MD @ image_ND.T), axis=1)[:, :10]
    captions = [set(one.captions) for one in samples]
    hits = [
        any(caption in captions[found] for found in row)
        for (caption, _), row in zip(texts, best, strict=True)
    ]
    assert measured == pytest.approx(np.mean(hits), abs=0.021)


def _shards(pattern: str) -> list[Path]:
    path = Path(pattern)
    return sorted(path.parent.glob(path.name))


def test_features_are_computed_once_for_runs_with_the_same_towers_and_data(runs: Runs) -> None:
    stores = [path.name for path in (runs.folder / "features").iterdir()]
    assert len(stores) == 3  # images, texts, and the tokens of a text tower that is trained
    assert "computed once, and stored in" not in runs.outcomes["whole"].log
    assert "1 of 1 blocks are stored" in runs.outcomes["whole"].log


def test_stored_features_are_those_of_the_trunk_on_the_view(runs: Runs, shards: str) -> None:
    recipe = load_settings(Recipe, runs.folder / "whole" / "recipe.yaml", ())
    parts = initial_model(recipe.model)
    (store,) = (runs.folder / "features").glob("image-*")
    stored = np.load(store / "00000.npy")
    assert stored.shape[0] == 50 * 3
    samples = [parse_sample(raw) for raw in iterate_raw([*map(str, _shards(shards))])]
    mean, std = normalisation(parts.preprocessing, torch.device("cpu"))
    for number, view in ((0, 0), (7, 2), (49, 1)):
        pixels = parts.preprocessing.fast_pixels(_stored(samples[number].image, parts))
        image = augment(
            torch.from_numpy(pixels[None]),
            AugmentationConfig(**recipe.augmentation.model_dump()),
            (64, 64),
            mean,
            std,
            torch.Generator().manual_seed(view_seed(recipe.seed, number, view)),
        )
        with torch.no_grad():
            expected = parts.model.visual.trunk.eval()(image)[0].numpy()  # type: ignore[union-attr,operator]
        assert np.abs(stored[number * 3 + view] - expected).max() < 2e-3 * np.abs(expected).max()


def _stored(data: bytes, parts: Any) -> Any:
    from clipsys.images.decoding import decode_stored

    return decode_stored(data, uri="", min_side=parts.preprocessing.fast_min_side)


def test_a_killed_locked_run_goes_on_bit_for_bit(runs: Runs) -> None:
    assert runs.outcomes["killed"].error == ""
    assert have_same_weights(runs.folder / "whole" / "run", runs.folder / "killed" / "run")


def test_stage_3_trains_the_same_heads(runs: Runs) -> None:
    assert runs.outcomes["stages"].error == ""
    whole, stages = (weights_of(runs.folder / name / "run") for name in ("whole", "stages"))
    for name, tensor in whole.items():
        assert np.allclose(tensor, stages[name], atol=1e-5), name


def test_the_second_phase_unlocks_blocks_and_begins_with_the_heads(runs: Runs) -> None:
    assert runs.outcomes["phases"].error == ""
    run = runs.folder / "phases" / "run"
    heads, unlocked = weights_of(run / "locked"), weights_of(run)
    assert have_same_weights(runs.folder / "whole" / "run", run / "locked")
    changed = {name for name in heads if not np.array_equal(heads[name], unlocked[name])}
    assert "visual.trunk.conv_head.weight" in changed
    assert "text.transformer.encoder.layer.0.output.dense.weight" in changed
    assert "visual.trunk.conv_stem.weight" not in changed
    assert "text.transformer.embeddings.word_embeddings.weight" not in changed
    card = json.loads((run / "model" / "clipsys.json").read_text())
    assert card["provenance"]["recipe"]["unlock"]["lr"] == 1e-4
    assert card["provenance"]["recipe"]["optimizer"]["lr"] == 1e-3


def test_a_text_tower_is_trained_over_the_stored_features_of_images(runs: Runs) -> None:
    outcome = runs.outcomes["texts"]
    assert outcome.error == ""
    assert "tokens: computed once" in outcome.log
    run = runs.folder / "texts" / "run"
    heads, unlocked = weights_of(run / "locked"), weights_of(run)
    changed = {name for name in heads if not np.array_equal(heads[name], unlocked[name])}
    assert "visual.head.proj.weight" in changed
    assert "text.transformer.encoder.layer.0.output.dense.weight" in changed
    assert not any(name.startswith("visual.trunk.") for name in changed)
    figures = [line for line in read_metrics(run) if "val/text_to_image/recall@10" in line]
    assert figures


def test_a_run_killed_in_its_second_phase_goes_on_there(runs: Runs) -> None:
    outcome = runs.outcomes["stopped"]
    assert outcome.error == ""
    assert "the heads are trained already" in outcome.log
    assert have_same_weights(runs.folder / "phases" / "run", runs.folder / "stopped" / "run")


def test_a_resumed_run_keeps_its_views(runs: Runs) -> None:
    assert "features.views was 3" in runs.outcomes["changed"].error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("objective.name=simclr", "locked towers are trained over stored features"),
        ("engine.compile=true", "engine.compile does nothing for locked towers"),
        ("optimizer.layer_decay=0.8", "optimizer.layer_decay does nothing for locked towers"),
        ("unlock.image_blocks=0", "nothing would be unlocked"),
    ],
)
def test_what_does_nothing_for_locked_towers_is_refused(
    runs: Runs, change: str, message: str
) -> None:
    name = "phases" if change.startswith("unlock") else "whole"
    overrides = (change, "unlock.text_blocks=0") if name == "phases" else (change,)
    with pytest.raises(ConfigError, match=message):
        load_settings(Recipe, runs.folder / name / "recipe.yaml", overrides)


def test_features_without_locked_towers_are_refused(runs: Runs) -> None:
    overrides = ("model.image_tower.unlocked_blocks=1",)
    with pytest.raises(ConfigError, match="features are stored of locked towers only"):
        load_settings(Recipe, runs.folder / "whole" / "recipe.yaml", overrides)
    with pytest.raises(ConfigError, match="unlock is the second phase of a run with locked"):
        load_settings(
            Recipe, runs.folder / "phases" / "recipe.yaml", (*overrides, "features.views=1",
                                                            "features.folder=null",
                                                            "features.batch_size=64")
        )  # fmt: skip


def test_the_phases_differ_in_what_the_recipe_says(runs: Runs) -> None:
    recipe = load_settings(Recipe, runs.folder / "phases" / "recipe.yaml", ())
    first, second = locked_phase(recipe), unlocked_phase(recipe)
    assert first.model.stored_towers == ("image", "text")
    assert not second.model.stored_towers
    assert (second.optimizer.lr, second.schedule.epochs) == (1e-4, 1)
