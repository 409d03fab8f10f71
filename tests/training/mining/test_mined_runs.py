"""Whole runs with texts beside captions: mined ones, and wrong ones of the metadata."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipsys.shards.samples import Sample
from clipsys.shards.writing import write_shards
from clipsys.training.data.further_texts import MinedList
from clipsys.training.journal import read_metrics
from tests.conftest import encode_png, noise_image
from tests.training.runs import (
    Attempt,
    Runs,
    have_same_weights,
    kill_ranks,
    train_in_group,
    write_recipe,
)

#: Loose bounds: a model of six steps tells nothing apart.
_MINING = {"start_epoch": 0, "depth": 20, "candidates": 4, "max_relative_similarity": None}
_MINED: dict[str, Any] = {"name": "mined_infonce", "num_negatives": 2, "mining": _MINING}
_NEGCLIP: dict[str, Any] = {
    "name": "negclip", "negatives_key": "wrong.texts", "num_negatives": 2,
}  # fmt: skip
_SECTIONS: dict[str, dict[str, Any]] = {
    "killed": {"objective": _MINED, "engine": {"zero_stage": 3}},
    "whole": {"objective": _MINED, "engine": {"zero_stage": 3}},
    "negclip": {"objective": _NEGCLIP, "data": {"micro_batch_size": 2}},
    "typo": {"objective": {**_NEGCLIP, "negatives_key": "wrong.text"}},
}


def _shards(folder: Path) -> str:
    def samples() -> Iterator[Sample]:
        for number in range(50):
            image = encode_png(np.asarray(noise_image(number, (32, 32))))
            metadata: dict[str, Any] = {"family": number // 2}
            if number % 5:
                metadata["wrong"] = [{"texts": [f"number picture {number}", f"no {number}"]}]
            captions = (f"picture number {number}", f"image {number}")
            # One that cannot be decoded.
            data = image if number != 7 else image[:60]
            yield Sample(f"{number:04d}", data, "png", captions, f"{number % 4}", metadata)

    write_shards(samples(), folder, shard_bytes=40_000)
    return str(folder / "*.tar")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs of two ranks; one was killed in the second epoch, between two refreshes."""
    folder = tmp_path_factory.mktemp("runs")
    shards = _shards(folder / "shards")
    rest: dict[str, Any] = {"evaluation": {"every_epochs": 0, "batch_size": 8}}
    recipes = {
        name: write_recipe(
            folder / name,
            shards,
            **{**rest, **sections, "data": {"max_bad_share": 0.5, **sections.get("data", {})}},
        )
        for name, sections in _SECTIONS.items()
    }
    kill_ranks(9, recipes["killed"], "checkpoint.every_steps=4")
    attempts = [Attempt(path, resume=name == "killed") for name, path in recipes.items()]
    outcomes = train_in_group(attempts, 2)[0]
    return Runs(folder, dict(zip(recipes, outcomes, strict=True)))


def _mined(run: Path) -> MinedList:
    return MinedList(run / "checkpoints" / "step-00000012" / "mined")


def test_a_list_is_mined_before_each_epoch_and_stands_in_the_checkpoints(runs: Runs) -> None:
    assert runs.outcomes["whole"].error == ""
    run = runs.folder / "whole" / "run"
    for step, mined_at in ((6, 6), (12, 6)):
        checkpoint = run / "checkpoints" / f"step-{step:08d}"
        assert MinedList(checkpoint / "mined").step == mined_at
        files = json.loads((checkpoint / "checkpoint.json").read_text())["files"]
        assert "mined/candidates.npy" in files
    assert [path.name for path in (run / "mining").iterdir()] == ["step-00000006"]
    entries = [entry for entry in read_metrics(run) if "mining/without" in entry]
    assert [entry["step"] for entry in entries] == [0, 6]


def test_the_list_has_other_samples_that_can_be_used_and_their_texts(runs: Runs) -> None:
    mined = _mined(runs.folder / "whole" / "run")
    for number in range(50):
        candidates = mined.candidates(number).tolist()
        assert len(set(candidates)) == len(candidates) == (0 if number == 7 else 4)
        assert number not in candidates and 7 not in candidates
    assert mined.text(3) in ("picture number 3", "image 3")
    assert mined.text(7) == ""


def test_a_killed_run_that_mines_ends_bit_for_bit_the_same(runs: Runs) -> None:
    assert runs.outcomes["killed"].error == runs.outcomes["whole"].error == ""
    assert "resuming after step 8 of 12" in runs.outcomes["killed"].log
    assert "mined hard negatives" not in runs.outcomes["killed"].log
    whole, killed = (runs.folder / name / "run" for name in ("whole", "killed"))
    assert _mined(killed).fingerprint() == _mined(whole).fingerprint()
    assert have_same_weights(whole, killed)


@pytest.mark.slow
def test_another_number_of_ranks_goes_on_with_the_list_of_the_checkpoint(
    runs: Runs, tmp_path: Path
) -> None:
    """ZeRO-3's checkpoints do not go on so, hence a run of its own."""
    recipe = write_recipe(
        tmp_path,
        str(runs.folder / "shards" / "*.tar"),
        objective=_MINED,
        data={"max_bad_share": 0.5, "workers": 1},
        evaluation={"every_epochs": 0, "batch_size": 8},
    )
    assert train_in_group([Attempt(recipe)], 2)[0][0].error == ""
    run = tmp_path / "run"
    whole = _mined(run).fingerprint()
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    (run / "checkpoints" / "latest").write_text("step-00000006")
    ((outcome,),) = train_in_group([Attempt(recipe, resume=True)], 1)
    assert outcome.error == ""
    assert "1 process(es) instead of 2" in outcome.log
    assert "mined hard negatives" not in outcome.log
    assert _mined(run).fingerprint() == whole


def test_wrong_captions_of_the_metadata_are_read(runs: Runs) -> None:
    outcome = runs.outcomes["negclip"]
    assert outcome.error == ""
    assert "about 80% of the samples have texts at wrong.texts" in outcome.log
    message = runs.outcomes["typo"].error
    assert "objective.negatives_key is 'wrong.text', and none of 50 samples has texts" in message
    assert "(their metadata has family, wrong); name the metadata key" in message
    assert not (runs.folder / "typo" / "run").exists()
