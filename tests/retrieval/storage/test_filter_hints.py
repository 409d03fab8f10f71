from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from clipsys.errors import QueryError
from clipsys.retrieval.storage.conditions import parse_where
from clipsys.retrieval.storage.items import Batch, NewItem
from clipsys.retrieval.storage.segments import SegmentFile
from clipsys.retrieval.storage.sorting import parse_sort
from clipsys.retrieval.storage.store import Store

ITEMS: list[dict[str, Any]] = [
    {"colour": "Blue", "year": 2010, "tags": ["Sea", "sun"], "size": {"width": 3, "box": {"h": 1}}},
    {"colour": "Navy Blue", "year": 2020, "price": 0.1, "taken": "2024-05-31T12:00:00"},
    {"colour": "Red", "year": "2015", "price": 0.10000000149011612, "taken": "2024-05-01 08:00:00"},
    {"season": "", "size": {"width": "10", "note": "x" * 300}, "taken": "2024-06-01", "a.b": 7},
]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store.create(tmp_path / "items.sqlite")) as made:
        new = [NewItem(f"/p/{n}.jpg", str(n), 1, 9 - n, (), row) for n, row in enumerate(ITEMS)]
        made.commit(Batch(new=new), SegmentFile("s.npy", len(new), "0"))
        yield made


@pytest.mark.parametrize(
    ("where", "hint"),
    [
        ("colour=blue", "no 'colour' is 'blue'; the nearest is 'Blue' (capitals count)"),
        ("colour=navy-blue", "the nearest is 'Navy Blue'"),
        ("colour in bleu,green", "no 'colour' is 'bleu' or 'green'; the nearest is 'Blue'"),
        ("colour=violet", "no 'colour' is 'violet'; there is 'Blue', 'Navy Blue', 'Red'"),
        ("color=Blue", "no item has metadata 'color'; there is a.b, colour, "),
        ("color=Blue", "(did you mean 'colour'?)"),
        ("Colour=Blue", "(did you mean 'colour'?)"),
        ("tags=Sea", "'tags' is a list; write: tags contains Sea"),
        ("tags contains sae", "the nearest is 'Sea'"),
        ("colour=", "`colour is missing` finds items without it"),
        ("year>2030", "no 'year' > 2030; it is 2010 to 2020"),
        ("taken<2024", "it is text, '2024-05-01 08:00:00' to '2024-06-01'"),
        ("size.width=4", "no item has size.width=4, a field of 'size'"),
        (["colour=Blue", "year=2020"], "for none do all: colour=Blue for 1, year=2020 for 1"),
        ("uri=/nowhere", "no item has uri=/nowhere"),
    ],
)
def test_a_filter_that_selects_nothing_says_why(
    store: Store, caplog: pytest.LogCaptureFixture, where: Any, hint: str
) -> None:
    conditions = parse_where(where)
    assert not len(store.select_ids(conditions))
    assert hint in caplog.text
    assert hint in (store.explain_nothing(conditions) or "")


def test_a_filter_that_selects_something_needs_no_explanation(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    assert store.explain_nothing(parse_where("colour=Blue")) is None
    store.select_ids(parse_where("colour=Blue"))
    assert not caplog.text


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("price=0.1", {1, 2}),  # 64 and 32 bits
        ("price<=0.1", {1, 2}),
        ("price>=0.1", {1, 2}),
        ("price<0.1", set()),
        ("price>0.1", set()),
        ("price!=0.1", {0, 3}),
        ("size.width=3", {0}),
        ("size.width>=3", {0, 3}),
        ("size.box.h=1", {0}),
        ("size.note contains xxx", {3}),
        ("size.width is missing", {1, 2}),
        ("size.width is present", {0, 3}),
        ("a.b=7", {3}),  # a key that has the dot itself
        ("colour.x=1", set()),
        ("taken=2024-05-31", {1}),  # the whole day
        ("taken=2024-05", {1, 2}),
        ("taken!=2024-05", {0, 3}),
        ("taken<=2024-05-31", {1, 2}),
        ("taken>2024-05-31", {3}),
        (["taken>=2024-05-02", "taken<2024-06"], {1}),
        ("taken>=2024-05-31 11:59", {1, 3}),
        ("taken=2024-05-31 12:00:00", {1}),  # a T or a blank before the time
        ("taken<2024-05-01T09:00", {2}),
        ("season is missing", {0, 1, 2}),
        ("season=", {3}),
    ],
)
def test_values_are_compared_as_people_mean_it(
    store: Store, where: Any, expected: set[int]
) -> None:
    assert {int(one) - 1 for one in store.select_ids(parse_where(where))} == expected


def test_items_are_sorted_by_numbers_then_by_texts(store: Store) -> None:
    ids = [1, 2, 3, 4]

    def order(key: str) -> list[int]:
        values = store.sort_values(ids, key)
        return sorted(values, key=values.__getitem__)

    assert order("year") == [1, 3, 2]
    assert order("colour") == [1, 2, 3]
    assert order("taken") == [3, 2, 4]
    assert order("size.width") == [1, 4]
    assert order("a.b") == [4]
    assert order("added") == ids
    assert order("modified") == [4, 3, 2, 1]
    assert order("uri") == ids
    assert order("caption") == []
    with pytest.raises(QueryError, match=r"cannot sort by 'yaer': .*did you mean 'year'"):
        store.sort_values(ids, "yaer")


def test_a_sort_is_a_key_with_or_without_a_sign() -> None:
    assert [parse_sort(text) for text in ("year", " -year", "- a b")] == [
        ("year", False),
        ("year", True),
        ("a b", True),
    ]
    for empty in ("", "-", "  "):
        with pytest.raises(QueryError, match="cannot sort by"):
            parse_sort(empty)
