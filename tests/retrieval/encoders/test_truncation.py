from __future__ import annotations

import pytest

from clipsys.retrieval.encoders.truncation import warn_of_cut_texts, words_read


def tokens(text: str) -> list[int]:
    """Two tokens a word, 20 in all."""
    return [code for word in text.split() for code in (len(word), hash(word))][:20]


@pytest.mark.parametrize(
    ("count", "expected"), [(0, 0), (1, 1), (9, 9), (10, 10), (11, 10), (9_999, 10)]
)
def test_words_beyond_what_a_model_reads_make_no_difference(count: int, expected: int) -> None:
    text = " ".join(f"word{number}" for number in range(count))
    assert words_read(text, tokens) == expected


def test_cut_text_is_said(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_cut_texts(["a dog", " ".join(f"w{n}" for n in range(10_000))], tokens)
    (record,) = caplog.records
    assert "the first 10 of the 10,000 words" in record.getMessage()
