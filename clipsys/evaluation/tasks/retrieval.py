"""Retrieval: texts find their images, and images their texts.

Every figure comes with the number of candidates and with chance level, without which a recall says
little.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from clipsys.errors import DataError
from clipsys.evaluation.metrics import ranks

Floats = npt.NDArray[np.float32]
Captions = Literal["first", "all"]


@dataclass(frozen=True)
class RetrievalTargets:
    """Which texts belong to which images.

    Attributes:
        texts: M queries.
        text_groups: (M,) group of each text.
        image_groups: (N,) group of each image; equal groups are hits of each other.
    """

    texts: list[str]
    text_groups: npt.NDArray[np.int64]
    image_groups: npt.NDArray[np.int64]


def retrieval_targets(
    items: Iterable[tuple[Sequence[str], dict[str, Any]]],
    *,
    captions: Captions = "all",
    match: str | None = None,
) -> RetrievalTargets:
    """Builds queries and groups from (captions, metadata) of each image, in the images' order.

    Args:
        items: items of the images, in order.
        captions: whether the first caption or every one is a query.
        match: metadata key; images with the same value are hits of each other's captions.

    Raises:
        DataError: an item lacks the key, or no item has a caption.
    """
    texts: list[str] = []
    text_groups: list[int] = []
    image_groups: list[int] = []
    known: dict[Any, int] = {}
    for number, (item_captions, metadata) in enumerate(items):
        group = number
        if match is not None:
            if match not in metadata:
                raise DataError(
                    f"item {number} has no metadata key {match!r}; "
                    f"it has {', '.join(sorted(metadata)) or 'none'}"
                )
            group = known.setdefault(metadata[match], len(known))
        image_groups.append(group)
        chosen = item_captions[:1] if captions == "first" else item_captions
        texts.extend(chosen)
        text_groups.extend([group] * len(chosen))
    if not texts:
        raise DataError("no item has a caption, so there is nothing to search with")
    return RetrievalTargets(texts, np.array(text_groups), np.array(image_groups))


def retrieval_figures(
    image_ND: Floats, text_MD: Floats, targets: RetrievalTargets
) -> dict[str, float]:
    """Recall in both directions at 1, 5 and 10, with candidates and chance."""
    figures: dict[str, float] = {}
    directions = {
        "text_to_image": (text_MD, image_ND, targets.text_groups, targets.image_groups),
        "image_to_text": (image_ND, text_MD, targets.image_groups, targets.text_groups),
    }
    for name, (queries, candidates, query_groups, candidate_groups) in directions.items():
        first_M = ranks.first_hit_ranks(queries, candidates, query_groups, candidate_groups)
        chance = ranks.chance_recall(query_groups, candidate_groups)
        figures |= {f"{name}/{key}": value for key, value in ranks.recall_at(first_M).items()}
        figures[f"{name}/median_rank"] = float(np.median(first_M)) + 1
        figures |= {f"{name}/chance_{key}": value for key, value in chance.items()}
        figures[f"{name}/candidates"] = len(candidates)
        figures[f"{name}/queries"] = len(queries)
    return figures
