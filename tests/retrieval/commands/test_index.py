from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

import clipsys
from clipsys.cli import main
from clipsys.retrieval import Collection
from tests.retrieval.colours import COLOURS, ColourEncoder, paint


@pytest.fixture(autouse=True)
def model_specs(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--model 3`` is the fake encoder with seed 3."""
    monkeypatch.setattr(clipsys, "load", lambda spec, **_: ColourEncoder(seed=int(spec)))


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command."""
    try:
        main([str(word) for word in words])
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def test_index_makes_a_collection_and_search_answers_from_it_alone(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(capsys, "index", tmp_path / "c", photos, "--model", "0")
    assert status == 0
    assert f"{len(COLOURS)} added" in out
    status, out, err = run(capsys, "search", tmp_path / "c", "red", "-k", 2, "--json")
    assert (status, err) == (0, "")
    document = json.loads(out)
    assert document["query"] == "red"
    assert [hit["rank"] for hit in document["hits"]] == [1, 2]
    contract = {"rank", "id", "score", "uri", "caption", "metadata"}
    assert set(document["hits"][0]) == contract | {"relevance", "duplicates"}
    assert document["hits"][0]["uri"] == str(photos / "red.png")


def test_index_again_brings_it_up_to_date_without_naming_the_model(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "index", tmp_path / "c", photos, "--model", "0")
    paint(photos / "more.png", (1, 2, 3))
    status, out, _ = run(capsys, "index", tmp_path / "c", photos)
    assert status == 0
    assert f"1 added, {len(COLOURS)} unchanged" in out


def test_index_with_another_model_is_refused(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "index", tmp_path / "c", photos, "--model", "0")
    status, out, err = run(capsys, "index", tmp_path / "c", photos, "--model", "1")
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert "colours-0" in err
    assert "colours-1" in err


@pytest.mark.parametrize("source", ["missing", "empty", "no.tar"])
def test_index_of_nothing_is_a_one_line_error_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "no.tar").write_bytes(b"not a tar" * 200)
    status, out, err = run(capsys, "index", tmp_path / "c", tmp_path / source, "--model", "0")
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert source in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "no.tar"]


def test_index_of_bad_images_only_is_an_error_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"no")
    status, _, err = run(capsys, "index", tmp_path / "c", tmp_path / "bad", "--model", "0")
    assert status == 1
    assert "none of the 1 images can be used" in err
    assert not (tmp_path / "c").exists()


def test_index_counts_and_lists_what_it_skipped(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(7):
        (photos / f"bad{number}.jpg").write_bytes(b"")
    status, out, err = run(capsys, "index", tmp_path / "c", photos, "--model", "0")
    assert status == 0
    assert "7 failed (7 empty)" in out
    assert err.count("skipped: ") == 6
    assert "skipped: 2 more" in err


def test_index_needs_a_model_for_a_new_collection(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, "index", tmp_path / "c", photos)
    assert status == 1
    assert "name a --model" in err
    assert not (tmp_path / "c").exists()


def test_search_combines_words_image_not_and_filters(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "t.csv"
    rows = [f"photos/{name}.png,{n}" for n, name in enumerate(COLOURS)]
    table.write_text("\n".join(["path,number", *rows]), encoding="utf-8")
    run(capsys, "index", tmp_path / "c", table, "--model", "0")
    image = photos / "red.png"
    words = ["search", tmp_path / "c", "red", "--image", image, "--not", "white", "--json"]
    _, out, _ = run(capsys, *words, "--where", "number>=1", "--where", "number<3")
    uris = [Path(hit["uri"]).stem for hit in json.loads(out)["hits"]]
    assert sorted(uris) == ["blue", "green"]
    _, out, _ = run(capsys, "search", tmp_path / "c", "--image", image, "-k", 1, "--json")
    document = json.loads(out)
    assert document["query"] is None
    assert document["hits"][0]["uri"] == str(image)


def test_search_prints_a_table_with_brackets_intact(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paint(tmp_path / "p" / "[red].png", "red")
    run(capsys, "index", tmp_path / "c", tmp_path / "p", "--model", "0")
    status, out, _ = run(capsys, "search", tmp_path / "c", "red")
    assert status == 0
    assert "[red].png" in out.replace("\n", "").replace(" ", "")
    assert "rank" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["  "], "the query text is empty"),
        ([], "something to look for"),
        (["red", "--where", "year"], "filter 'year' is not understood"),
        (["red", "--image", "none.jpg"], "none.jpg"),
    ],
)
def test_senseless_searches_are_one_line_errors(
    tmp_path: Path,
    photos: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    Collection.create(tmp_path / "c", ColourEncoder(), model="0").close()
    run(capsys, "index", tmp_path / "c", photos)
    status, out, err = run(capsys, "search", tmp_path / "c", *words)
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_search_of_what_is_no_collection_is_a_one_line_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, "search", tmp_path / "none", "red")
    assert status == 1
    message = f"{tmp_path / 'none'}: there is no collection here; create it with `clipsys index`"
    assert err == f"error: {message}\n"


