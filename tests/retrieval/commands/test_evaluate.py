"""The verb ``clipsys evaluate``: its options, its output, its errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from clipsys.models.open_clip_models import build_model, save_model
from clipsys.retrieval import Collection
from tests.conftest import TINY_MODEL, noise_image
from tests.retrieval.commands.test_index import run as run_command

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process: status, stdout, stderr."""
    return partial(run_command, capsys)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two classes of six captioned images."""
    folder = tmp_path / "data"
    for number in range(12):
        path = folder / f"class {number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(number).save(path)
        path.with_suffix(".txt").write_text(f"picture {number}\nsecond {number}")
    return folder


def test_one_task_is_an_object_and_several_are_a_list(
    run: Run, model_folder: Path, data: Path
) -> None:
    command = ["evaluate", str(model_folder), f"--data={data}", "--json"]
    status, out, _ = run(*command, "--task=zeroshot")
    assert status == 0
    assert json.loads(out)["task"] == "zeroshot"
    status, out, _ = run(*command, "--task=zeroshot", "--task=retrieval", "--task=probe")
    assert [one["task"] for one in json.loads(out)] == ["zeroshot", "retrieval", "probe"]


def test_the_table_has_intervals_samples_and_chance(
    run: Run, model_folder: Path, data: Path
) -> None:
    status, out, _ = run("evaluate", str(model_folder), f"--data={data}", "--task=retrieval")
    assert status == 0
    lines = out.splitlines()
    assert "every caption is a query" in lines[1]
    header = next(line for line in lines if line.startswith("figure"))
    assert header.split("\t") == ["figure", "value", "95 % interval", "samples", "chance"]
    recall = next(line for line in lines if line.startswith("text_to_image/recall@10"))
    assert recall.split("\t")[3] == "24"


def test_two_models_are_compared_whatever_their_width(
    run: Run, model_folder: Path, data: Path, tmp_path: Path
) -> None:
    save_model(build_model(TINY_MODEL | {"embed_dim": 48}, for_training=True), tmp_path / "other")
    models = [str(model_folder), str(tmp_path / "other")]
    command = ["evaluate", *models, "--task=compare", f"--data={data}"]
    status, out, _ = run(*command, "--json", f"--report={tmp_path / 'report'}")
    assert status == 0
    document = json.loads(out)
    assert (document["task"], document["of"]) == ("compare", "zeroshot")
    one = document["metrics"]["accuracy@1"]
    assert one["difference"] == pytest.approx(one["second"] - one["first"])
    assert len(document["changes"]) == one["only_first"] + one["only_second"]
    assert (tmp_path / "report" / "report.html").is_file()
    # The report has both models' own results besides.
    assert len(json.loads((tmp_path / "report" / "results.json").read_text())) == 3
    status, out, _ = run(*command, "--on=retrieval")
    assert status == 0
    assert "McNemar" in out or "permutation" in out
    status, _, err = run("evaluate", models[0], "--task=compare", f"--data={data}")
    assert (status, "takes two models" in " ".join(err.split())) == (2, True)


def test_a_collection_is_a_data_set(run: Run, model_folder: Path, data: Path) -> None:
    import clipsys

    folder = data.parent / "c"
    with Collection.create(folder, clipsys.load(model_folder)) as made:
        made.add(data, show_progress=False)
    command = ["evaluate", str(model_folder), "--task=retrieval", "--json"]
    of_collection = json.loads(run(*command, f"--data={folder}")[1])
    of_folder = json.loads(run(*command, f"--data={data}")[1])
    assert of_collection["metrics"] == of_folder["metrics"]


def test_a_limit_spreads_over_the_classes(run: Run, model_folder: Path, data: Path) -> None:
    command = ["evaluate", str(model_folder), "--task=zeroshot", f"--data={data}", "--json"]
    found = json.loads(run(*command, "--limit=8")[1])
    assert found["metrics"]["images"] == 8
    assert found["metrics"]["classes"] == 2


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--task=zeroshot", "--match=k"], 2, "--match is for --task retrieval or probe"),
        (["--task=retrieval", "--template={}"], 2, "--template is for --task zeroshot"),
        (["--task=zeroshot", "--on=probe"], 2, "--on is for --task robustness or compare"),
        (["--task=probe", "--shots=two"], 2, "--shots is 'two'; expected numbers"),
        (["--task=robustness", "--corruption=fog"], 1, "'fog' is not a corruption; choose from"),
        (["--task=zeroshot", "--template=a photo"], 1, "template 'a photo': expected one {}"),
        (["--task=zeroshot", "--template=clipp"], 1, "the name of a set: simple"),
        (["--task=zeroshot", "--classnames=f"], 1, "--classnames is f, which does nothing"),
        (["--task=zeroshot", "--label-key=kind"], 1, "no image has the metadata key 'kind'"),
        (["--task=zeroshot", "--split=dev"], 1, "there is no split 'dev'"),
        (["--task=retrieval", "--match=kind"], 1, "no metadata key 'kind'"),
        (["--task=probe", "--shots=9"], 1, "'class 0'"),
        (["--task=neighbours", "--layer=none"], 1, "has no layer 'none'"),
    ],
)
def test_bad_input_is_one_line_with_the_remedy(
    run: Run, model_folder: Path, data: Path, words: list[str], status: int, message: str
) -> None:
    found, out, err = run("--quiet", "evaluate", str(model_folder), f"--data={data}", *words)
    assert (found, out) == (status, "")
    said = " ".join(err.replace("│", " ").split())
    assert message in said
    if status == 1:
        assert len([line for line in err.splitlines() if line.startswith("error")]) == 1


def test_images_without_captions_or_labels_are_refused(
    run: Run, model_folder: Path, tmp_path: Path
) -> None:
    for number in range(3):
        noise_image(number).save(tmp_path / f"{number}.png")
    command = ["evaluate", str(model_folder), f"--data={tmp_path}"]
    status, _, err = run(*command, "--task=retrieval")
    assert (status, "no item has a caption" in err) == (1, True)
    status, _, err = run(*command, "--task=zeroshot")
    assert (status, "has no label; expected one folder per class" in err) == (1, True)


def test_a_report_replaces_a_report_and_nothing_else(
    run: Run, model_folder: Path, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "report"
    command = ["evaluate", str(model_folder), "--task=zeroshot", f"--data={data}"]
    for _ in range(2):
        assert run(*command, f"--report={folder}")[0] == 0
    assert {path.name for path in folder.iterdir()} >= {"report.html", "report.md", "results.json"}
    status, _, err = run(*command, f"--report={data}")
    assert (status, "exists and is no report" in err) == (1, True)
    assert len(list(data.rglob("*.png"))) == 12
