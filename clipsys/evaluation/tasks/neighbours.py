"""Nearest neighbours of images: whether what is near shows the same thing.

Legend of shapes: N images, D width, K neighbours, S images whose neighbours are looked for, R of
them at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clipsys.evaluation import resampling
from clipsys.evaluation.embedded import EmbeddedImages
from clipsys.evaluation.metrics.nearest import QUERIES, nearest
from clipsys.evaluation.results import Doubles, Figure, Integers, Outcomes, Result

NUM_NEIGHBOURS = 8
NUM_QUERIES = 12
#: Images whose neighbours are looked for: the figures need no more, and a million would take days.
_MAX_QUERIES = 10_000


@dataclass(frozen=True)
class Neighbours:
    """The nearest other images of some images.

    Attributes:
        queries_S: positions of the images, ascending.
        nearest_SK: positions of their neighbours, nearest first; -1 where there is none.
        cosine_SK: similarities.
    """

    queries_S: Integers
    nearest_SK: Integers
    cosine_SK: Doubles

    def of(self, query: int) -> tuple[Integers, Doubles]:
        """The neighbours of one image, and their similarities."""
        row = int(np.searchsorted(self.queries_S, query))
        return self.nearest_SK[row], self.cosine_SK[row]


def nearest_neighbours(
    images: EmbeddedImages, k: int = NUM_NEIGHBOURS, *, max_queries: int = _MAX_QUERIES
) -> Neighbours:
    """The k nearest images of each; copies of the image itself are left out.

    Of equally near ones, those that stand first in the data are taken.

    Args:
        images: N.
        k: fewer where there are fewer other images.
        max_queries: images whose neighbours are looked for, drawn by a fixed seed.
    """
    _, copies = np.unique(np.array(images.contents), return_inverse=True)
    vectors = images.vectors_ND
    queries = np.arange(len(images))
    if len(images) > max_queries:
        drawn = np.random.default_rng(0).choice(len(images), max_queries, replace=False)
        queries = np.sort(drawn)
    k = min(k, max(len(images) - 1, 1))
    positions = np.full((len(queries), k), -1)
    cosines = np.full((len(queries), k), -np.inf)
    for start in range(0, len(queries), QUERIES):
        rows = slice(start, start + QUERIES)
        own = queries[rows]
        values, found = nearest(vectors[own], vectors, k, copies[own], copies)
        positions[rows] = np.where(np.isfinite(values), found, -1)
        cosines[rows] = values
    return Neighbours(queries, positions, cosines)


def neighbours_result(
    images: EmbeddedImages, found: Neighbours, *, model: str, data: str
) -> Result:
    """How similar the nearest images are, and how often they have the same label.

    Args:
        images: N.
        found: their neighbours.
        model: name of the model.
        data: name of the data set.
    """
    present = found.nearest_SK >= 0
    has = present.any(axis=1)
    asked = found.queries_S[has]
    contents = np.array(images.contents)
    _, units = np.unique(contents[asked], return_inverse=True)
    values: dict[str, Doubles] = {"cosine@1": found.cosine_SK[has, 0]}
    chances: dict[str, float] = {}
    k = found.nearest_SK.shape[1]
    labels = [record.label for record in images.records]
    if all(label is not None for label in labels):
        _, label_N = np.unique(np.array(labels, dtype=str), return_inverse=True)
        same_SK = (label_N[found.nearest_SK] == label_N[found.queries_S][:, None]) & present
        shares = same_SK.sum(axis=1) / np.maximum(present.sum(axis=1), 1)
        values |= {"same_label@1": same_SK[has, 0].astype(np.float64)}
        values |= {f"same_label@{k}": shares[has]} if k > 1 else {}
        chances = dict.fromkeys((f"same_label@{one}" for one in (1, k)), _chance(label_N, contents))
    intervals = resampling.mean_intervals(values, units)
    return Result(
        task="neighbours",
        model=model,
        data=data,
        protocol=f"the {k} nearest other images of each; copies of the image itself are left out",
        figures={
            name: Figure(float(one.mean()), len(one), intervals[name], chances.get(name))
            for name, one in values.items()
            if len(one)
        },
        counts={"images": len(images), "queries": len(found.queries_S), "neighbours": k},
        outcomes={
            "": Outcomes([images.records[place].uri for place in asked.tolist()], units, values)
        },
    )


def _chance(label_N: Integers, contents: npt.NDArray[np.str_]) -> float:
    """The share of pairs of different pictures that have the same label."""
    _, copy_N = np.unique(contents, return_inverse=True)
    _, both_N = np.unique(np.stack([label_N, copy_N]), axis=1, return_inverse=True)

    def pairs(numbers: npt.NDArray[np.int64]) -> int:
        counts = np.bincount(numbers)
        return int((counts * (counts - 1)).sum())

    total = len(label_N)
    different = total * (total - 1) - pairs(copy_N)
    return (pairs(label_N) - pairs(np.ravel(both_N))) / different if different else 0.0


def spread_queries(
    images: EmbeddedImages,
    count: int = NUM_QUERIES,
    *,
    among: Integers | None = None,
    seed: int = 0,
) -> list[int]:
    """Images to show: drawn by a seed, every label once before any twice.

    Args:
        images: N.
        count: how many.
        among: positions to draw from; None: all.
        seed: of the draw.
    """
    positions = np.arange(len(images)) if among is None else among
    order = np.random.default_rng(seed).permutation(positions).tolist()
    taken: dict[str | None, int] = {}
    ranked = []
    for place in order:
        label = images.records[place].label
        ranked.append((taken.get(label, 0), place))
        taken[label] = taken.get(label, 0) + 1
    chosen = [place for _, place in sorted(ranked, key=lambda one: one[0])[:count]]
    return sorted(chosen, key=lambda place: (images.records[place].label or "", place))
