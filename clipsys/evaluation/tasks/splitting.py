"""Labelled vectors, and splitting them into training and test data without a leak.

Images of equal content, or of equal ``--match`` value, show the same thing. They form a group, and
a group is always on one side of a split.

Legend of shapes: N images, D width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clipsys.errors import DataError
from clipsys.evaluation.embedded import EmbeddedImages

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LabelledVectors:
    """Images of known class.

    Attributes:
        vectors_ND: (N, D) float32 of unit norm.
        labels: N classes.
        uris: N names of the images.
        marks: for each image, values that it shares with images that show the same thing (content
            hash, ``--match`` value).
    """

    vectors_ND: Floats
    labels: Sequence[str]
    uris: Sequence[str]
    marks: Sequence[tuple[Hashable, ...]]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, positions: Integers) -> LabelledVectors:
        """Some of the images, in the order of their positions."""
        return LabelledVectors(
            self.vectors_ND[positions],
            [self.labels[position] for position in positions],
            [self.uris[position] for position in positions],
            [self.marks[position] for position in positions],
        )

    def groups(self) -> Integers:
        """(N,) number of the group of each image, in the order of first appearance."""
        return group_numbers(self.marks)


def labelled_vectors(
    images: EmbeddedImages, labels: Sequence[str], *, match: str | None = None
) -> LabelledVectors:
    """Joins images with their classes.

    Args:
        match: metadata key; images with the same value show the same thing.

    Raises:
        DataError: an image has no metadata ``match``.
    """
    marks: list[tuple[Hashable, ...]] = []
    for record, content in zip(images.records, images.contents, strict=True):
        if match is None:
            marks.append((("content", content),))
            continue
        if match not in record.metadata:
            raise DataError(
                f"{record.uri} has no metadata key {match!r} (--match); "
                f"it has {', '.join(sorted(record.metadata)) or 'none'}"
            )
        marks.append((("content", content), ("match", repr(record.metadata[match]))))
    return LabelledVectors(
        images.vectors_ND, list(labels), [record.uri for record in images.records], marks
    )


def group_numbers(marks: Sequence[tuple[Hashable, ...]]) -> Integers:
    """Images that share a mark, directly or through others, have one number."""
    parents = list(range(len(marks)))

    def root(number: int) -> int:
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    owners: dict[Hashable, int] = {}
    for number, own in enumerate(marks):
        for mark in own:
            first, second = sorted((root(owners.setdefault(mark, number)), root(number)))
            parents[second] = first
    roots = [root(number) for number in range(len(marks))]
    numbers: dict[int, int] = {}
    return np.array([numbers.setdefault(one, len(numbers)) for one in roots], np.int64)


def split_positions(data: LabelledVectors, share: float, *, seed: int) -> tuple[Integers, Integers]:
    """Positions of the two parts, ascending: the second has ``share`` of each class.

    At least one group of a class goes to each part; a single one stays in the first.

    Args:
        seed: of the choice, which depends on nothing else.
    """
    groups_N = data.groups()
    members: dict[int, list[int]] = {}
    for position, group in enumerate(groups_N):
        members.setdefault(int(group), []).append(position)
    by_class: dict[str, list[int]] = {}
    for group, positions in members.items():
        by_class.setdefault(data.labels[positions[0]], []).append(group)
    random = np.random.default_rng(seed)
    second: list[int] = []
    for label in sorted(by_class):
        order = random.permutation(by_class[label])
        wanted = share * sum(len(members[group]) for group in order)
        taken = 0
        for number, group in enumerate(order[:-1]):
            # A group goes over if that brings the share nearer, and the first always does.
            if number and taken + len(members[group]) / 2 > wanted:
                break
            second += members[group]
            taken += len(members[group])
    chosen = np.zeros(len(data), bool)
    chosen[second] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def split(
    data: LabelledVectors, share: float, *, seed: int, name: str
) -> tuple[LabelledVectors, LabelledVectors]:
    """Splits one data set into training and test data.

    Args:
        share: of the images to test on.
        name: what messages call the data.

    Raises:
        DataError: a class has a single image, or images that all show the same thing.
    """
    groups_N = data.groups()
    pairs = {(label, int(group)) for label, group in zip(data.labels, groups_N, strict=True)}
    counts = Counter(label for label, _ in pairs)
    single = sorted(label for label, count in counts.items() if count < 2)
    if single:
        raise DataError(
            f"{name}: {listed(single)}: only one image, or images that all show the same thing; a "
            "split into training and test data needs two or more of each class, or name separate "
            "training data"
        )
    first, second = split_positions(data, share, seed=seed)
    return data.take(first), data.take(second)


def without_leak(train: LabelledVectors, test: LabelledVectors) -> tuple[LabelledVectors, int]:
    """Training data without the images that the test data show too, and how many those were."""
    groups = group_numbers([*train.marks, *test.marks])
    tested = np.unique(groups[len(train) :])
    kept = np.flatnonzero(~np.isin(groups[: len(train)], tested))
    dropped = len(train) - len(kept)
    return (train.take(kept) if dropped else train), dropped


def class_targets(
    train: LabelledVectors, test: LabelledVectors, name: str
) -> tuple[list[str], Integers, Integers]:
    """The classes of the training data, and the position of each image's class among them.

    Raises:
        DataError: there are fewer than two classes, or a test class has no training image.
    """
    classes = sorted(set(train.labels))
    unseen = sorted(set(test.labels) - set(classes))
    if unseen:
        raise DataError(
            f"{name}: {listed(unseen)}: in the test data but without a training image; add some, "
            "or leave the class out of the test data"
        )
    if len(classes) < 2:
        raise DataError(
            f"{name}: all training images have the label {classes[0]!r}; a probe needs two classes "
            "or more"
            if classes
            else f"{name}: there is no training image; a probe needs two classes or more"
        )
    index = {label: number for number, label in enumerate(classes)}
    return classes, _targets(index, train.labels), _targets(index, test.labels)


def _targets(index: dict[str, int], labels: Sequence[str]) -> Integers:
    return np.array([index[label] for label in labels], np.int64)


def listed(labels: Sequence[str]) -> str:
    """``class 'a'`` or ``7 classes ('a', 'b', …)``, for messages."""
    shown = ", ".join(repr(label) for label in labels[:5]) + (", …" if len(labels) > 5 else "")
    return f"class {shown}" if len(labels) == 1 else f"{len(labels)} classes ({shown})"
