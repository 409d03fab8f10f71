from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from clipsys.corpora.columns import Columns
from clipsys.corpora.delimited import Row, read_text_rows
from clipsys.corpora.sources import iterate_source
from clipsys.errors import ConfigError, DataError


def _rows(folder: Path, data: str | bytes, name: str = "t.csv", **columns: str) -> list[Row]:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return list(read_text_rows(path, Columns(**columns)))  # type: ignore[arg-type]


def _cells(*arguments: object, **columns: str) -> list[dict[str, object]]:
    return [row.cells for row in _rows(*arguments, **columns)]  # type: ignore[arg-type]


_PLAIN = [{"path": "a.png", "caption": "one, two"}, {"path": "b.png", "caption": "three"}]


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ('path,caption\na.png,"one, two"\nb.png,three\n', "t.csv", None),
        ("path;caption\na.png;one, two\nb.png;three\n", "t.csv", "semicolons"),
        ("\ufeffpath;caption\na.png;one, two\nb.png;three\n", "t.csv", "semicolons"),
        ("sep=;\r\npath;caption\r\na.png;one, two\r\nb.png;three\r\n", "t.csv", "semicolons"),
        ("path\tcaption\na.png\tone, two\nb.png\tthree\n", "t.csv", "tabs"),
        ("path | caption\na.png|one, two\nb.png|three", "t.csv", "vertical bars"),
        ('path\tcaption\na.png\t"one, two"\nb.png\tthree\n', "t.tsv", None),
        ('path,caption\na.png,"one, two"\nb.png,three\n', "t.tsv", "commas"),
        ('path,caption\ra.png,"one, two"\rb.png,three\r', "t.csv", None),
        ('\n\npath,caption\n\na.png,"one, two"\n,\n\nb.png,three\n\n', "t.csv", None),
        ('"path";"caption"\n"a.png";"one, two"\n"b.png";"three"\n', "t.csv", "semicolons"),
    ],
)
def test_the_header_tells_what_separates_cells(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, name: str, said: str | None
) -> None:
    with caplog.at_level(logging.INFO, "clipsys"):
        assert _cells(tmp_path, text, name) == _PLAIN
    if said:
        assert f"cells are separated by {said}" in caplog.text
    else:
        assert not caplog.text


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_a_byte_order_mark_tells_the_encoding(tmp_path: Path, encoding: str) -> None:
    text = "path\tcaption\r\na.png\tcafé\r\n"
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    for name, lines in (("t.csv", text), ("t.jsonl", '{"path": "a.png", "caption": "café"}')):
        data = (mark + lines).encode(encoding)
        assert _cells(tmp_path, data, name) == [{"path": "a.png", "caption": "café"}]


def test_other_encodings_are_refused_with_a_remedy_and_read_when_named(tmp_path: Path) -> None:
    data = "path,caption\na.png,plain\nb.png,café\n".encode("cp1252")
    with pytest.raises(DataError, match=r"t\.csv:3: is not UTF-8 .*0xe9.*--encoding cp1252.*iconv"):
        _rows(tmp_path, data)
    assert _cells(tmp_path, data, encoding="cp1252")[1]["caption"] == "café"
    with pytest.raises(DataError, match="cannot be read as ascii"):
        _rows(tmp_path, data, encoding="ascii")
    for unknown in ("klingon", "base64"):
        with pytest.raises(ConfigError, match=f"--encoding {unknown}: there is no such"):
            _rows(tmp_path, data, encoding=unknown)
    no_mark = "path,caption\na.png,x\n".encode("utf-16-le")
    with pytest.raises(DataError, match="utf-16-le"):
        _rows(tmp_path, no_mark)
    assert _cells(tmp_path, no_mark, encoding="utf-16-le") == [{"path": "a.png", "caption": "x"}]


def test_a_cell_may_be_very_long_and_hold_lines_and_delimiters(tmp_path: Path) -> None:
    long = "x" * 300_000
    text = f'path,caption\na.png,{long}\nb.png,"two\nlines, ""quoted"" | here; too"\n'
    rows = _rows(tmp_path, text)
    assert [row.number for row in rows] == [2, 3]
    assert rows[0].cells["caption"] == long
    assert rows[1].cells["caption"] == 'two\nlines, "quoted" | here; too'


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('path,caption\na.png,x\nb.png,"not closed\nc.png,y\n', 3, "quotation mark"),
        ('path,caption\na.png,"a dog\nb.png,"a cat"\n', 2, "quotation mark"),
        ('path,caption\na.png,x\nb.png,"a" b\n', 3, "quotation mark"),
        ("sep=;\npath;caption\na.png;x;y\n", 3, r"more cells .*\(3 for 2\)"),
        ('path,caption\na.png,"x\ny"\nb.png,x,y\n', 4, "more cells"),
        ("path,caption\na.png,x\0y\n", 2, "NUL"),
    ],
)
def test_a_malformed_row_is_an_error_with_its_line(
    tmp_path: Path, text: str, line: int, message: str
) -> None:
    with pytest.raises(DataError, match=rf"t\.csv:{line}: .*{message}"):
        _rows(tmp_path, text)


def test_columns_of_one_name_are_captions_or_an_error(tmp_path: Path) -> None:
    (row,) = _cells(tmp_path, "path,caption,caption,,\na.png,one,two,,\n")
    assert row["caption"] == ["one", "two"]
    (row,) = _cells(tmp_path, '{"path": "a", "caption": "one", "caption": "two"}', "t.jsonl")
    assert row["caption"] == ["one", "two"]
    with pytest.raises(DataError, match="columns 2 and 3 are both called 'year'"):
        _rows(tmp_path, "path,year,year\na.png,1,2\n")
    with pytest.raises(DataError, match=r"t\.jsonl:1: .*both called 'year'"):
        _rows(tmp_path, '{"path": "a", "year": 1, "year": 2}', "t.jsonl")


def test_tables_without_rows_say_so(tmp_path: Path) -> None:
    for text, message in (
        ("path,caption\n", "has no rows"),
        ("", "is empty"),
        ("\n\n", "is empty"),
    ):
        (tmp_path / "t.csv").write_text(text)
        with pytest.raises(DataError, match=message):
            list(iterate_source(tmp_path / "t.csv"))


def test_json_lines_name_the_line_that_is_none(tmp_path: Path) -> None:
    good = json.dumps({"path": "a.png"})
    with pytest.raises(DataError, match=r"t\.jsonl:2: not JSON"):
        _rows(tmp_path, f"{good}\n{{\n", "t.jsonl")
    with pytest.raises(DataError, match=r"t\.jsonl:3: expected a JSON object a line, found list"):
        _rows(tmp_path, f"{good}\n\n[1]\n", "t.jsonl")


def test_text_of_utf16_without_a_mark_is_not_taken_for_cp1252(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_bytes("path,caption\n0.png,café\n".encode("utf-16-le"))
    with pytest.raises(DataError, match="--encoding utf-16-le"):
        list(read_text_rows(table, Columns()))
