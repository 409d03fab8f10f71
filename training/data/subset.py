"""A few of the training samples, drawn once for a run; and labels that are wrong on purpose.

Both are functions of a seed and of where a sample stands among the shards, never of time: methods
that are compared on one seed see the same samples with the same labels, and a resumed run goes on
with them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clipsys.errors import TrainingError

#: For each shard the numbers of the samples that are trained on, in rising order.
Subset = tuple[tuple[int, ...], ...]


def draw_subset(
    counts: Sequence[int],
    num_samples: int,
    seed: int,
    labels: Sequence[Sequence[str | None]] | None = None,
) -> Subset:
    """Draws samples without replacement.

    Args:
        counts: samples of each shard.
        num_samples: how many to draw.
        seed: of the draw.
        labels: for each shard the label of each sample, None for one that must not be drawn. The
            labels then have the shares that they have in all samples, but each at least one, if
            there are no more labels than samples to draw.

    Raises:
        TrainingError: there are fewer samples.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, num_samples]))
    shards = np.repeat(np.arange(len(counts)), counts)
    places = np.arange(len(shards)) - np.repeat(np.cumsum(counts) - counts, counts)
    flat: list[str | None] = [""] * len(shards)
    if labels is not None:
        flat = [label for of_shard in labels for label in of_shard]
    classes = sorted({label for label in flat if label is not None})
    numbers = {label: number for number, label in enumerate(classes)}
    class_N = np.array([-1 if one is None else numbers[one] for one in flat], dtype=np.int64)
    sizes = np.bincount(class_N[class_N >= 0], minlength=len(classes))
    if num_samples > sizes.sum():
        what = "samples" if labels is None else "samples with a label"
        raise TrainingError(
            f"data.num_samples is {num_samples}, but the shards hold only {sizes.sum()} {what}; "
            "lower it or add data"
        )
    chosen: list[int] = []
    for number, quota in enumerate(_quotas(sizes, num_samples, rng)):
        members = np.flatnonzero(class_N == number)
        chosen += rng.permutation(members)[:quota].tolist()
    found: list[list[int]] = [[] for _ in counts]
    for one in sorted(chosen):
        found[shards[one]].append(int(places[one]))
    return tuple(map(tuple, found))


def _quotas(
    sizes_C: np.ndarray[tuple[int], np.dtype[np.int64]], total: int, rng: np.random.Generator
) -> list[int]:
    """How many samples of each class: shares by largest remainder, each class one if possible."""
    ideal_C = total * sizes_C / sizes_C.sum()
    least = 1 if total >= len(sizes_C) else 0
    quota_C = np.maximum(np.floor(ideal_C).astype(np.int64), least)
    # Classes of equal remainders take turns by the seed, not by their names.
    tie_C = rng.permutation(len(sizes_C))
    while quota_C.sum() > total:
        surplus_C = np.where(quota_C > least, quota_C - ideal_C, -np.inf)
        quota_C[np.lexsort((tie_C, surplus_C))[-1]] -= 1
    while quota_C.sum() < total:
        missing_C = np.where(quota_C < sizes_C, ideal_C - quota_C, -np.inf)
        quota_C[np.lexsort((tie_C, missing_C))[-1]] += 1
    return [int(one) for one in quota_C]


@dataclass(frozen=True)
class LabelNoise:
    """Gives a share of the samples another label, each other one as likely.

    Attributes:
        share: probability that a sample's label is replaced.
        seed: of the draw.
        classes: all labels.
    """

    share: float
    seed: int
    classes: tuple[str, ...]

    def of(self, label: str, number: int) -> str:
        """The label that a sample is trained with.

        Args:
            label: its own.
            number: number of the sample among all samples of the shards.
        """
        if label not in self.classes:
            return label
        text = f"label noise/{self.seed}/{number}"
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if int.from_bytes(digest[:8], "big") >= self.share * 2.0**64:
            return label
        others = [name for name in self.classes if name != label]
        return others[int.from_bytes(digest[8:], "big") % len(others)]
