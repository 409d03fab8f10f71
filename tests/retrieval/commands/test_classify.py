"""``clipsys classify`` on every kind of source and on collections."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from clipsys.models.encoder import load
from clipsys.retrieval import Collection
from clipsys.retrieval.commands.class_options import read_classes
from clipsys.retrieval.commands.predictions import Summary
from clipsys.zeroshot.deciding import Decisions
from tests.conftest import noise_image, write_training_shards
from tests.retrieval.commands.test_index import run as run_command

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process: status, stdout, stderr."""
    return partial(run_command, capsys)


@pytest.fixture
def indexed(model_folder: Path, tmp_path: Path) -> Path:
    """A collection of nine images, three of each year, with a tiny model."""
    rows = ["path,year"]
    for number in range(9):
        noise_image(number).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,{2000 + number // 3}")
    (tmp_path / "t.csv").write_text("\n".join(rows), encoding="utf-8")
    with Collection.create(tmp_path / "c", load(model_folder), model=str(model_folder)) as made:
        made.add(tmp_path / "t.csv", show_progress=False)
    return tmp_path / "c"


LABELS = ("--labels", "cat,dog,bird")


@pytest.mark.parametrize("kind", ["folder", "table", "shards"])
def test_every_kind_of_source_is_read(
    run: Run, model_folder: Path, image_folder: Path, tmp_path: Path, kind: str
) -> None:
    source = str(image_folder)
    if kind == "table":
        source = str(tmp_path / "t.csv")
        paths = sorted(map(str, image_folder.rglob("*.png")))
        Path(source).write_text("\n".join(["bild", *paths]), encoding="utf-8")
    elif kind == "shards":
        source = write_training_shards(tmp_path / "s", 6)
    options = ["--path-column=bild"] if kind == "table" else []
    status, out, _ = run("classify", source, *LABELS, f"--model={model_folder}", "--json", *options)
    rows = json.loads(out)
    assert (status, len(rows)) == (0, 6)
    assert all(set(row) == {"uri", "label", "probability", "scores"} for row in rows)
    assert all(row["label"] == max(row["scores"], key=row["scores"].get) for row in rows)


def test_a_missing_image_and_a_damaged_shard_leave_the_others(
    run: Run, model_folder: Path, tmp_path: Path
) -> None:
    write_training_shards(tmp_path / "s", 64)
    first, *_ = sorted((tmp_path / "s").glob("*.tar"))
    first.write_bytes(first.read_bytes()[:30_000])
    noise_image(0).save(tmp_path / "good", "PNG")  # whatever its name says
    sources = [str(tmp_path / "none.png"), str(tmp_path / "s"), str(tmp_path / "good")]
    status, out, err = run("classify", *sources, *LABELS, f"--model={model_folder}")
    assert status == 1
    assert out.splitlines()[-1].startswith(f"{tmp_path / 'good'}\t")
    assert len(out.splitlines()) > 20
    assert f"error: {tmp_path / 'none.png'}: cannot be read" in err
    assert f"error: {first}" in err


def test_a_folder_that_is_not_there_or_a_collection_is_an_error(
    run: Run, indexed: Path, tmp_path: Path
) -> None:
    status, out, err = run("classify", str(tmp_path / "none"), *LABELS, "--model=no/where")
    assert (status, out) == (1, "")
    assert "there is no such folder" in err
    status, _, err = run("classify", str(indexed), *LABELS, "--model=no/where")
    assert (status, "name it with --collection" in err) == (1, True)


def test_labels_are_written_and_can_be_filtered_by(run: Run, indexed: Path) -> None:
    command = ["classify", "--collection", str(indexed), *LABELS]
    status, out, err = run(*command, "--write", "kind")
    assert status == 0
    header, *rows = [line.split("\t") for line in out.splitlines()]
    assert header == ["label", "items", "share", "mean probability"]
    assert sum(int(row[1]) for row in rows) == 9
    assert "kind and kind_probability are written for 9 items" in err
    with Collection.open(indexed) as photos:
        for row in rows:
            assert len(photos.select(f"kind={row[0]}")) == int(row[1])
        assert all(0 <= item.metadata["kind_probability"] <= 1 for item in photos.items())
        assert photos.annotations() == ["kind", "kind_probability"]
    status, out, _ = run(*command, "--json")
    listed = {row["uri"]: row["label"] for row in json.loads(out)}
    with Collection.open(indexed) as photos:
        assert listed == {item.uri: item.metadata["kind"] for item in photos.items()}
    status, _, err = run("classify", "--collection", str(indexed), "--forget", "kind")
    assert (status, "removed from 9 items" in err) == (0, True)
    with Collection.open(indexed) as photos:
        assert photos.metadata_keys() == ["year"]


def test_only_items_that_pass_the_filter_are_classified(run: Run, indexed: Path) -> None:
    command = ["classify", "--collection", str(indexed), *LABELS, "--where", "year=2001"]
    assert len(run(*command, "--items")[1].splitlines()) == 3
    status, out, err = run(*command[:-1], "yaer=2001", "--json")
    assert (status, json.loads(out), err.count("did you mean 'year'")) == (0, [], 1)
    assert run(*command, "--write", "kind")[0] == 0
    with Collection.open(indexed) as photos:
        assert photos.select("kind is present") == photos.select("year=2001")


def test_a_key_of_the_table_and_another_model_are_refused(
    run: Run, indexed: Path, tmp_path: Path, model_folder: Path
) -> None:
    command = ["classify", "--collection", str(indexed), *LABELS]
    status, out, err = run(*command, "--write", "year")
    assert (status, out) == (1, "")
    assert f"year: is metadata that {tmp_path / 't.csv'} gives" in err
    import torch

    from clipsys.models.open_clip_models import build_model, save_model
    from tests.conftest import TINY_MODEL

    torch.manual_seed(1)
    save_model(build_model(TINY_MODEL, for_training=True), tmp_path / "other")
    status, _, err = run(*command, f"--model={tmp_path / 'other'}")
    assert status == 1
    assert f"of model {model_folder.name} " in err and "not of other" in err
    moved = tmp_path / "moved"
    moved.symlink_to(model_folder)
    assert run(*command, f"--model={moved}")[0] == 0, "the same model at another place"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name images, folders"),
        (["a.png", "--collection=c"], "name images, folders"),
        (["a.png", "--write=kind"], "--write is for --collection"),
        (["a.png", "--where=a=b"], "--where is for --collection"),
        (["--collection=c", "--explain=x"], "--explain is for images"),
        (["a.png", "b.png", "--explain=x.png", "--labels=a,b"], "for one image"),
        (["a.png", "--threshold=0.3", "--labels=a,b"], "--threshold is for --multi-label"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    run: Run, words: list[str], message: str
) -> None:
    status, out, err = run("classify", *words)
    assert (status, out) == (2, "")
    assert message in " ".join(err.replace("│", " ").split())


def test_head_ends_it_quietly(run: Run, model_folder: Path, image_folder: Path) -> None:
    words = f"{image_folder} --labels a,b --model {model_folder} --json"
    command = f"{sys.executable} -m clipsys --quiet classify {words} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr and "rror" not in done.stderr


def test_explain_draws_each_image(run: Run, model_folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        noise_image(1).save(tmp_path / folder / "x.png")
    out = tmp_path / "drawn"
    sources = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert run("classify", *sources, *LABELS, f"--model={model_folder}", f"--explain={out}")[0] == 0
    assert sorted(path.name for path in out.iterdir()) == ["x-2.png", "x.png"]
    with Image.open(out / "x.png") as drawn:
        assert drawn.size == noise_image(1).size
    one = tmp_path / "one.png"
    command = ["classify", str(tmp_path / "a" / "x.png"), *LABELS, f"--model={model_folder}"]
    assert run(*command, f"--explain={one}")[0] == 0
    assert one.exists()


def test_top_k_and_several_labels(run: Run, model_folder: Path, image_folder: Path) -> None:
    command = ["classify", str(image_folder), *LABELS, f"--model={model_folder}", "--json"]
    for row in json.loads(run(*command, "--top-k=2")[1]):
        first, second = row["top"]
        assert (first["label"], first["probability"]) == (row["label"], row["probability"])
        assert first["probability"] >= second["probability"]
    for row in json.loads(run(*command, "--multi-label", "--threshold=0.0001")[1]):
        assert set(row["labels"]) == {"cat", "dog", "bird"}
        assert row["labels"][0] == row["label"]


# ---- classes -----------------------------------------------------------------------------------


def test_a_file_of_classes_is_lines_or_json(tmp_path: Path) -> None:
    lines, listed, named = (tmp_path / name for name in ("a.txt", "b.json", "c.json"))
    lines.write_text("\ufeffAnnas, Ltd\n\n cat \n", encoding="utf-8")
    assert read_classes("", (), lines) == {"Annas, Ltd": ["Annas, Ltd"], "cat": ["cat"]}
    listed.write_text('["dog", "cat"]', encoding="utf-8")
    assert read_classes("fox, dog", (), listed) == {"fox": ["fox"], "dog": ["dog"], "cat": ["cat"]}
    named.write_text('{"dog": ["dog", "puppy"], "cat": "a small cat."}', encoding="utf-8")
    assert read_classes("", (), named) == {"dog": ["dog", "puppy"], "cat": "a small cat."}


@pytest.mark.parametrize("text", ['{"dog": []}', '{"dog": 5}', "[1]", '"dog"', '{"": ["a"]}', "{"])
def test_a_file_of_classes_that_is_not_understood_is_named(
    run: Run, tmp_path: Path, text: str
) -> None:
    (tmp_path / "c.json").write_text(text, encoding="utf-8")
    status, out, err = run("classify", "a.png", f"--labels-file={tmp_path / 'c.json'}")
    assert (status, out, len(err.splitlines())) == (1, "", 1)
    assert "c.json" in err


def test_summary_counts_each_of_several_labels_with_its_own_probability(
    capsys: pytest.CaptureFixture[str],
) -> None:
    probability_NC = np.array([[0.9, 0.6], [0.7, 0.1], [0.2, 0.1]], np.float32)
    summary = Summary(["cat", "dog"])
    labels, chosen = ["cat", "cat", "unknown"], [["cat", "dog"], ["cat"], []]
    summary.add(
        Decisions(labels, probability_NC.max(axis=1), chosen, probability_NC, probability_NC)
    )
    summary.print()
    assert [line.split("\t") for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["cat", "2", "66.7%", "0.800"],
        ["dog", "1", "33.3%", "0.600"],
        ["unknown", "1", "33.3%", "0.200"],
    ]
