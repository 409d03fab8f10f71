"""The scripts of ``examples/`` run as their first lines say, on data that is made here."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.conftest import TINY_MODEL, noise_image

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PAGE = EXAMPLES.parent / "docs" / "examples.md"


def _main(script: str) -> Callable[..., None]:
    main: Callable[..., None] = runpy.run_path(str(EXAMPLES / script))["main"]
    return main


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two folders of images and a table that captions them."""
    rows = ["path,caption,year"]
    for number in range(16):
        folder = tmp_path / ("photos" if number % 2 else "scans")
        folder.mkdir(exist_ok=True)
        path = folder / f"{number:02d}.png"
        noise_image(number).save(path)
        rows.append(f"{path},picture number {number},{2010 + number}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return tmp_path


@pytest.mark.timeout(300)
def test_training_on_own_pairs_leaves_a_model_and_measures_it(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    _main("train_on_pairs.py")(
        str(pictures / "pairs.csv"), str(pictures / "out"),
        f"model.architecture={json.dumps(TINY_MODEL)}", "data.batch_size=8",
        "data.micro_batch_size=4", "data.workers=0", "schedule.epochs=1",
        "schedule.warmup_steps=1", "engine.device=cpu",
    )  # fmt: skip
    assert (pictures / "out" / "model" / "open_clip_config.json").is_file()
    assert "text_to_image/recall@10" in capfd.readouterr().out


def test_zero_shot_names_a_class_for_each_image(
    model_folder: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = sorted(map(str, (pictures / "photos").glob("*.png")))[:3]
    _main("zero_shot.py")(str(model_folder), "cat,dog", *images)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == images
    assert all(line.partition(": ")[2].split()[0] in ("cat", "dog") for line in lines)


def test_index_and_search_prints_hits_that_pass_the_filter(
    model_folder: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(model_folder), str(pictures / "album"), str(pictures / "pairs.csv")]
    for _ in range(2):  # a second time the collection is there, and is brought up to date
        _main("index_and_search.py")(*arguments, "picture number 3", "year>=2020")
        printed = capsys.readouterr().out.splitlines()
        hits = [line for line in printed if line[:1].isdigit() and "picture number" in line]
        assert len(hits) == 5
        assert all(int(line.rpartition(" ")[2]) >= 10 for line in hits)
        assert printed[-1].startswith("most like ")


def test_several_collections_give_one_ranking(
    model_folder: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = []
    for name in ("photos", "scans"):
        folders.append(str(pictures / f"collection of {name}"))
        _main("index_and_search.py")(
            str(model_folder), folders[-1], str(pictures / name), "anything"
        )
    capsys.readouterr()
    _main("several_collections.py")("a picture", *folders)
    lines = capsys.readouterr().out.splitlines()
    scores = [float(line.split()[0]) for line in lines]
    assert len(lines) == 10 and scores == sorted(scores, reverse=True)
    assert all(any(folder in line for line in lines) for folder in folders)


def test_every_example_is_on_the_page_and_says_how_to_run_it() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for script in EXAMPLES.glob("*.py"):
        assert f"../examples/{script.name}" in page, script.name
        assert f"python examples/{script.name}" in script.read_text(encoding="utf-8"), script.name


@pytest.mark.timeout(300)
def test_a_new_objective_of_another_package_trains(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = EXAMPLES / "new_objective"
    declared = re.search(
        r'\[project\.entry-points\."(clipsys\.objectives)"\]\n(.+)\n',
        (folder / "pyproject.toml").read_text(encoding="utf-8"),
    )
    assert declared
    # What an installation leaves beside the module.
    metadata = pictures / "installed" / "clipsys_two_views-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Name: clipsys-two-views\nVersion: 1.0\n")
    entry = f"[{declared[1]}]\n{declared[2].replace(chr(34), '')}\n"
    (metadata / "entry_points.txt").write_text(entry, encoding="utf-8")
    places = (metadata.parent, folder, EXAMPLES.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, places)))
    clipsys = [sys.executable, "-m", "clipsys"]
    table, shards = str(pictures / "pairs.csv"), str(pictures / "shards")
    subprocess.run([*clipsys, "shards", table, shards], check=True)
    recipe = {
        "output": str(pictures / "run"),
        "model": {"architecture": TINY_MODEL},
        "data": {"train": f"{shards}/*.tar", "batch_size": 8, "micro_batch_size": 4, "workers": 0},
        "objective": {"name": "two_views", "view_weight": 2.0},
        "schedule": {"epochs": 1, "warmup_steps": 1},
        "engine": {"device": "cpu"},
    }
    (pictures / "mine.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    subprocess.run([*clipsys, "train", str(pictures / "mine.yaml")], check=True)
    resolved = yaml.safe_load((pictures / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert resolved["objective"] == {"name": "two_views", "view_weight": 2.0}
    assert (pictures / "run" / "model" / "open_clip_config.json").is_file()
