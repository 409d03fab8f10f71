"""Choosing the share of a tuned model, by figures and by the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from clipsys.errors import ConfigError, DataError
from clipsys.evaluation.data import open_data
from clipsys.evaluation.interpolation import (
    Share,
    best_share,
    measure_shares,
    measured_set,
    parse_alphas,
)
from clipsys.evaluation.measuring import evaluate
from clipsys.models.open_clip_models import build_model, read_card, save_model
from tests.clipsys.test_cli import run
from tests.conftest import TINY_MODEL, noise_image


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two model folders of one architecture."""
    folder = tmp_path_factory.mktemp("ends")
    for seed, name in enumerate(("base", "tuned")):
        torch.manual_seed(seed)
        save_model(build_model(TINY_MODEL), folder / name)
    return str(folder / "base"), str(folder / "tuned")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A captioned table's folder and a labelled one."""
    folder = tmp_path_factory.mktemp("sets")
    for number in range(24):
        captioned, labelled = folder / "captioned", folder / "labelled" / f"kind {number % 3}"
        for place in (captioned, labelled):
            place.mkdir(parents=True, exist_ok=True)
            noise_image(number).save(place / f"{number}.png")
        (captioned / f"{number}.txt").write_text(f"picture {number}\n")
    return str(folder / "captioned"), str(folder / "labelled")


def test_the_chosen_model_measures_as_the_table_says(
    models: tuple[str, str],
    sets: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, plot = tmp_path / "out", tmp_path / "curve.png"
    status, printed, err = run(
        *("interpolate", *models, str(out), "--data", sets[0], "--canary", sets[1]),
        *("--alphas", "1,0,0.5", "--plot", str(plot), "--precision", "fp32", "--json"),
        capsys=capsys,
    )
    assert status == 0, err
    document = json.loads(printed)
    shares = [Share(**{**one, "figures": tuple(one["figures"])}) for one in document["shares"]]
    assert [one.alpha for one in shares] == [0, 0.5, 1]
    chosen = best_share(shares)
    assert document["alpha"] == chosen.alpha
    (retrieval,) = evaluate(out, "retrieval", sets[0], cache=False)
    (zeroshot,) = evaluate(out, "zeroshot", sets[1], cache=False)
    found = (
        retrieval.metrics()["text_to_image/recall@10"],
        zeroshot.metrics()["accuracy@1"],
    )
    assert found == pytest.approx(chosen.figures)
    card = read_card(out)
    assert card is not None and card.fingerprint == document["fingerprint"]
    said = card.provenance["interpolated"]
    first, second = (read_card(folder) for folder in models)
    assert first is not None and said["base"]["fingerprint"] == first.fingerprint
    assert second is not None and said["tuned"]["fingerprint"] == second.fingerprint
    assert [one["task"] for one in said["chosen_on"]] == ["retrieval", "zeroshot"]
    with Image.open(plot) as image:
        assert image.width > 400


def test_without_data_the_middle_is_taken(
    models: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    status, printed, err = run("interpolate", *models, str(out), capsys=capsys)
    assert (status, printed.split()) == (0, [str(out)])
    assert "alpha 0.5" in err
    status, _, err = run("interpolate", *models, str(out), "--alpha", "0.2", capsys=capsys)
    assert status == 1 and "already exists; choose another folder or pass --overwrite" in err
    status, _, err = run(
        "interpolate", *models, str(out), "--alpha", "0.2", "--overwrite", capsys=capsys
    )
    card = read_card(out)
    assert status == 0 and card is not None
    assert card.provenance["interpolated"]["alpha"] == 0.2


def test_the_table_marks_the_share_that_is_written(
    models: tuple[str, str],
    sets: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, printed, _ = run(
        *("interpolate", *models, str(tmp_path / "out"), "--data", sets[0], "--alphas", "0,1"),
        *("--precision", "fp32"),
        capsys=capsys,
    )
    assert status == 0
    lines = printed.splitlines()
    assert lines[0] == f"data: {sets[0]}, text_to_image/recall@10"
    assert lines[1].split() == ["alpha", "data", "merit"]
    assert [line.startswith("*") for line in lines[2:4]].count(True) == 1


def test_options_that_would_do_nothing_are_refused(
    models: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("interpolate", *models, str(tmp_path / "out"))
    for words in (("--alphas", "0,1"), ("--canary", "x"), ("--plot", "x.png")):
        status, _, err = run(*command, *words, capsys=capsys)
        assert status == 2 and f"{words[0]} is for measuring" in err
    status, _, err = run(*command, "--alpha", "0.5", "--data", "x", capsys=capsys)
    assert status == 2 and "not both" in err


def test_merit_is_the_harmonic_mean_of_what_is_left_of_the_best(
    models: tuple[str, str], sets: tuple[str, str]
) -> None:
    parts = [build_model(TINY_MODEL), build_model(TINY_MODEL)]
    chosen = [measured_set(open_data(one), None) for one in sets]
    assert [one.task for one in chosen] == ["retrieval", "zeroshot"]
    shares = measure_shares(parts[0], parts[1], (0.0, 1.0), chosen, precision="fp32")
    for share in shares:
        relative = [
            value / max(other.figures[place] for other in shares)
            for place, value in enumerate(share.figures)
        ]
        expected = 2 / sum(1 / one for one in relative) if all(relative) else 0.0
        assert share.merit == pytest.approx(expected)


def test_of_equal_merit_the_share_nearest_to_the_base_is_taken() -> None:
    shares = [Share(alpha, (0.5,), merit) for alpha, merit in ((0.7, 1.0), (0.3, 1.0), (0.0, 0.2))]
    assert best_share(shares).alpha == 0.3


def test_shares_are_numbers_from_0_to_1() -> None:
    assert parse_alphas("1,0.5,0, 0.5") == (0.0, 0.5, 1.0)
    for text in ("", "0,2", "a", "-0.1"):
        with pytest.raises(ConfigError, match="expected numbers from 0 to 1"):
            parse_alphas(text)


def test_a_set_without_captions_and_labels_is_refused(tmp_path: Path) -> None:
    noise_image(0).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="has a caption or a label"):
        measured_set(open_data(tmp_path), None)
