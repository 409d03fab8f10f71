"""Sentences of a text, and those that are drawn."""

from __future__ import annotations

from collections import Counter

import pytest

from clipsys.errors import SampleError
from clipsys.training.data.sentences import draw_sentences, split_sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two? Three!", ["One.", "Two?", "Three!"]),
        ('He said "No." She left.', ['He said "No."', "She left."]),
        ("A line\nanother line\n\nand a third", ["A line", "another line", "and a third"]),
        ("3.14 is a number. v1.2 too", ["3.14 is a number.", "v1.2 too"]),
        ("一。二！三", ["一。", "二！", "三"]),
        ("... !!! ?", []),
        ("no end", ["no end"]),
        ("", []),
    ],
)
def test_sentences_end_at_marks_and_lines(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


def test_two_are_neighbours_and_every_pair_is_as_likely() -> None:
    pairs = Counter(draw_sentences("A. B. C. D.", 2, draw, "x") for draw in range(300))
    assert pairs == {("A.", "B."): 100, ("B.", "C."): 100, ("C.", "D."): 100}


def test_a_third_is_none_of_the_two() -> None:
    drawn = Counter(draw_sentences("A. B. C. D.", 3, draw, "x") for draw in range(600))
    assert len(drawn) == 6 and set(drawn.values()) == {100}
    assert all(len(set(three)) == 3 for three in drawn)


@pytest.mark.parametrize(("text", "count"), [("One.", 2), ("One. Two.", 3), ("", 2)])
def test_too_few_are_counted(text: str, count: int) -> None:
    with pytest.raises(SampleError, match=rf"s#k: the text has \d of the {count} sent") as caught:
        draw_sentences(text, count, 5, "s#k")
    assert caught.value.reason == "too few sentences"
