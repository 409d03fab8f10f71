"""Which hits of a query come back, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clipsys.errors import QueryError
from clipsys.retrieval.search.calibration import MIN_ITEMS
from clipsys.retrieval.search.query import Hit
from clipsys.retrieval.storage.conditions import Condition
from clipsys.retrieval.storage.sorting import parse_sort

#: From this cosine on two images are near-duplicates; callers may give another. It depends on
#: the model: ViT-B/32 gives re-encoded, resized or lightly cropped photographs 0.95 and more, other
#: views of a scene less.
NEAR_DUPLICATE = 0.95
#: Unknown words of a query that a message names.
_NAMED_WORDS = 5


@dataclass(frozen=True)
class Options:
    """Which hits of a query come back.

    Attributes:
        k: how many; fewer only if fewer items match.
        offset: how many of the best are left out, for the next page.
        conditions: on metadata, applied before ranking.
        min_score: cosine below which nothing is a hit.
        relevant_only: leaves out what unrelated items would match by chance, and with it every hit
            where nothing is relevant.
        diverse: cosine from which on two items are one hit; None: every item is its own.
        sort: key by which the hits are put in order, ``-key`` for descending; None: the best first.
            Where `relevant_only` or `min_score` cuts, or words alone are asked for, or nothing,
            all items that are left are sorted; otherwise the best ``k``.

    Raises:
        QueryError: a number is out of its range.
    """

    k: int = 10
    offset: int = 0
    conditions: tuple[Condition, ...] = ()
    min_score: float | None = None
    relevant_only: bool = False
    diverse: float | None = None
    sort: str | None = None

    def __post_init__(self) -> None:
        _check_whole("k", self.k, 1)
        _check_whole("offset", self.offset, 0)
        for name, value in (("min_score", self.min_score), ("diverse", self.diverse)):
            if value is not None and not -1 <= value <= 1:
                raise QueryError(f"{name} is {value}; expected a cosine from -1 to 1")
        if self.sort is not None:
            parse_sort(self.sort)

    @property
    def needs_score(self) -> bool:
        """Whether hits without a cosine would be meaningless."""
        return self.min_score is not None or self.relevant_only

    @property
    def sorts_all(self) -> bool:
        """Whether all that a cut leaves is sorted, and not the best ``k``."""
        return self.sort is not None and self.needs_score


def duplicate_cosine(diverse: bool | float) -> float | None:
    """The cosine of `Options.diverse` for a switch or a number."""
    if isinstance(diverse, bool):
        return NEAR_DUPLICATE if diverse else None
    return diverse


def doubt_of(
    hits: Sequence[Hit], options: Options, *, num_items: int, unknown: Sequence[str] = ()
) -> str | None:
    """What `relevant_only` cannot tell about an answer; None where it can, or was not asked.

    Args:
        hits: the answer.
        options: what was asked for.
        num_items: items of the collection.
        unknown: words of the query that no caption has which its model was trained with.
    """
    if not options.relevant_only:
        return None
    if not hits:
        doubt = (
            "no hit has a relevance that chance does not explain: either nothing matches, or the "
            "scores of this model do not tell; without this cut the nearest images are shown"
        )
        if unknown:
            words = ", ".join(repr(word) for word in unknown[:_NAMED_WORDS])
            doubt += f" (no caption that the model was trained with, of those known, has {words})"
        return doubt
    if hits[0].score is not None and hits[0].relevance is None:
        if num_items < MIN_ITEMS:
            return (
                f"with fewer than {MIN_ITEMS} items relevance is not known, and nothing was left "
                "out for it"
            )
        return (
            "the scores of this model do not tell captions of its training from other texts in "
            "this collection, and nothing was left out"
        )
    return None


def _check_whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise QueryError(f"{name} is {value!r}; expected a whole number from {least} on")
