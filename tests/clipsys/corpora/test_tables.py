from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipsys.corpora.columns import Columns
from clipsys.corpora.records import Record
from clipsys.corpora.sources import iterate_source, read_uri
from clipsys.corpora.tables import locate
from clipsys.errors import ConfigError, DataError
from tests.conftest import noise_image


@pytest.fixture
def pngs(tmp_path: Path) -> list[bytes]:
    """Files 0.png to 3.png, and what they hold."""
    for number in range(4):
        noise_image(number).save(tmp_path / f"{number}.png")
    return [(tmp_path / f"{number}.png").read_bytes() for number in range(4)]


_HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _outcomes(records: list[Record]) -> list[bytes | str]:
    """The image of each record, read by itself and by its uri, or why there is none."""
    outcomes: list[bytes | str] = []
    for record in records:
        try:
            data = record.read()
            assert read_uri(record.uri) == data
            outcomes.append(data)
        except DataError as error:
            outcomes.append(str(error))
    return outcomes


def _mixed(pngs: list[bytes]) -> list[dict[str, Any] | None]:
    return [
        None,
        {"bytes": None, "path": "0.png"},
        {"bytes": pngs[1], "path": "elsewhere.png"},
        {"bytes": None, "path": None},
        {"bytes": None, "path": "gone.png"},
        {"bytes": pngs[2], "path": None},
    ]


def test_rows_of_bytes_of_paths_and_of_neither_are_told_by_the_schema(
    tmp_path: Path, pngs: list[bytes]
) -> None:
    rows = _mixed(pngs)
    columns = {"image": pa.array(rows, _HF_IMAGE), "text": [f"row {n}" for n in range(6)]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    records = list(iterate_source(tmp_path / "t.parquet"))
    outcomes = _outcomes(records)
    assert [outcome for outcome in outcomes if isinstance(outcome, bytes)] == [
        pngs[1],
        pngs[2],
        pngs[0],
    ]
    assert [record.captions for record in records][-2:] == [("row 1",), ("row 4",)]
    failures = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert len(failures) == 3
    assert sum("the row names no image" in failure for failure in failures) == 2
    assert not any("{" in failure for failure in failures)


def test_json_lines_with_the_same_cells_give_the_same(tmp_path: Path, pngs: list[bytes]) -> None:
    rows = [row for row in _mixed(pngs) if row is None or row["bytes"] is None]
    rows.append({"bytes": "aGVsbG8=", "path": None})
    lines = [json.dumps({"image": row, "text": "x"}) for row in rows]
    (tmp_path / "t.jsonl").write_text("\n".join([*lines, '{"text": "no image at all"}']))
    outcomes = _outcomes(list(iterate_source(tmp_path / "t.jsonl")))
    assert [outcome for outcome in outcomes if isinstance(outcome, bytes)] == [pngs[0]]
    failures = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert len(failures) == 5
    assert any("images inside JSON are not read" in failure for failure in failures)
    assert not any("{" in failure for failure in failures)


@pytest.mark.parametrize(
    "kind",
    [
        pa.binary(),
        pa.large_binary(),
        pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())]),
        pa.struct([("bytes", pa.binary()), ("width", pa.int32())]),
    ],
)
@pytest.mark.parametrize("name", ["image", "photo"])
def test_images_stand_in_columns_of_several_types_and_names(
    tmp_path: Path, pngs: list[bytes], kind: pa.DataType, name: str
) -> None:
    is_struct = pa.types.is_struct(kind)
    cells = [{"bytes": data} if is_struct else data for data in pngs[:2]]
    columns = {name: pa.array(cells, kind), "n": [1, 2]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet", row_group_size=1)
    records = list(iterate_source(tmp_path / "t.parquet"))
    assert _outcomes(records) == pngs[:2]
    assert [record.metadata for record in records] == [{"n": 1}, {"n": 2}]


def test_a_list_of_images_and_a_second_column_have_addresses_of_their_own(
    tmp_path: Path, pngs: list[bytes]
) -> None:
    pair = pa.array([[{"bytes": pngs[0]}, {"path": "1.png"}], []], pa.list_(_HF_IMAGE))
    other = pa.array([pngs[2], pngs[3]], pa.binary())
    table = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": pair, "a/b #2": other}), table)
    records = list(iterate_source(table))
    assert [outcome for outcome in _outcomes(records) if isinstance(outcome, bytes)] == pngs[:2]
    assert records[0].uri == f"{table}#0.0"
    records = list(iterate_source(table, columns=Columns(path="A/B #2")))
    assert _outcomes(records) == pngs[2:]


def test_only_images_make_a_table(tmp_path: Path, pngs: list[bytes]) -> None:
    pq.write_table(pa.table({"image": pngs}), tmp_path / "t.parquet")
    assert _outcomes(list(iterate_source(tmp_path / "t.parquet"))) == pngs
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="has no rows"):
        list(iterate_source(tmp_path / "t.parquet"))


