from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from clipsys.errors import QueryError
from clipsys.retrieval.filters import Condition, Where, parse_condition, parse_where
from clipsys.retrieval.items import Batch, NewItem
from clipsys.retrieval.segments import SegmentFile
from clipsys.retrieval.store import Store

ITEMS: list[dict[str, Any]] = [
    {"year": 2019, "colour": "red", "tags": ["Sea", "sun"], "sharp": True},
    {"year": "2020", "colour": "Red wine", "tags": [], "sharp": False},
    {"year": 2021.0, "colour": "blue", "date": "2021-05-01", "sharp": "true"},
    {"year": None, "colour": "ÉTÉ", "code": "007"},
    {"code": 7, "big": 123456789012345678, "date": "2023-01-31"},
    {'it\'s "odd"; --': "x", "code": "7"},
]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store.create(tmp_path / "items.sqlite")
    batch = Batch(
        new=[
            NewItem(f"/p/{n}.jpg", str(n), 1, 1, (f"caption {n}",) if n else (), metadata)
            for n, metadata in enumerate(ITEMS)
        ]
    )
    made.commit(batch, SegmentFile("s.npy", len(ITEMS), "0"))
    return made


def matching(store: Store, where: Where) -> list[int]:
    """Positions in ITEMS."""
    return [int(i) - 1 for i in store.select_ids(parse_where(where))]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (None, [0, 1, 2, 3, 4, 5]),
        ({"year": 2020}, [1]),  # the text "2020" is the number 2020
        ({"year": "2019"}, [0]),
        ({"year": 2021}, [2]),
        ("year=2021", [2]),
        ("year>=2020", [1, 2]),
        ("year<2020", [0]),
        ("year>2019.5", [1, 2]),
        ({"year": [2019, 2021]}, [0, 2]),
        ("year in 2019, 2020", [0, 1]),
        ({"year": []}, []),
        ({"year": None}, [3, 4, 5]),  # null or absent
        ("year!=2019", [1, 2, 3, 4, 5]),
        ("colour=red", [0]),
        ("colour contains RED", [0, 1]),
        ("colour contains été", [3]),
        ("tags contains sea", [0]),
        ("tags contains se", []),  # of a list, whole elements
        ({"sharp": True}, [0, 2]),
        ("sharp=false", [1]),
        ({"sharp": 1}, []),
        ({"code": 7}, [4, 5]),  # "007" is not a number
        ("code=007", [3]),
        ({"big": 123456789012345678}, [4]),
        ({"big": 123456789012345679}, []),
        ("date>=2022-01-01", [4]),
        ("date<2022", []),  # a date is no number
        ({'it\'s "odd"; --': "x"}, [5]),
        ("uri=/p/3.jpg", [3]),
        ("caption contains CAPTION", [1, 2, 3, 4, 5]),
        ({"caption": None}, [0]),
        (["year>=2019", "colour contains red", "sharp=true"], [0]),
        ("nothing=1", []),
        ({"colour": "x' OR '1'='1"}, []),
    ],
)
def test_filter_selects(store: Store, where: Where, expected: list[int]) -> None:
    assert matching(store, where) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("year=2024", Condition("year", "=", "2024")),
        (" year >= 2024 ", Condition("year", ">=", "2024")),
        ("a!=b=c", Condition("a", "!=", "b=c")),
        ("size in box=3", Condition("size", "in", ["box=3"])),
        ("colour in red, blue", Condition("colour", "in", ["red", "blue"])),
        ("tags contains a sea", Condition("tags", "contains", "a sea")),
        ("empty=", Condition("empty", "=", "")),
    ],
)
def test_condition_text_is_read(text: str, expected: Condition) -> None:
    assert parse_condition(text) == expected


@pytest.mark.parametrize("text", ["", "year", "=5", "contains x"])
def test_text_that_is_no_condition_is_an_error(text: str) -> None:
    with pytest.raises(QueryError, match=re.escape(f"filter {text!r} is not understood")):
        parse_condition(text)


def test_unusable_values_are_errors() -> None:
    with pytest.raises(QueryError, match="unknown operator"):
        Condition("a", "~", 1)  # type: ignore[arg-type]
    with pytest.raises(QueryError, match="`in` expects a list"):
        Condition("a", "in", "red")
    with pytest.raises(QueryError, match="is dict; expected"):
        parse_where({"a": {"b": 1}})


@pytest.mark.parametrize("operator", ["=", "!=", "<", "<=", ">", ">=", "in", "contains"])
def test_key_found_by_its_path_is_the_one_found_among_all_keys(
    tmp_path: Path, operator: Any
) -> None:
    values: list[Any] = [
        *(0, 7, -3, 7.0, 7.5, 2**62, "7", "007", "", "Sea", 'a "b"', "null", "true"),
        *(True, False, None, ["Sea", 7], [], {"x": 7}),
    ]
    plain, odd = "a key.of-2", 'a "key"'  # no path is made for the second
    made = Store.create(tmp_path / "items.sqlite")
    items: list[dict[str, Any]] = [{plain: value, odd: value, "other": 7} for value in values]
    new = [NewItem(f"/{n}", str(n), 1, 1, (), metadata) for n, metadata in enumerate([*items, {}])]
    made.commit(Batch(new=new), SegmentFile("s.npy", len(new), "0"))
    for value in values:
        if isinstance(value, list | dict):
            continue
        sought = [value, "Sea"] if operator == "in" else value
        by_path, among_all = (
            matching(made, Condition(key, operator, sought)) for key in (plain, odd)
        )
        assert by_path == among_all, value
