"""Nearest neighbours of images: whether what is near shows the same thing.

Legend of shapes: N images, D width, K neighbours, S queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clipsys.evaluation import resampling
from clipsys.evaluation.embedded import EmbeddedImages
from clipsys.evaluation.results import Doubles, Figure, Integers, Outcomes, Result

NUM_NEIGHBOURS = 8
NUM_QUERIES = 12
_BLOCK = 1024


@dataclass(frozen=True)
class Neighbours:
    """The nearest other images of each image.

    Attributes:
        nearest_NK: positions, nearest first; -1 where there is none.
        cosine_NK: similarities.
    """

    nearest_NK: Integers
    cosine_NK: Doubles


def nearest_neighbours(images: EmbeddedImages, k: int = NUM_NEIGHBOURS) -> Neighbours:
    """The k nearest images of each; copies of the same picture are left out.

    Args:
        images: N.
        k: fewer where there are fewer other images.
    """
    _, copies = np.unique(np.array(images.contents), return_inverse=True)
    vectors = images.vectors_ND
    k = min(k, max(len(images) - 1, 1))
    nearest = np.full((len(images), k), -1)
    cosines = np.full((len(images), k), -np.inf)
    for start in range(0, len(images), _BLOCK):
        rows = slice(start, start + _BLOCK)
        scores = vectors[rows] @ vectors.T
        scores[copies[rows, None] == copies[None, :]] = -np.inf
        found = np.argpartition(-scores, min(k, scores.shape[1]) - 1, axis=1)[:, :k]
        values = np.take_along_axis(scores, found, axis=1)
        order = np.lexsort((found, -values), axis=1)
        values = np.take_along_axis(values, order, axis=1)
        found = np.take_along_axis(found, order, axis=1)
        nearest[rows] = np.where(np.isfinite(values), found, -1)
        cosines[rows] = values
    return Neighbours(nearest, cosines)


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
    present = found.nearest_NK >= 0
    has = present.any(axis=1)
    _, units = np.unique(np.array(images.contents)[has], return_inverse=True)
    values: dict[str, Doubles] = {"cosine@1": found.cosine_NK[has, 0]}
    chances: dict[str, float] = {}
    k = found.nearest_NK.shape[1]
    labels = [record.label for record in images.records]
    if all(label is not None for label in labels):
        names, label_N = np.unique(np.array(labels, dtype=str), return_inverse=True)
        same_NK = (label_N[found.nearest_NK] == label_N[:, None]) & present
        shares = same_NK.sum(axis=1) / np.maximum(present.sum(axis=1), 1)
        values |= {"same_label@1": same_NK[has, 0].astype(np.float64)}
        values |= {f"same_label@{k}": shares[has]} if k > 1 else {}
        counts = np.bincount(label_N, minlength=len(names))
        chance = float((counts * (counts - 1)).sum() / max(len(labels) * (len(labels) - 1), 1))
        chances = dict.fromkeys((f"same_label@{one}" for one in (1, k)), chance)
    intervals = resampling.mean_intervals(values, units)
    return Result(
        task="neighbours",
        model=model,
        data=data,
        protocol=f"the {k} nearest other images of each, copies of the same picture left out",
        figures={
            name: Figure(float(one.mean()), len(one), intervals[name], chances.get(name))
            for name, one in values.items()
            if len(one)
        },
        counts={"images": len(images), "neighbours": k},
        outcomes={
            "": Outcomes(
                [images.records[place].uri for place in np.flatnonzero(has).tolist()],
                units,
                values,
            )
        },
    )


def spread_queries(images: EmbeddedImages, count: int = NUM_QUERIES, *, seed: int = 0) -> list[int]:
    """Images to show: drawn by a seed, every label once before any twice."""
    order = np.random.default_rng(seed).permutation(len(images)).tolist()
    taken: dict[str | None, int] = {}
    ranked = []
    for place in order:
        label = images.records[place].label
        ranked.append((taken.get(label, 0), place))
        taken[label] = taken.get(label, 0) + 1
    chosen = [place for _, place in sorted(ranked, key=lambda one: one[0])[:count]]
    return sorted(chosen, key=lambda place: (images.records[place].label or "", place))
