from __future__ import annotations

import json
import math
import random
import re
import sqlite3
from contextlib import closing
from operator import ge, gt, le, lt
from pathlib import Path
from typing import Any, get_args

import pytest

from clipsys.errors import QueryError
from clipsys.retrieval.storage.filters import (
    Condition,
    Operator,
    Where,
    parse_condition,
    parse_where,
)
from clipsys.retrieval.storage.items import Batch, ItemUpdate, NewItem
from clipsys.retrieval.storage.segments import SegmentFile
from clipsys.retrieval.storage.store import Store

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


def test_list_contains_a_number_and_a_truth_as_it_contains_a_text(tmp_path: Path) -> None:
    made = Store.create(tmp_path / "items.sqlite")
    values: list[Any] = [[7, "x"], ["7"], [7.0], [70], ["77"], [True], [None], [], [[7]]]
    new = [NewItem(f"/{n}", str(n), 1, 1, (), {"k": value}) for n, value in enumerate(values)]
    made.commit(Batch(new=new), SegmentFile("s.npy", len(new), "0"))
    assert matching(made, "k contains 7") == [0, 1, 2]
    assert matching(made, "k contains true") == [5]
    assert matching(made, {"k": None}) == []


def test_file_name_that_is_not_utf8_is_found_and_hinders_nothing(tmp_path: Path) -> None:
    made = Store.create(tmp_path / "items.sqlite")
    names = [b"/caf\xe9\x80.jpg".decode("utf-8", "surrogateescape"), "/CAFÉ.jpg"]
    new = [NewItem(name, str(n), 1, 1, (), {}) for n, name in enumerate(names)]
    made.commit(Batch(new=new), SegmentFile("s.npy", len(new), "0"))
    assert matching(made, {"uri": names[0]}) == [0]
    assert matching(made, "uri contains caf") == [0, 1]
    assert matching(made, "uri contains café") == [1]


def test_thousands_of_values_fit_into_one_filter(store: Store) -> None:
    assert matching(store, {"year": [2019, *range(10_000, 15_000)]}) == [0]


# ---- the index against the items -----------------------------------------------------------------

_KEYS = ["a", "b c", "", "é.ü", 'the "key"', "it's", "x.y[0]"]
_PLAIN: list[Any] = [
    *(0, 1, 7, -3, 1.0, 7.5, -0.5, 2**62, 2**63, -(2**64), 10**30, 1e300, 123456789012345678),
    *("", "1", "1.0", "7", "007", " 7", "7e0", "-3", "true", "TRUE", "False", "null", "[]", "{}"),
    *("Sea", "SEA", "sea side", "Straße", "STRASSE", "été", "\u212a", "k", 'a "b"', "a'b", "%_"),
    *("2021-05-01", "2021", "nan", "Infinity", "1" * 300, "long " * 60, "LONG " * 60, "sea" * 100),
    *(True, False, None, float("nan"), float("inf")),
]


def _random_value(generator: random.Random) -> Any:
    kind = generator.random()
    if kind < 0.75:
        return generator.choice(_PLAIN)
    if kind < 0.95:
        return generator.choices(_PLAIN, k=generator.choice([0, 1, 2, 3, 40]))
    return {"x": generator.choice(_PLAIN), "y": [1, "Sea"]}


def _random_metadata(generator: random.Random) -> dict[str, Any]:
    return {
        key: _random_value(generator) for key in generator.sample(_KEYS, generator.randrange(5))
    }


def _random_condition(generator: random.Random) -> Condition:
    field = generator.choice([*_KEYS, *_KEYS, "nowhere", "uri", "caption"])
    operator = generator.choice(get_args(Operator))
    if operator == "in":
        return Condition(field, "in", generator.choices(_PLAIN, k=generator.randrange(4)))
    return Condition(field, operator, generator.choice(_PLAIN))


def naive_number(value: object) -> float | int | None:
    """Of a value as it stands in JSON, or of a text that is a number there."""
    if isinstance(value, str):
        try:
            value = json.loads(value, parse_constant=lambda _: None)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value if isinstance(value, float) or abs(value) < 2**63 else float(value)