def test_dictionaries_numbers_of_32_bits_and_class_names_become_plain_metadata(
    tmp_path: Path, pngs: list[bytes]
) -> None:
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    table = pa.table(
        {
            "file": pa.array(["0.png", "1.png"]).dictionary_encode(),
            "colour": pa.array(["red", "red"]).dictionary_encode(),
            "price": pa.array([0.1, 2.5], pa.float32()),
            "size": [{"width": 3, "thumbnail": b"x"}, None],
            "label": [1, 0],
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "t.parquet")
    first, second = iterate_source(tmp_path / "t.parquet")
    assert first.read() == pngs[0]
    assert first.metadata == {"colour": "red", "price": 0.1, "size": {"width": 3}}
    assert (first.label, second.label) == ("dog", "cat")
    assert second.metadata == {"colour": "red", "price": 2.5}


def test_faults_of_a_parquet_table_are_one_line(tmp_path: Path, pngs: list[bytes]) -> None:
    pq.write_table(pa.table({"image": pngs, "n": [1, 2, 3, 4]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="column 'n' is of type int64; expected paths"):
        list(iterate_source(tmp_path / "t.parquet", columns=Columns(path="n")))
    with pytest.raises(ConfigError, match="leave out --encoding"):
        list(iterate_source(tmp_path / "t.parquet", columns=Columns(encoding="utf-8")))
    for member in ("4", "x:1", "0.1", "y", ".", "0:0:"):
        with pytest.raises(DataError):
            read_uri(f"{tmp_path}/t.parquet#{member}")


@pytest.mark.parametrize(
    "header",
    ["Image Name", "file path", "Filename", "FILE_PATH", "image-path", "ImageName", " path "],
)
def test_names_of_columns_need_no_exact_spelling(
    tmp_path: Path, pngs: list[bytes], header: str
) -> None:
    (tmp_path / "t.csv").write_text(f"{header},Caption 1,CAPTION_2,Class\n0.png,a,b,c\n")
    (record,) = iterate_source(tmp_path / "t.csv")
    assert record.read() == pngs[0]
    assert (record.captions, record.label, record.metadata) == (("a", "b"), "c", {})


@pytest.mark.parametrize(
    "cell",
    [
        "sub dir/a b.png",
        "  sub dir/a b.png ",
        "./sub dir/../sub dir/a b.png",
        r"sub dir\a b.png",
        "{folder}/sub dir/a b.png",
        "file://{folder}/sub%20dir/a%20b.png",
        " file://localhost{folder}/sub%20dir/a b.png",
        {"path": "sub dir/a b.png", "bytes": None},
    ],
)
def test_a_cell_names_a_file_in_many_ways(tmp_path: Path, cell: Any) -> None:
    (tmp_path / "sub dir").mkdir()
    (tmp_path / "sub dir" / "a b.png").touch()
    if isinstance(cell, str):
        cell = cell.replace("{folder}", str(tmp_path))
    assert locate(tmp_path / "t.csv", cell).samefile(tmp_path / "sub dir" / "a b.png")


def test_a_name_that_ends_in_a_blank_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / r"a\b.png ").touch()
    assert locate(tmp_path / "t.csv", r"a\b.png ").is_file()


def test_rows_that_name_no_file_are_counted_and_the_others_used(
    tmp_path: Path, pngs: list[bytes]
) -> None:
    cells = ["https://example.org/a.png", "S3://bucket/b.png", '""', " ", "gone.png", "0.png"]
    rows = "".join(f"{cell},x\n" for cell in cells)
    (tmp_path / "t.csv").write_text(f"path,caption\n{rows}")
    outcomes = _outcomes(list(iterate_source(tmp_path / "t.csv")))
    assert [outcome for outcome in outcomes if isinstance(outcome, bytes)] == [pngs[0]]
    failures = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert [("URLs are not fetched" in one, "img2dataset" in one) for one in failures] == [
        (True, True),
        (True, True),
        (False, False),
        (False, False),
        (False, False),
    ]
    assert f"{tmp_path}/t.csv#2: URLs are" in failures[0]
    with pytest.raises(DataError, match=r"t\.csv#2: the row names no image; mend the table"):
        read_uri(f"{tmp_path}/t.csv#2")


def test_a_table_of_addresses_says_how_to_fetch_them(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("URL,TEXT\nhttps://example.org/a.png,x\n")
    with pytest.raises(DataError, match=r"column 'URL' holds URLs.*not fetched.*img2dataset"):
        list(iterate_source(tmp_path / "t.csv"))


def test_cells_of_captions_and_labels_stay_text_and_padding_goes(
    tmp_path: Path, pngs: list[bytes]
) -> None:
    header, row = "path,caption,label,year,code,colour", "0.png, 1.50 ,2.0, 2024 ,007, red "
    (tmp_path / "t.csv").write_text(f"{header}\n{row}\n")
    (record,) = iterate_source(tmp_path / "t.csv")
    assert (record.captions, record.label) == (("1.50",), "2.0")
    assert record.metadata == {"year": 2024, "code": "007", "colour": "red"}


def test_settings_for_tables_are_refused_where_there_is_none() -> None:
    columns = Columns(captions=("a",), encoding="utf-16")
    with pytest.raises(ConfigError, match="--caption-column, --encoding: for tables only"):
        columns.check_used(["folder", "shards"])
    columns.check_used(["folder", "table"])
    Columns().check_used(["folder"])


def test_a_row_of_json_that_no_file_can_have_costs_itself_alone(
    tmp_path: Path, pngs: list[bytes]
) -> None:
    table = tmp_path / "t.jsonl"
    table.write_text('{"path": "\\ud800.png"}\n{"path": "0.png"}\n')
    bad, good = sorted(iterate_source(table), key=lambda one: one.uri.endswith("0.png"))
    assert good.read() == pngs[0]
    with pytest.raises(DataError, match=r"#1: the path .* is not valid Unicode"):
        bad.read()


def test_a_number_of_thousands_of_digits_is_an_error_with_its_line(tmp_path: Path) -> None:
    table = tmp_path / "t.jsonl"
    table.write_text('{"path": "0.png", "n": ' + "9" * 5_000 + "}\n")
    with pytest.raises(DataError, match=r"t\.jsonl:1: not JSON"):
        list(iterate_source(table))


def test_parquet_cells_that_python_has_no_value_for_cost_no_row(
    tmp_path: Path, pngs: list[bytes]
) -> None:
    text = pa.array([b"0.png", b"x\xff"])
    columns = {
        "path": ["0.png", "1.png"],
        "caption": pa.Array.from_buffers(pa.string(), 2, text.buffers()),
        "taken": pa.array([0, 2**50], pa.timestamp("ms")),
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    first, second = iterate_source(tmp_path / "t.parquet")
    assert (first.captions, second.captions) == (("0.png",), ("x\udcff",))
    assert [first.read(), second.read()] == pngs[:2]


def test_a_parquet_column_of_another_type_is_named_with_its_type(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": [1, 2]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="column 'path' is of type int64"):
        list(iterate_source(tmp_path / "t.parquet"))
