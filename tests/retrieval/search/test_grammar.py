from __future__ import annotations

from pathlib import Path

import pytest

from clipsys.errors import QueryError
from clipsys.retrieval.search.grammar import compose, parse_query
from clipsys.retrieval.search.query import NEGATIVE_WEIGHT, Part


def text(words: str, weight: float = 1.0) -> Part:
    return Part(text=words, weight=weight)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("a dog on the beach", [text("a dog on the beach")]),
        ("  a dog  ", [text("a dog")]),
        ("dog + beach", [text("dog"), text("beach")]),
        ("dog - snow", [text("dog"), text("snow", NEGATIVE_WEIGHT)]),
        ("2*dog + .5 * sea", [text("dog", 2), text("sea", 0.5)]),
        ("dog - 0.25*snow", [text("dog"), text("snow", -0.25)]),
        ("+ dog", [text("dog")]),
        ("- snow + dog", [text("snow", NEGATIVE_WEIGHT), text("dog")]),
        ("item:12", [Part(item=12)]),
        ("0.5*item:12 - people", [Part(item=12, weight=0.5), text("people", NEGATIVE_WEIGHT)]),
        ("dog - item:3", [text("dog"), Part(item=3, weight=NEGATIVE_WEIGHT)]),
        ("image:a b.jpg + dog", [Part(image=Path("a b.jpg")), text("dog")]),
        ('2*image:"a + b.jpg"', [Part(image=Path("a + b.jpg"), weight=2)]),
        ('"black - and - white" + dog', [text("black - and - white"), text("dog")]),
        ('2*"3*3 tiles"', [text("3*3 tiles", 2)]),
        # What only looks like grammar is text.
        ("black-and-white", [text("black-and-white")]),
        ("a+b c -d", [text("a+b c -d")]),
        ('a 5" pipe', [text('a 5" pipe')]),
        ("the item: a chair", [text("the item: a chair")]),
        ("item:chair", [text("item:chair")]),
        ("image: of a dog", [text("image: of a dog")]),
        ("4 * dogs", [text("dogs", 4)]),
        ("route 66 * sign", [text("route 66 * sign")]),
    ],
)  # fmt: skip
def test_line_is_read(line: str, parts: list[Part]) -> None:
    assert list(parse_query(line).parts) == parts


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "text is empty"),
        ('""', "text is empty"),
        ("- snow", "something to look for"),
        ("dog +", "ends with a sign"),
        ("dog + ", "ends with a sign"),
        ("dog + - snow", "nothing before it"),
        ("0*dog", "expected a number not 0"),
    ],
)
def test_what_makes_no_sense_is_an_error(line: str, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        parse_query(line)


def test_files_are_refused_where_the_user_is_not_of_this_machine() -> None:
    for line in ("image:/etc/passwd", 'dog - 2*image:"/etc/passwd"'):
        with pytest.raises(QueryError, match="files cannot be named here"):
            parse_query(line, allow_files=False)


def test_image_negative_and_words_stand_beside_the_line() -> None:
    query = compose("dog + beach", image="a.jpg", negative="0.3*snow", words="frisbee")
    assert query.parts == (text("dog"), text("beach"), Part(image="a.jpg"), text("snow", -0.3))
    assert query.words == "frisbee"
    assert compose(None, words="frisbee").parts == ()
    with pytest.raises(QueryError, match="something to look for"):
        compose(None, negative="snow", words="frisbee")


@pytest.mark.parametrize("text", ["item:", "2*item:-1", "image:", "dog - image: "])
def test_an_unfinished_item_or_image_is_not_taken_for_text(text: str) -> None:
    with pytest.raises(QueryError, match="names no item and no image"):
        parse_query(text)


@pytest.mark.parametrize("text", ["item: a dog", '"item:"', "item:x"])
def test_text_that_looks_like_an_item_is_text(text: str) -> None:
    (part,) = parse_query(text).parts
    assert part.text == text.strip('"')
