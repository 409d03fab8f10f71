from __future__ import annotations

from clipsys.background.captions import words_of
from clipsys.background.foreign import foreign_texts


def test_foreign_texts_follow_from_their_seed() -> None:
    assert foreign_texts(60) == foreign_texts(60)
    assert foreign_texts(60)[:20] == foreign_texts(20)
    assert foreign_texts(60) != foreign_texts(60, seed=1)


def test_foreign_texts_are_many_different_texts_without_gaps() -> None:
    texts = foreign_texts(400)
    assert len(set(texts)) > 380
    assert all(text.strip() == text and text for text in texts)
    assert not any("{" in text or "}" in text for text in texts)


def test_foreign_texts_name_hardly_anything_that_can_be_seen() -> None:
    seen = {"dog", "man", "woman", "red", "beach", "shirt", "shoe", "star", "car", "water"}
    naming = [text for text in foreign_texts(1_000) if seen & set(words_of(text))]
    assert len(naming) <= 5, naming
