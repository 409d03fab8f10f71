"""search on the command line: order, filters alone, formats, files of queries."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import pytest

import clipsys
from tests.retrieval.colours import COLOURS, ColourEncoder, paint, paint_folder
from tests.retrieval.commands.test_index import run


@pytest.fixture(autouse=True)
def model_specs(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--model 3`` is the fake encoder with seed 3."""
    monkeypatch.setattr(clipsys, "load", lambda spec, **_: ColourEncoder(seed=int(spec)))


@pytest.fixture
def folder(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A collection of six images with years, and one of a hostile name without."""
    paint(photos / "odd\x1b[31m name.png", (250, 20, 250))
    rows = [f"photos/{name}.png,{2000 + n // 2},a {name} thing" for n, name in enumerate(COLOURS)]
    table = tmp_path / "t.csv"
    table.write_text("\n".join(["path,year,caption", *rows, "photos/odd\x1b[31m name.png,,"]))
    assert run(capsys, "index", tmp_path / "c", table, "--model", "0")[0] == 0
    return tmp_path / "c"


def stems(capsys: pytest.CaptureFixture[str], folder: Path, *words: object) -> list[str]:
    status, out, _ = run(capsys, "search", folder, *words, "--json")
    assert status == 0
    return [Path(hit["uri"]).stem for hit in json.loads(out)["hits"]]


def test_a_filter_alone_lists_what_passes_the_last_added_first(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stems(capsys, folder, "--where", "year=2000") == ["green", "red"]
    assert stems(capsys, folder, "--where", "year is missing") == ["odd\x1b[31m name"]
    assert stems(capsys, folder, "--where", "year>=2000", "-k", 2, "--offset", 1) == [
        "white",
        "yellow",
    ]
    hit = json.loads(run(capsys, "search", folder, "--where", "year=2000", "--json")[1])["hits"][0]
    assert (hit["rank"], hit["score"], hit["relevance"]) == (1, None, None)
    status, _, err = run(capsys, "search", folder, "--where", "year=2000", "--min-score", "0.1")
    assert status == 1
    assert "a filter alone has no score" in err


def test_hits_are_sorted_by_a_key_and_missing_ones_are_last(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = [*COLOURS, "odd\x1b[31m name"]
    assert stems(capsys, folder, "--sort", "year", "-k", 9)[-1] == "odd\x1b[31m name"
    assert stems(capsys, folder, "--sort", "-year", "-k", 9)[-1] == "odd\x1b[31m name"
    assert stems(capsys, folder, "--sort", "caption", "-k", 3) == ["black", "blue", "green"]
    assert stems(capsys, folder, "--sort", "-caption", "-k", 2) == ["yellow", "white"]
    assert stems(capsys, folder, "--sort", "added", "-k", 7) == everything
    best = stems(capsys, folder, "red", "-k", 3)
    assert stems(capsys, folder, "red", "-k", 3, "--sort", "added") == sorted(
        best, key=everything.index
    )
    # With a cut all that passes is sorted, and the page is taken of that.
    passing = stems(capsys, folder, "red", "--min-score", "-1", "-k", 2, "--sort", "added")
    assert passing == everything[:2]
    assert stems(capsys, folder, "--words", "thing", "--sort", "-added", "-k", 2) == [
        "black",
        "white",
    ]
    status, out, err = run(capsys, "search", folder, "red", "--sort", "yaer")
    assert (status, out) == (1, "")
    assert "did you mean 'year'" in err


def test_words_of_file_names_are_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stems(capsys, folder, "--words", "odd name") == ["odd\x1b[31m name"]


def test_an_empty_filter_says_why_on_stderr_and_json_stays_valid(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, "search", folder, "red", "--where", "yaer=2000", "--json")
    assert (status, json.loads(out)) == (0, {"query": "red", "hits": []})
    assert "no item has metadata 'yaer'" in err
    assert "did you mean 'year'" in err


def test_a_hit_in_a_pipe_is_one_line_and_paths_come_alone(
    folder: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = run(capsys, "search", folder, "red", "-k", 7)[1].splitlines()
    assert len(lines) == 8
    assert lines[0].split("\t")[3:5] == ["relevance", "image"]
    assert lines[1].split("\t")[4:] == [str(photos / "red.png"), "a red thing"]
    odd = ["search", folder, "--where", "year is missing"]
    assert run(capsys, *odd, "--paths")[1] == f"{photos}/odd\\x1b[31m name.png\n"
    assert run(capsys, *odd, "--paths0")[1] == f"{photos}/odd\x1b[31m name.png\0"
    for how in ([], ["--csv"], ["--json"], ["--paths"]):
        assert "\x1b" not in run(capsys, *odd, *how)[1]
    for pair in (["--paths", "--paths0"], ["--json", "--paths"], ["--csv", "--json"]):
        assert run(capsys, *odd, *pair)[0] == 2
    rows = list(csv.DictReader(io.StringIO(run(capsys, "search", folder, "red", "--csv")[1])))
    assert rows[0]["uri"] == str(photos / "red.png")


def test_a_line_that_cannot_be_answered_is_named_and_the_rest_is_answered(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        b"\xef\xbb\xbfred",
        b"",
        b"red -",
        b"image:none.png",
        b"item:99",
        b"\xff",
        b"blue",
        b"red",
    ]
    (tmp_path / "q.txt").write_bytes(b"\r\n".join(lines))
    command = ["search", folder, "--queries", tmp_path / "q.txt", "-k", 1]
    status, out, err = run(capsys, *command, "--json")
    documents = json.loads(out)
    assert status == 1
    assert [document["query"] for document in documents] == [
        "red", "red -", "image:none.png", "item:99", None, "blue", "red",
    ]  # fmt: skip
    assert ["error" in document for document in documents] == [
        False, True, True, True, True, False, False,
    ]  # fmt: skip
    found = [Path(one["hits"][0]["uri"]).stem for one in documents if one["hits"]]
    assert found == ["red", "blue", "red"]
    for number in (3, 4, 5, 6):
        assert f"error: {tmp_path / 'q.txt'}:{number}: " in err
    status, out, _ = run(capsys, *command)
    assert (status, out.count("image\tcaption")) == (1, 3)
    (tmp_path / "q.txt").write_text("red\nblue\n", encoding="utf-16")
    assert run(capsys, *command)[0] == 0


def test_what_is_wrong_with_all_lines_is_one_error(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "q.txt").write_text("red\nblue\ngreen\n")
    command = ["search", folder, "--queries", tmp_path / "q.txt", "--sort", "nothing"]
    status, out, err = run(capsys, *command)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "cannot sort by 'nothing'" in err


def test_where_nothing_is_relevant_the_scores_do_not_tell(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, "search", folder, "red", "--relevant-only", "--json")
    assert (status, "fewer than 20 items" in json.loads(out)["note"]) == (0, True)
    assert "fewer than 20 items" in err
    pictures = paint_folder(tmp_path / "many", num_images=60)
    run(capsys, "index", tmp_path / "many-c", pictures, "--model", "0")
    command = ["search", tmp_path / "many-c", "mud - 0.4*blue", "--relevant-only"]
    status, out, err = run(capsys, *command, "--json")
    document = json.loads(out)
    assert (status, document["hits"]) == (0, [])
    assert "do not tell" in document["note"]
    assert "do not tell" in err


def test_paths_of_failures_and_copies_come_alone(
    folder: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "bad one.png").write_bytes(b"")
    (photos / "red copy.png").write_bytes((photos / "red.png").read_bytes())
    run(capsys, "index", folder, photos)
    assert run(capsys, "failures", folder, "--paths0")[1] == f"{photos}/bad one.png\0"
    assert run(capsys, "duplicates", folder, "--paths")[1] == f"{photos}/red copy.png\n"
    assert run(capsys, "duplicates", folder, "--paths", "--json")[0] == 2


def test_index_takes_the_columns_of_a_table_and_remembers_them(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "t.csv"
    table.write_text("bild;satz\nphotos/red.png;große Fläche\n", encoding="cp1252")
    words = ["--path-column=Bild", "--caption-column=satz", "--encoding=cp1252", "--model=0"]
    assert run(capsys, "index", tmp_path / "c", table, *words)[0] == 0
    assert stems(capsys, tmp_path / "c", "--words", "flache") == ["red"]
    assert "1 unchanged" in run(capsys, "index", tmp_path / "c")[1]
    status, _, err = run(capsys, "index", tmp_path / "c", photos, "--label-column=x")
    assert status == 1
    assert "--label-column: for tables only" in err


def test_half_a_surrogate_pair_finds_nothing_and_is_no_fault(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = "ca\udcfft"
    assert run(capsys, "search", folder, "--words", half)[0] == 0
    assert run(capsys, "search", folder, "--where", f"label={half}")[0] == 0
    status, _, err = run(capsys, "search", folder, "--where", f"year={half}")
    assert (status, "no hits" in err) == (0, True)


def test_a_key_that_no_item_has_is_said_where_everything_passes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for condition in ("yaer!=2000", "yaer is missing"):
        status, out, err = run(capsys, "search", folder, "--where", condition, "--paths")
        assert (status, len(out.splitlines())) == (0, len(COLOURS) + 1)
        assert "no item has metadata 'yaer'" in err
        assert "did you mean 'year'" in err


def test_queries_are_not_read_from_a_pipe_that_may_never_be_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "q.txt")
    for path, kind in ((tmp_path / "q.txt", "a named pipe"), ("/dev/zero", "a device")):
        status, _, err = run(capsys, "search", folder, "--queries", path)
        assert (status, kind in err) == (1, True)


def test_queries_come_from_a_pipe_of_the_shell(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read, write = os.pipe()
    try:
        os.write(write, b"item:1\n")
        os.close(write)
        status, out, _ = run(capsys, "search", folder, "--queries", f"/dev/fd/{read}", "--paths")
    finally:
        os.close(read)
    assert (status, bool(out)) == (0, True)


def test_a_null_byte_costs_its_line_of_queries_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queries = tmp_path / "q.txt"
    queries.write_bytes(b"item:1\nb\0d\n")
    status, out, err = run(capsys, "search", folder, "--queries", queries, "-k", 1)
    assert (status, out.count("item:1"), "None" in out) == (1, 1, False)
    assert f"{queries}:2: the line is not UTF-8 text" in err
