"""Sentences of a text, and a run of them drawn at random."""

from __future__ import annotations

import re

from clipsys.errors import SampleError

#: A full stop, a question or an exclamation mark with what closes the sentence. Abbreviations end a
#: sentence too: no list of them is complete for any language.
_END = re.compile(r"([.!?][\"'”’)\]]*)\s+|([。！？][”’」』]*)\s*")


def split_sentences(text: str) -> list[str]:
    """The sentences of a text in their order; what holds no letter or digit is none."""
    parts = (part.strip() for part in _END.sub(r"\1\2\n", text).splitlines())
    return [part for part in parts if any(map(str.isalnum, part))]


def draw_sentences(text: str, count: int, draw: int, place: str) -> tuple[str, ...]:
    """Two neighbouring sentences of a text, and for each further one another sentence of it.

    Args:
        text: the text.
        count: how many, 2 or more.
        draw: a random number, which decides.
        place: what messages call the sample.

    Raises:
        SampleError: the text has fewer sentences.
    """
    sentences = split_sentences(text)
    if len(sentences) < count:
        raise SampleError(
            f"{place}: the text has {len(sentences)} of the {count} sentences that the objective "
            "needs",
            reason="too few sentences",
        )
    draw, first = divmod(draw, len(sentences) - 1)
    chosen = sentences[first : first + 2]
    others = sentences[:first] + sentences[first + 2 :]
    for _ in range(count - 2):
        draw, index = divmod(draw, len(others))
        chosen.append(others.pop(index))
    return tuple(chosen)