def naive_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def naive_equal(stored: object, value: object) -> bool:
    if value is None:
        return stored is None
    if isinstance(value, bool) or (isinstance(value, str) and value.lower() in ("true", "false")):
        word = str(value).lower()
        return (str(stored) if isinstance(stored, bool | str) else "").casefold() == word
    number = naive_number(value)
    same = number is not None and naive_number(stored) == number
    return same or (isinstance(stored, str) and stored == naive_text(value))


def naive_contains(stored: object, value: object) -> bool:
    needle = naive_text(value).casefold()
    if isinstance(stored, list):
        number = naive_number(value)
        return any(
            naive_part(part).casefold() == needle
            or (number is not None and naive_number(part) == number)
            for part in stored
            if part is not None
        )
    if isinstance(stored, bool):
        return needle in str(int(stored))
    return stored is not None and needle in naive_part(stored).casefold()


def naive_part(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**63:
        value = float(value)
    if isinstance(value, float):  # as SQLite writes it
        with closing(sqlite3.connect(":memory:")) as connection:
            return str(connection.execute("SELECT CAST(? AS TEXT)", [value]).fetchone()[0])
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def naive_passes(metadata: dict[str, Any], condition: Condition) -> bool:
    """What a condition means, without SQL."""
    operator, value = condition.operator, condition.value
    if operator == "!=":
        return not naive_passes(metadata, Condition(condition.field, "=", value))
    if condition.field not in metadata:
        return operator == "=" and value is None
    stored = metadata[condition.field]
    if operator == "in":
        return any(naive_equal(stored, one) for one in value)
    if operator == "=":
        return naive_equal(stored, value)
    if operator == "contains":
        return naive_contains(stored, value)
    compare = {"<": lt, "<=": le, ">": gt, ">=": ge}[operator]
    number = naive_number(value)
    if number is None:
        return isinstance(stored, str) and bool(compare(stored, naive_text(value)))
    known = naive_number(stored)
    return known is not None and bool(compare(known, number))


@pytest.mark.parametrize("seed", range(4))
def test_index_selects_what_reading_every_item_selects(tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    made = Store.create(tmp_path / "items.sqlite")
    documents = [_random_metadata(generator) for _ in range(150)]
    new = [
        NewItem(f"/p/{n}", str(n), 1, 1, generator.choice([(), ("Sea", "x"), ("7",)]), metadata)
        for n, metadata in enumerate(documents)
    ]
    ids = made.commit(Batch(new=new), SegmentFile("s.npy", len(new), "0"))
    gone = set(generator.sample(ids, 30))
    made.delete(sorted(gone))
    changed = generator.sample(sorted(set(ids) - gone), 30)
    made.commit(
        Batch(updates=[ItemUpdate(i, 1, 1, (), _random_metadata(generator)) for i in changed]), None
    )
    live = {
        item.id: {**item.metadata, "uri": item.uri, "caption": item.caption}
        for item in made.live_items()
    }
    assert len(live) == 120
    num_some = 0
    for _ in range(600):
        conditions = [
            _random_condition(generator) for _ in range(generator.choice([1, 1, 1, 2, 3]))
        ]
        expected = [
            number
            for number, metadata in live.items()
            if all(naive_passes(metadata, condition) for condition in conditions)
        ]
        assert made.select_ids(conditions).tolist() == expected, conditions
        num_some += 0 < len(expected) < len(live)
    assert num_some > 200
    assert made.metadata_keys() == sorted(
        {key for document in live.values() for key in document} - {"uri", "caption"}
    )
    assert made.find_metadata_problems() == []


@pytest.mark.parametrize(
    ("text", "meant"), [("a<>1", "!="), ("a=>1", ">="), ("a=<1", "<="), ("a=!1", "!=")]
)
def test_an_operator_of_other_languages_is_refused_with_the_one_that_is_meant(
    text: str, meant: str
) -> None:
    with pytest.raises(QueryError, match=f"write {re.escape(meant)}"):
        parse_condition(text)
    assert parse_condition('a=">1"') == Condition("a", "=", ">1")


@pytest.mark.parametrize("text", ["a>", "a <= ", "a in ,"])
def test_an_order_or_a_list_without_a_value_is_refused(text: str) -> None:
    with pytest.raises(QueryError, match="there is no value"):
        parse_condition(text)
