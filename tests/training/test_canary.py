"""Sets that are not trained on: measured from before the first step, and across a resume."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from clipsys.config import load_settings
from clipsys.errors import ConfigError, DataError
from clipsys.images.preprocessing import Preprocessing
from clipsys.models.open_clip_models import build_model
from clipsys.training.journal import read_metrics
from clipsys.training.recipe import Recipe
from clipsys.training.validation.canary import Baseline, Canaries
from clipsys.training.validation.config import EvaluationConfig
from tests.clipsys.shards.test_samples import write_tar
from tests.conftest import TINY_MODEL, encode_png, noise_image
from tests.training.runs import Attempt, have_same_weights, train_in_group, write_recipe


def _canaries(sets: dict[str, Any], **settings: Any) -> Canaries:
    config = EvaluationConfig(canary=sets, **settings)
    return Canaries(config, Preprocessing((32, 32)), build_model(TINY_MODEL).tokenizer)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A shard of 12 labelled images without captions."""
    folder = tmp_path_factory.mktemp("labelled")
    members = [
        member
        for number in range(12)
        for member in (
            (f"{number:02}.png", encode_png(np.asarray(noise_image(number, (32, 32))))),
            (f"{number:02}.cls", ("cat", "dog", "bird")[number % 3].encode()),
        )
    ]
    return str(write_tar(folder / "0.tar", members))


def test_a_canary_is_measured_before_the_first_step_and_the_same_after_a_resume(
    shards: str, labelled: str, tmp_path: Path
) -> None:
    evaluation = {"canary": {"pets": labelled, "pairs": {"data": shards}}}
    sections: dict[str, Any] = {"evaluation": evaluation, "engine": {"zero_stage": 3}}
    whole = write_recipe(tmp_path / "whole", shards, **sections)
    cut = write_recipe(tmp_path / "cut", shards, **sections)
    outcomes = train_in_group(
        [
            Attempt(whole),
            # Stopped after one epoch of two: its checkpoint holds what the canaries showed first.
            Attempt(cut, ("schedule.epochs=1",)),
            Attempt(cut, ("evaluation.canary.later=" + labelled,), resume=True),
        ],
        2,
    )
    assert [one.error for one in outcomes[0]] == ["", "", ""]
    lines = [one for one in read_metrics(tmp_path / "whole" / "run") if "loss" not in one]
    assert [one["step"] for one in lines] == [0, 6, 12]
    assert {"canary/pets/zeroshot/accuracy@1", "canary/pairs/text_to_image/recall@10"} <= set(
        lines[0]
    )
    assert not any(name.startswith("val/") for name in lines[0])
    # The same shards and the same code as data.validation has.
    for line in lines[1:]:
        for name in ("text_to_image/recall@10", "image_to_text/recall@1"):
            assert line[f"canary/pairs/{name}"] == line[f"val/{name}"]
    first = lines[0]["canary/pairs/text_to_image/recall@10"]
    now = lines[1]["canary/pairs/text_to_image/recall@10"]
    told = f"canary pairs text_to_image/recall@10 {now:.3f} ({now - first:+.3f})"
    assert told in outcomes[0][0].log
    resumed = [one for one in read_metrics(tmp_path / "cut" / "run") if "loss" not in one]
    assert resumed[0] == lines[0]
    # A canary that is added later is measured when the run goes on, and compared with that.
    assert "canary/later/zeroshot/accuracy@1" in resumed[1]
    last = resumed[-1]["canary/pairs/text_to_image/recall@10"]
    assert f"recall@10 {last:.3f} ({last - first:+.3f})" in outcomes[0][2].log


def test_measuring_canaries_changes_no_weight(shards: str, labelled: str, tmp_path: Path) -> None:
    with_canary = write_recipe(tmp_path / "a", shards, evaluation={"canary": {"pets": labelled}})
    without = write_recipe(tmp_path / "b", shards)
    outcomes = train_in_group([Attempt(with_canary), Attempt(without)], 1)
    assert [one.error for one in outcomes[0]] == ["", ""]
    assert have_same_weights(tmp_path / "a" / "run", tmp_path / "b" / "run")