def test_search_without_hits_says_so_on_stderr(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "index", tmp_path / "c", photos, "--model", "0")
    status, out, err = run(capsys, "search", tmp_path / "c", "red", "--where", "x=1")
    assert (status, out) == (0, "")
    assert "no hits" in err


def test_search_reads_the_grammar_and_every_option(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "index", tmp_path / "c", photos, "--model", "0")

    def uris(*words: object) -> list[str]:
        status, out, _ = run(capsys, "search", tmp_path / "c", *words, "--json")
        assert status == 0
        return [Path(hit["uri"]).stem for hit in json.loads(out)["hits"]]

    everything = uris("red", "-k", 6)
    assert uris("red", "-k", 2, "--offset", 1) == everything[1:3]
    assert uris("2*red - 0.1*blue", "-k", 1) == ["red"]
    assert uris(f"image:{photos / 'blue.png'}", "-k", 1) == ["blue"]
    assert uris("--image", photos / "blue.png", "--image", photos / "white.png", "-k", 2)
    red = run(capsys, "search", tmp_path / "c", "red", "-k", 1, "--json")[1]
    own = json.loads(red)["hits"][0]["id"]
    assert uris("--like", own) == uris(f"item:{own}") == everything[1:]
    assert uris("--words", "white") == ["white"]
    assert "red" in uris("blue", "--not", "white", "--not", "0.2*black", "--diverse")
    assert uris("red", "--min-score", "0.99") == ["red"]


def test_batch_of_queries_is_answered_line_by_line(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "index", tmp_path / "c", photos, "--model", "0")
    (tmp_path / "q.txt").write_text("red\n\n  blue + 0.1*white \n", encoding="utf-8")
    command = ["search", tmp_path / "c", "--queries", tmp_path / "q.txt", "-k", 1]
    _, out, _ = run(capsys, *command, "--json")
    documents = json.loads(out)
    assert [document["query"] for document in documents] == ["red", "blue + 0.1*white"]
    assert [Path(document["hits"][0]["uri"]).stem for document in documents] == ["red", "blue"]
    _, out, _ = run(capsys, *command, "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(row["query"], row["rank"], Path(row["uri"]).stem) for row in rows] == [
        ("red", "1", "red"),
        ("blue + 0.1*white", "1", "blue"),
    ]
    assert json.loads(rows[0]["metadata"]) == {}
    assert float(rows[0]["score"]) == pytest.approx(1, abs=1e-3)
    status, out, _ = run(capsys, *command)
    assert (status, out.count("rank")) == (0, 2)
    for words, message in (
        ([*command, "--words", "a"], "--queries stands alone"),
        (["search", tmp_path / "c", "--queries", tmp_path / "none"], "none: the queries cannot be"),
        (["search", tmp_path / "c", "--queries", photos / "red.png"], "the queries cannot be read"),
    ):
        status, out, err = run(capsys, *words)
        assert (status, out) == (1, "")
        assert message in err


def test_json_and_csv_together_are_wrong_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "search", tmp_path, "red", "--json", "--csv")[0] == 2


def test_a_collection_may_be_a_link_and_stays_one(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for name, target in (("a", "empty"), ("b", "none-yet")):
        (tmp_path / name).symlink_to(target)
        assert run(capsys, "index", tmp_path / name, photos, "--model", "0")[0] == 0
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / target / "manifest.json").is_file()


def test_a_collection_whose_path_is_not_utf8_is_refused_before_anything_is_made(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "c\udcff"
    status, _, err = run(capsys, "index", folder, photos, "--model", "0")
    assert (status, "has to be UTF-8 text" in err, folder.exists()) == (1, True, False)


def test_an_id_that_no_database_holds_is_an_id_of_no_item(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "index", tmp_path / "c", photos, "--model", "0")[0] == 0
    status, out, err = run(capsys, "remove", tmp_path / "c", 10**30)
    assert (status, "1 id of no item" in out + err) == (0, True)
