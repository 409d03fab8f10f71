"""Texts that are longer than a model reads: what is cut off is said, not silently ignored."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

#: A text of so few words fits into any model.
_SHORT = 8

_logger = logging.getLogger(__name__)


def warn_of_cut_texts(texts: Sequence[str], tokens_of: Callable[[str], Sequence[int]]) -> None:
    """Warns of each text whose last words have no effect on its tokens."""
    for text in texts:
        num_read = words_read(text, tokens_of)
        num_words = len(text.split())
        if num_read < num_words:
            _logger.warning(
                "the model reads no more than the first %s of the %s words of this query: %s …",
                *(f"{num_read:,}", f"{num_words:,}", " ".join(text.split()[:_SHORT])),
            )


def words_read(text: str, tokens_of: Callable[[str], Sequence[int]]) -> int:
    """How many words of a text make a difference, the one that is cut in the middle included."""
    words = text.split()
    if len(words) <= _SHORT:
        return len(words)
    whole = list(tokens_of(text))

    def is_whole(count: int) -> bool:
        return list(tokens_of(" ".join(words[:count]))) == whole

    return bisect_left(range(len(words)), True, key=is_whole)


def tokens_of_encoder(encoder: Any) -> Callable[[str], Sequence[int]] | None:
    """A loaded encoder's tokens of one text; None where it has no tokenizer."""
    tokenizer = getattr(encoder, "tokenizer", None)
    if tokenizer is None:
        return None

    def tokens(text: str) -> Sequence[int]:
        ids: list[int] = tokenizer([text])[0].tolist()
        return ids

    return tokens