def test_a_warning_is_given_once_where_a_figure_has_fallen_too_far(
    labelled: str, caplog: pytest.LogCaptureFixture
) -> None:
    canaries = _canaries({"pets": labelled}, canary_drop=0.2)
    name, data = "zeroshot/accuracy@1", canaries.fingerprints()["pets"]
    figures = {name: 0.6, "zeroshot/chance_accuracy@1": 0.1, "zeroshot/images": 10_000}
    canaries.resume({"pets": {"step": 0, "data": data, "figures": figures}})
    # A fifth of the 0.5 above chance may be lost.
    for value, warnings in ((0.51, 0), (0.49, 1), (0.3, 1), (0.55, 1), (0.4, 2)):
        canaries.warn({f"pets/{name}": value})
        found = [one for one in caplog.messages if "forgets" in one]
        assert len(found) == warnings
    assert "canary pets: zeroshot/accuracy@1 fell from 0.600 at step 0 to 0.400" in found[-1]


def test_a_fall_that_could_be_chance_gives_no_warning(
    labelled: str, caplog: pytest.LogCaptureFixture
) -> None:
    canaries = _canaries({"pets": labelled})
    name, data = "zeroshot/accuracy@1", canaries.fingerprints()["pets"]
    figures = {name: 0.5, "zeroshot/chance_accuracy@1": 0.1, "zeroshot/images": 25}
    canaries.resume({"pets": {"step": 0, "data": data, "figures": figures}})
    canaries.warn({f"pets/{name}": 0.31})  # the standard error of 25 images is 0.1
    assert not caplog.messages
    canaries.warn({f"pets/{name}": 0.29})
    assert len(caplog.messages) == 1


def test_other_data_of_the_same_name_begin_anew(
    shards: str, labelled: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = _canaries({"set": labelled})
    saved = {"set": vars(Baseline(4, before.fingerprints()["set"], {"x": 1.0}))}
    same, other = _canaries({"set": labelled}), _canaries({"set": shards})
    same.resume(saved)
    assert same.is_known() and same.state() == saved and not caplog.messages
    other.resume(saved)
    assert not other.is_known()
    assert "evaluation.canary.set: its data have changed since step 4" in caplog.text
    prompts = _canaries({"set": {"data": labelled, "templates": "clip"}})
    assert prompts.fingerprints() != before.fingerprints()


def test_sets_that_hold_nothing_and_settings_that_do_nothing_are_refused(
    labelled: str, tmp_path: Path
) -> None:
    image = encode_png(np.asarray(noise_image(0, (32, 32))))
    bare = str(write_tar(tmp_path / "0.tar", [("a.png", image)]))
    captioned = str(write_tar(tmp_path / "1.tar", [("a.png", image), ("a.txt", b"a dog")]))
    with pytest.raises(DataError, match=r"evaluation\.canary\.x: .*has a caption or a label"):
        _canaries({"x": bare})
    with pytest.raises(DataError, match=r"canary\.x\.templates does nothing: .* has no labels"):
        _canaries({"x": {"data": captioned, "templates": "clip"}})
    with pytest.raises(DataError, match=r"canary\.x\.caption_key is 'raw', where"):
        _canaries({"x": {"data": labelled, "caption_key": "raw"}})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.canary_drop=0.2"], "canary_drop does nothing without evaluation.canary"),
        (["evaluation.canary.a/b=x.tar"], "'a/b' is not a name for a set"),
        (["evaluation.canary.x.shards=x.tar"], "evaluation.canary.x.shards is not a setting"),
        (
            ["evaluation.canary.x=x.tar", "objective.name=simclr"],
            "evaluation.canary needs images and texts, and objective.name simclr trains no text",
        ),
    ],
)
def test_a_recipe_says_what_is_wrong_with_a_canary(
    overrides: list[str], message: str, shards: str, tmp_path: Path
) -> None:
    recipe = yaml.safe_load(write_recipe(tmp_path, shards).read_text())
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        load_settings(Recipe, recipe, overrides)


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
