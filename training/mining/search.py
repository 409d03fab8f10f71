"""From vectors of all samples to hard negatives of each: FAISS, and what is left out.

Shapes: N samples, M of them that can be used, D width, H candidates listed of each, K texts looked
at, Q images of a block.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from clipsys.training.mining.config import MiningConfig

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

#: Images that are searched for at once.
_BLOCK = 1024
#: From so many texts on the search is approximate: exact search takes time with their square.
_EXACT_UP_TO = 200_000
_PROBES = 32


class Mined(NamedTuple):
    """What a search found.

    Attributes:
        candidates_NH: numbers of samples whose texts are hard negatives, hardest first; -1 where
            there are fewer.
        figures: shares by name, of the samples that can be used: ``without`` has no candidate,
            ``own_first`` has its own text nearest; of the texts looked at: ``too_similar`` was
            left out by a bound.
    """

    candidates_NH: Ints
    figures: dict[str, float]


def hard_negatives(
    image_ND: Floats,
    text_ND: Floats,
    groups_N: Ints,
    usable_N: npt.NDArray[np.bool_],
    settings: MiningConfig,
) -> Mined:
    """The nearest texts of each image that are no positives and not too similar.

    Left out are texts of the image's group, the ``skip`` nearest of the others, and texts that are
    more similar than a bound: absolute, or relative to the image's similarity s with its own text,
    s - (1 - max_relative_similarity) |s|, which is below s for negative s too.

    Args:
        image_ND: unit norm.
        text_ND: unit norm, of the same samples.
        groups_N: equal ids are positives of each other.
        usable_N: whether a sample could be encoded.
        settings: the recipe's.
    """
    numbers_M = np.flatnonzero(usable_N)
    candidates_NH = np.full((len(usable_N), settings.candidates), -1, np.int64)
    if not len(numbers_M):
        return Mined(candidates_NH, {"without": 1.0})
    image_MD, text_MD = (np.ascontiguousarray(one[numbers_M]) for one in (image_ND, text_ND))
    groups_M = groups_N[numbers_M]
    index = _index(text_MD)
    # The own text is among the nearest, as a rule.
    depth = min(settings.depth + 1, len(numbers_M))
    num_without = num_first = num_bounded = num_seen = 0
    for start in range(0, len(numbers_M), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(numbers_M)))
        similarity_QK, found_QK = index.search(image_MD[block], depth)
        own_Q = np.einsum("qd,qd->q", image_MD[block], text_MD[block])
        others_QK = (found_QK >= 0) & (groups_M[found_QK] != groups_M[block, None])
        others_QK &= found_QK != np.arange(block.start, block.stop)[:, None]
        near_QK = similarity_QK > _bound(own_Q, settings)[:, None]
        deep_QK = others_QK.cumsum(axis=1) > settings.skip
        kept_QK = others_QK & deep_QK & ~near_QK
        candidates_NH[numbers_M[block]] = _first(
            np.where(kept_QK, numbers_M[found_QK], -1), settings.candidates
        )
        num_without += int((~kept_QK.any(axis=1)).sum())
        num_first += int((found_QK[:, 0] == np.arange(block.start, block.stop)).sum())
        num_bounded += int((others_QK & deep_QK & near_QK).sum())
        num_seen += int(others_QK.sum())
    return Mined(
        candidates_NH,
        {
            "without": num_without / len(numbers_M),
            "own_first": num_first / len(numbers_M),
            "too_similar": num_bounded / max(1, num_seen),
        },
    )


def _bound(own_Q: Floats, settings: MiningConfig) -> Floats:
    """The largest similarity that a hard negative of each image may have."""
    absolute = np.inf if settings.max_similarity is None else settings.max_similarity
    bound_Q = np.full(len(own_Q), absolute, np.float32)
    if settings.max_relative_similarity is not None:
        relative_Q = own_Q - (1 - settings.max_relative_similarity) * np.abs(own_Q)
        bound_Q = np.minimum(bound_Q, relative_Q.astype(np.float32))
    return bound_Q


def _first(numbers_QK: Ints, count: int) -> Ints:
    """The first ``count`` numbers of each row that are not -1; -1 where there are fewer."""
    order_QK = np.argsort(numbers_QK < 0, axis=1, kind="stable")[:, :count]
    first_QH = np.take_along_axis(numbers_QK, order_QK, axis=1)
    missing = count - first_QH.shape[1]
    return np.pad(first_QH, ((0, 0), (0, missing)), constant_values=-1) if missing else first_QH


def _index(text_MD: Floats) -> Any:
    """Exact for few texts; else lists of which a part is looked at."""
    import faiss  # its import costs 0.2 s

    width = text_MD.shape[1]
    index: Any = faiss.IndexFlatIP(width)
    if len(text_MD) > _EXACT_UP_TO:
        num_lists = 4 * math.isqrt(len(text_MD))
        index = faiss.IndexIVFFlat(index, width, num_lists, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = _PROBES
        index.train(text_MD[:: max(1, len(text_MD) // (64 * num_lists))])
    index.add(text_MD)
    return index
