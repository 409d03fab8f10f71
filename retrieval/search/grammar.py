"""A query in one line, the same in Python, on the command line and in the app.

a dog on the beach                    one text
a dog + beach - snow                  added and subtracted: signs stand between spaces
2*a dog + 0.5*image:~/beach.jpg       weights; an image by its path
item:1234 - people                    more like an item of the collection, without people
"black - and - white" + dog           in quotation marks, signs are text
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from clipsys.errors import QueryError
from clipsys.retrieval.search.query import NEGATIVE_WEIGHT, ImageSource, Part, Query

_SIGN = re.compile(r'"[^"]*"|(?:(?<=\s)|^)([+-])(?=\s|$)')
_WEIGHT = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*\*\s*(?=\S)")
_ITEM = re.compile(r"item:(\d+)")
_IMAGE = re.compile(r'image:(?:"([^"]+)"|(\S.*))', re.DOTALL)
#: ``item:chair`` is text; what ends behind the colon is a slip, as a negative number is.
_UNFINISHED = re.compile(r'item:(?:-\d+)?|image:(?:"\s*")?')
_QUOTED = re.compile(r'"([^"]*)"')


def parse_query(text: str, *, words: str | None = None, allow_files: bool = True) -> Query:
    """Reads a query written in one line.

    Args:
        text: see above.
        words: what the captions have to say; see `clipsys.retrieval.storage.words`.
        allow_files: whether ``image:PATH`` may name a file; the app, whose users are not those of
            this machine, says no.

    Raises:
        QueryError: a term is missing, or a file is named and may not be.
    """
    terms = [parse_part(term, sign, allow_files=allow_files) for sign, term in _terms(text)]
    return Query(tuple(terms), words)


def compose(
    text: str | None,
    *,
    image: ImageSource | None = None,
    negative: str | None = None,
    words: str | None = None,
) -> Query:
    """A query written in one line, with an image, something to avoid and words beside it.

    Raises:
        QueryError: see `parse_query`; or there is nothing to look for.
    """
    parts = list(parse_query(text).parts) if text is not None else []
    if image is not None:
        parts.append(Part(image=image))
    if negative is not None:
        parts.append(parse_part(negative, -1))
    return Query(tuple(parts), words)


def parse_part(text: str, sign: int = 1, *, allow_files: bool = True) -> Part:
    """Reads one term: ``[WEIGHT*]``, then a text, ``image:PATH`` or ``item:ID``.

    Raises:
        QueryError: it is blank, names a file and may not, or ends behind ``item:`` or ``image:``.
    """
    text = text.strip()
    weight = 1.0 if sign > 0 else NEGATIVE_WEIGHT
    if match := _WEIGHT.match(text):
        weight, text = sign * float(match[1]), text[match.end() :]
    if match := _ITEM.fullmatch(text):
        return Part(item=int(match[1]), weight=weight)
    if match := _IMAGE.fullmatch(text):
        if not allow_files:
            raise QueryError("files cannot be named here; upload the image instead")
        return Part(image=Path(match[1] or match[2]).expanduser(), weight=weight)
    if _UNFINISHED.fullmatch(text):
        raise QueryError(
            f"{text!r} names no item and no image; write item:12 or image:PATH, or put it in "
            "quotation marks where it is text"
        )
    if match := _QUOTED.fullmatch(text):
        text = match[1]
    return Part(text=text, weight=weight)


def _terms(text: str) -> Iterator[tuple[int, str]]:
    """Signs and what follows them. A sign at the very beginning belongs to the first term."""
    sign, start = 1, 0
    for match in _SIGN.finditer(text):
        if match[1] is None:
            continue  # in quotation marks
        if text[start : match.start()].strip():
            yield sign, text[start : match.start()]
        elif start:
            raise QueryError(
                f"the query {text!r} has a {match[1]} with nothing before it; put signs that are "
                "text in quotation marks"
            )
        sign, start = (1 if match[1] == "+" else -1), match.end()
    if start and not text[start:].strip():
        raise QueryError(
            f"the query {text!r} ends with a sign; put signs that are text in quotation marks"
        )
    yield sign, text[start:]
