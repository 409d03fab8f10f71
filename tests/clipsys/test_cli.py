from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import clipsys
from clipsys.cli import VERBS, main
from tests.conftest import noise_image, write_training_shards


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Runs the command line in this process: status, stdout, stderr."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(verb, "--help", capsys=capsys)
    assert status == 0
    assert "Usage: clipsys" in out


def test_help_lists_every_verb_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run("--help", capsys=capsys)
    for verb in VERBS:
        line = next(line for line in out.splitlines() if line.split()[:1] == [verb])
        assert len(line.split()) > 3


def test_help_and_import_load_no_heavy_library() -> None:
    code = (
        "import sys, clipsys, clipsys.cli\n"
        "try: clipsys.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'faiss', 'gradio', 'deepspeed', 'open_clip', 'numpy', 'PIL'}\n"
        "sys.exit(str(sorted(heavy & set(sys.modules))) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_version_and_wrong_usage_have_their_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version", capsys=capsys)[:2] == (0, f"clipsys {clipsys.__version__}\n")
    assert run("train", capsys=capsys)[0] == 2
    assert run("nonsense", capsys=capsys)[0] == 2


def test_an_error_is_one_line_on_stderr_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run("train", "no_such_recipe", capsys=capsys)
    assert (status, out) == (1, "")
    assert err.startswith("error: no_such_recipe: there is no such recipe")
    assert len(err.splitlines()) == 1


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    words = ["shards", str(tmp_path / "nowhere"), str(tmp_path / "out"), "--debug"]
    command = [sys.executable, "-m", "clipsys", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_classify_prints_what_the_contract_says(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "a.png"
    noise_image(0).save(image)
    options = ["--labels", "cat,dog", "--model", str(model_folder)]
    status, out, _ = run("classify", str(image), *options, "--json", capsys=capsys)
    (row,) = json.loads(out)
    assert status == 0
    assert set(row) == {"uri", "label", "probability", "scores"}
    assert set(row["scores"]) == {"cat", "dog"}
    _, out, _ = run("classify", str(image), *options, capsys=capsys)
    assert out.split() == [str(image), row["label"], f"{row['probability']:.3f}"]


def test_classify_names_a_bad_image(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"nothing")
    status, _, err = run(
        "classify", str(tmp_path / "bad.jpg"), "--labels=a,b", f"--model={model_folder}",
        capsys=capsys,
    )  # fmt: skip
    assert status == 1
    assert "bad.jpg: not an image in a known format" in err.splitlines()[-1]


def test_classify_answers_for_the_good_images_and_names_the_bad_ones(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise_image(0).save(tmp_path / "good.png")
    noise_image(1).save(tmp_path / "last.png")
    (tmp_path / "bad\x1b[31m.jpg").write_bytes(b"nothing")
    (tmp_path / "labels.txt").write_text("\ufeffAnnas, Ltd\n\ncat\ncat\n", encoding="utf-8")
    images = [str(tmp_path / name) for name in ("good.png", "bad\x1b[31m.jpg", "last.png")]
    options = [
        f"--labels-file={tmp_path / 'labels.txt'}",
        "--label=a, b",
        f"--model={model_folder}",
    ]
    status, out, err = run("classify", *images, *options, "--json", capsys=capsys)
    rows = json.loads(out)
    assert status == 1
    assert [row["uri"] for row in rows] == [images[0], images[2]]
    assert set(rows[0]["scores"]) == {"a, b", "Annas, Ltd", "cat"}
    assert "class 'cat' is named twice" in err
    assert f"error: {tmp_path}/bad\\x1b[31m.jpg: not an image" in err
    status, out, _ = run("classify", *images, *options, capsys=capsys)
    assert status == 1
    assert [line.split("\t")[0] for line in out.splitlines()] == [images[0], images[2]]


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ([], 2, "--labels, --label or --labels-file"),
        (["--labels=a,"], 1, "two different classes"),
        (["--labels=a,b", "--template=x"], 1, "expected one {}"),
        (["--labels-file=none.txt"], 1, "none.txt: the classes cannot be read"),
    ],
)
def test_classify_checks_its_classes_before_a_model_is_loaded(
    capsys: pytest.CaptureFixture[str], words: list[str], status: int, message: str
) -> None:
    done, out, err = run("classify", "a.png", "--model=no/where", *words, capsys=capsys)
    assert (done, out) == (status, "")
    assert message in err


def test_table_options_reach_every_verb_that_takes_a_table(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["bild;satz;art"]
    for number in range(4):
        noise_image(number).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png;größe {number};{('rot', 'grün')[number % 2]}")
    (tmp_path / "t.csv").write_text("\n".join(rows), encoding="cp1252")
    table = ["--path-column=Bild", "--caption-column=satz", "--label-column=art"]
    options = [*table, "--encoding=cp1252"]
    command = ["shards", str(tmp_path / "t.csv"), str(tmp_path / "out")]
    assert run(*command, *options, capsys=capsys)[0] == 0
    command = ["evaluate", str(model_folder), "--task=zeroshot", f"--data={tmp_path / 't.csv'}"]
    status, out, _ = run(*command, *options, "--json", capsys=capsys)
    assert (status, json.loads(out)["task"]) == (0, "zeroshot")
    status, _, err = run("shards", str(tmp_path), str(tmp_path / "o"), *table, capsys=capsys)
    assert status == 1
    assert "--path-column, --caption-column, --label-column: for tables only" in err


def test_help_is_imperative(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in VERBS:
        out = run(verb, "--help", capsys=capsys)[1]
        first = out.split("\n\n")[1].split()[0]
        assert not first.endswith("s") or first in ("Compress", "Process"), (verb, first)


def test_a_closed_pipe_ends_without_a_word() -> None:
    command = f"{sys.executable} -m clipsys --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_evaluate_prints_json_and_a_table(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_training_shards(tmp_path / "s", 12)
    command = ["evaluate", str(model_folder), "--task=retrieval", f"--data={shards}"]
    _, out, _ = run(*command, "--json", capsys=capsys)
    document = json.loads(out)
    assert set(document) >= {"task", "model", "data", "metrics", "intervals", "samples"}
    assert "text_to_image/recall@10" in document["metrics"]
    _, out, _ = run(*command, "--captions=first", "--match=family", capsys=capsys)
    assert "text_to_image/recall@10" in out


def test_shards_packs_and_says_what_it_skipped(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (image_folder / "cats" / "bad.png").write_bytes(b"nothing")
    status, out, err = run("shards", str(image_folder), str(tmp_path / "out"), capsys=capsys)
    assert status == 0
    assert out.split() == [str(tmp_path / "out" / "shard-00000.tar")]
    assert "skipped 1 (1 not an image); see " in err


def test_an_empty_folder_is_an_error_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    status, _, err = run("shards", str(tmp_path / "empty"), str(tmp_path / "out"), capsys=capsys)
    assert status == 1
    assert "found; check the path" in err
    assert not (tmp_path / "out").exists()


def test_models_lists_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run("models", "RN50/", "--max-mb", "500", capsys=capsys)
    assert status == 0
    assert "RN50/openai" in out and "ViT" not in out
    status, _, err = run("models", "RN50/", "--max-mb", "100", capsys=capsys)
    assert status == 1
    assert "no pretrained model 'RN50/' of 100 MB or less" in err


def test_doctor_finds_no_problem_here(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run("doctor", capsys=capsys)
    assert status == 0
    for subject in ("torch", "faiss", "deepspeed", "images", "OpenMP"):
        assert subject in out


@pytest.mark.parametrize(("redirection", "expected"), [(">&-", 0), ("> /dev/full", 1)])
def test_an_output_that_takes_nothing_is_no_traceback(redirection: str, expected: int) -> None:
    command = f"{sys.executable} -m clipsys --version {redirection}"
    ended = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (ended.returncode, "Traceback" in ended.stderr) == (expected, False)
    assert ("error: the output: cannot be written" in ended.stderr) == bool(expected)


@pytest.mark.parametrize(
    ("task", "option", "wanted"),
    [
        ("zeroshot", ("--match", "year"), "retrieval"),
        ("probe", ("--captions", "first"), "retrieval"),
        ("retrieval", ("--template", "a {}"), "zeroshot"),
        ("retrieval", ("--classnames", "names.txt"), "zeroshot"),
    ],
)
def test_an_option_of_another_task_is_refused(
    task: str, option: tuple[str, str], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("evaluate", "none", "--task", task, "--data", "none", *option)
    status, _, err = run(*arguments, capsys=capsys)
    assert (status, f"{option[0]} is for --task {wanted}" in " ".join(err.split())) == (2, True)
