from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from clipsys.corpora.records import to_sample
from clipsys.corpora.sources import iterate_source, read_uri
from clipsys.corpora.tables import Columns
from clipsys.errors import DataError
from tests.conftest import encode_png, noise_image, write_training_shards


def _table(folder: Path, text: str, name: str = "t.csv") -> Path:
    for number in range(3):
        noise_image(number).save(folder / f"{number}.png")
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_folder_gives_captions_and_class_labels(image_folder: Path) -> None:
    records = list(iterate_source(image_folder))
    assert [record.label for record in records] == ["cats"] * 3 + ["dogs"] * 3
    assert records[0].captions == ("picture 1", "number 1")
    assert Path(records[0].uri).is_absolute()
    assert records[0].read() == Path(records[0].uri).read_bytes()
    assert records[0].size_bytes == Path(records[0].uri).stat().st_size


def test_json_beside_an_image_is_its_metadata(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b", "c", "d", "e", "f"):
        noise_image(0).save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("a dog", encoding="utf-8")
    (tmp_path / "a.json").write_text('{"captions": ["a dog", "a pup"], "width": 4}')
    (tmp_path / "b.json").write_text('{"caption": "a cat", "license": null}')  # img2dataset's
    (tmp_path / "c.json").write_text("[1, 2]")
    (tmp_path / "d.json").write_bytes(b"\xff{")
    (tmp_path / "e.json").write_text("[" * 200_000)
    (tmp_path / "f.json").write_text('{"captions": 7, "width": 4}')
    records = list(iterate_source(tmp_path))
    assert [(record.captions, record.metadata) for record in records] == [
        (("a dog", "a pup"), {"width": 4}),
        (("a cat",), {"caption": "a cat", "license": None}),
        ((), {}),
        ((), {}),
        ((), {}),
        (("7",), {"width": 4}),
    ]
    assert "3 .json files beside images are not JSON objects" in caplog.text


def test_a_link_loop_does_not_end_in_a_loop(image_folder: Path) -> None:
    (image_folder / "cats" / "up").symlink_to(image_folder)
    assert len(list(iterate_source(image_folder))) == 6


def test_rows_of_the_same_file_become_one_record(tmp_path: Path) -> None:
    table = _table(tmp_path, "filepath,caption\n0.png,a\n1.png,b\n0.png,c\n")
    records = list(iterate_source(table))
    assert [record.captions for record in records] == [("a", "c"), ("b",)]


def test_columns_become_metadata_with_types(tmp_path: Path) -> None:
    table = _table(tmp_path, "path,title,year,price,code,note\n0.png,x,2024,9.5,007,\n")
    (record,) = iterate_source(table)
    assert record.metadata == {"year": 2024, "price": 9.5, "code": "007"}
    assert record.captions == ("x",)


@pytest.mark.parametrize("name", ["t.tsv", "t.jsonl", "t.parquet"])
def test_every_kind_of_table_is_read(tmp_path: Path, name: str) -> None:
    rows = [
        {"file": "0.png", "caption": "zero", "n": 1},
        {"file": "1.png", "caption": "one", "n": 2},
    ]
    if name.endswith("tsv"):
        text = "file\tcaption\tn\n" + "".join(
            f"{r['file']}\t{r['caption']}\t{r['n']}\n" for r in rows
        )
        table = _table(tmp_path, text, name)
    elif name.endswith("jsonl"):
        table = _table(tmp_path, "\n".join(map(json.dumps, rows)), name)
    else:
        import pyarrow
        import pyarrow.parquet

        table = _table(tmp_path, "", name)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    records = list(iterate_source(table))
    assert [(record.captions, record.metadata) for record in records] == [
        (("zero",), {"n": 1}),
        (("one",), {"n": 2}),
    ]


def test_a_parquet_table_may_hold_the_images(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    noise_image(0).save(tmp_path / "0.png")
    data = (tmp_path / "0.png").read_bytes()
    table = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"image": data, "caption": "x"}]), table)
    (record,) = iterate_source(table)
    assert record.read() == data
    assert read_uri(record.uri) == data


