from __future__ import annotations

import pytest

from clipsys.errors import QueryError
from clipsys.retrieval.storage.conditions import Condition, parse_condition, parse_conditions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("colour=Blue", Condition("colour", "=", "Blue")),
        (" colour == Blue ", Condition("colour", "=", "Blue")),
        ('usage="Sports Shoes"', Condition("usage", "=", "Sports Shoes")),
        ("usage=Sports Shoes", Condition("usage", "=", "Sports Shoes")),
        ('usage=" padded "', Condition("usage", "=", " padded ")),
        ('title="say ""hi"""', Condition("title", "=", 'say "hi"')),
        ('title=5" screen', Condition("title", "=", '5" screen')),
        ("brand in Annas, Ltd,Nike", Condition("brand", "in", ["Annas", "Ltd", "Nike"])),
        ('brand in "Annas, Ltd",Nike', Condition("brand", "in", ["Annas, Ltd", "Nike"])),
        ('brand IN "a" , "b, c"', Condition("brand", "in", ["a", "b, c"])),
        ('caption contains "on the beach"', Condition("caption", "contains", "on the beach")),
        ("title=made in China", Condition("title", "=", "made in China")),
        ("title contains a=b", Condition("title", "contains", "a=b")),
        ('"a=b"=1', Condition("a=b", "=", "1")),
        ('"sign in" in a', Condition("sign in", "in", ["a"])),
        ("article type!=Shirts", Condition("article type", "!=", "Shirts")),
        ("season=null", Condition("season", "=", None)),
        ("season!=NULL", Condition("season", "!=", None)),
        ('season="null"', Condition("season", "=", "null")),
        ("season is missing", Condition("season", "=", None)),
        ("season  IS  Present ", Condition("season", "!=", None)),
        ("title=what is missing", Condition("title", "=", "what is missing")),
        ("size.width>=100", Condition("size.width", ">=", "100")),
        ("season=", Condition("season", "=", "")),
    ],
)
def test_conditions_are_read(text: str, expected: Condition) -> None:
    assert parse_condition(text) == expected


@pytest.mark.parametrize(
    "text", ["", "colour", "=red", 'colour="red', 'colour="red" wine', 'k in "a" b,c', 'k in "a']
)
def test_what_is_no_condition_is_an_error_that_shows_it(text: str) -> None:
    with pytest.raises(QueryError) as caught:
        parse_condition(text)
    assert str(caught.value).startswith(f"filter {text!r}")


def test_semicolons_separate_conditions_except_in_quotation_marks() -> None:
    assert parse_conditions('a=1; b="x; y" ;; c is missing;') == [
        Condition("a", "=", "1"),
        Condition("b", "=", "x; y"),
        Condition("c", "=", None),
    ]
    assert parse_conditions(" ") == []


@pytest.mark.parametrize(
    ("condition", "text"),
    [
        (Condition("a", "=", None), "a is missing"),
        (Condition("a", "!=", None), "a is present"),
        (Condition("a", "in", ["x", "y"]), "a in x,y"),
        (Condition("a", "contains", "x"), "a contains x"),
        (Condition("a", ">=", 2), "a>=2"),
    ],
)
def test_conditions_are_shown_as_they_are_written(condition: Condition, text: str) -> None:
    assert str(condition) == text