def test_a_missing_file_of_a_table_fails_when_it_is_read(tmp_path: Path) -> None:
    table = _table(tmp_path, "path\ngone.png\n")
    (record,) = iterate_source(table)
    assert record.size_bytes is None
    with pytest.raises(DataError, match=r"gone\.png: cannot be read"):
        record.read()


def test_columns_can_be_named(tmp_path: Path) -> None:
    table = _table(tmp_path, "where,what,kind\n0.png,a dog,animal\n")
    (record,) = iterate_source(table, columns=Columns("where", ("what",), "kind"))
    assert (record.captions, record.label) == (("a dog",), "animal")
    with pytest.raises(DataError, match="no column 'nowhere'; the columns are where, what, kind"):
        list(iterate_source(table, columns=Columns("nowhere")))


def test_shards_are_records_and_can_be_read_again(tmp_path: Path) -> None:
    write_training_shards(tmp_path / "s", 5)
    records = list(iterate_source(tmp_path / "s"))
    assert len(records) == 5
    assert read_uri(records[3].uri) == records[3].read()
    with pytest.raises(DataError, match="no such sample"):
        read_uri(records[0].uri.replace("#0000", "#9999"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "gone", "there is no such folder, table or shard"),
        (lambda p: p / "gone.csv", "there is no such table"),
        (lambda p: p, r"no images .* found"),
        (lambda p: _table(p, "a,b\n1,2\n"), "no column names the image file"),
        (lambda p: _table(p, "path\n\xff".encode("latin-1").decode("latin-1")), None),
        (lambda p: _table(p, "{bad\n", "t.jsonl"), r"t\.jsonl:1: not JSON"),
        (lambda p: _table(p, "path,caption\na.png,x,y,z\n"), "more cells than the header"),
        (lambda p: _table(p, "x", "t.parquet"), "cannot be read as Parquet"),
    ],
)
def test_an_unusable_source_says_why(tmp_path: Path, make: object, message: str | None) -> None:
    source = make(tmp_path)  # type: ignore[operator]
    if message is None:
        list(iterate_source(source))
        return
    with pytest.raises(DataError, match=message):
        list(iterate_source(source))


def test_a_file_that_is_no_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match="not a source of images"):
        list(iterate_source(tmp_path / "notes.txt"))


def test_a_record_becomes_a_sample(image_folder: Path) -> None:
    record = next(iter(iterate_source(image_folder)))
    sample = to_sample(record, "k")
    assert (sample.key, sample.suffix, sample.label) == ("k", "png", "cats")
    assert sample.image == Path(record.uri).read_bytes()


@pytest.mark.parametrize("as_struct", [False, True])
@pytest.mark.parametrize("name", ["image", "photo"])
def test_a_parquet_column_of_images_is_found_by_its_content(
    tmp_path: Path, as_struct: bool, name: str
) -> None:
    images = [encode_png(np.full((4, 4, 3), value, np.uint8)) for value in range(5)]
    rows = [
        {name: {"bytes": image, "path": "a.png"} if as_struct else image, "caption": f"{at}"}
        for at, image in enumerate(images)
    ]
    table = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table, row_group_size=2)
    for columns in (Columns(), Columns(path=name)):
        records = list(iterate_source(table, columns=columns))
        assert [record.read() for record in records] == images
        assert [read_uri(record.uri) for record in records] == images
        assert [record.captions for record in records] == [(f"{at}",) for at in range(5)]
        assert all(not record.metadata for record in records)


def test_other_bytes_in_a_table_of_paths_are_no_images(tmp_path: Path) -> None:
    table = tmp_path / "t.parquet"
    row = {"path": "a.png", "vector": b"1234", "7": "seven"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), table)
    (record,) = iterate_source(table)
    assert record.uri == str(tmp_path / "a.png")
    assert (record.captions, record.metadata) == ((), {"7": "seven"})


def test_files_that_are_no_images_by_their_names_are_said_once(
    image_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.psd", "b.psd", "c.pdf", "notes.txt", ".hidden.psd"):
        (image_folder / name).write_bytes(b"something")
    with caplog.at_level("INFO"):
        for _ in range(2):
            list(iterate_source(image_folder))
    (line,) = [r.getMessage() for r in caplog.records if "not images by name" in r.getMessage()]
    assert "3 other files" in line and "(2 .psd, 1 .pdf)" in line
