from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from clipsys.corpora.records import Record
from clipsys.errors import DataError
from clipsys.evaluation.embedded import EmbeddedImages
from clipsys.evaluation.tasks.splitting import (
    class_targets,
    group_numbers,
    labelled_vectors,
    split,
    split_positions,
    without_leak,
)
from tests.clipsys.evaluation.tasks.data import clusters


def test_images_that_share_a_mark_through_others_are_one_group() -> None:
    marks = [("a",), ("b",), ("c", "a"), ("d",), ("b", "e"), ("e", "c"), ()]
    assert group_numbers(marks).tolist() == [0, 0, 0, 1, 0, 0, 2]


def test_a_split_is_stratified_and_depends_on_the_seed_alone() -> None:
    data = clusters(90)
    train, test = split(data, 0.3, seed=1, name="d")
    assert Counter(test.labels) == {f"class {number}": 9 for number in range(3)}
    assert sorted([*train.uris, *test.uris]) == sorted(data.uris)
    assert split(data, 0.3, seed=1, name="d")[1].uris == test.uris
    assert split(data, 0.3, seed=2, name="d")[1].uris != test.uris


def test_images_of_equal_content_or_match_value_stay_on_one_side() -> None:
    random = np.random.default_rng(0)
    data = clusters(120)
    contents, values = random.integers(0, 60, 120), random.integers(0, 60, 120)
    marks = [
        (("content", int(content), label), ("match", int(value), label))
        for content, value, label in zip(contents, values, data.labels, strict=True)
    ]
    data = replace(data, marks=marks)
    for seed in range(5):
        first, second = split_positions(data, 0.3, seed=seed)
        assert {one for p in first for one in marks[p]}.isdisjoint(
            {one for p in second for one in marks[p]}
        )
        assert len(first) and len(second)


def test_marks_are_the_content_and_the_match_value() -> None:
    records = [
        Record(uri=f"{number}.png", read=bytes, label="a", metadata={"thing": number // 2})
        for number in range(4)
    ]
    images = EmbeddedImages(records, np.eye(4, dtype=np.float32), ["x", "y", "z", "x"])
    labels = images.labels("d")
    assert labelled_vectors(images, labels).groups().tolist() == [0, 1, 2, 0]
    assert labelled_vectors(images, labels, match="thing").groups().tolist() == [0, 0, 0, 0]
    with pytest.raises(DataError, match=r"0.png has no metadata key 'sort' \(--match\); it has t"):
        labelled_vectors(images, labels, match="sort")


def test_classes_that_cannot_be_split_are_named() -> None:
    data = clusters(8, classes=4)
    twins = [(name,) for name in ("0", "1", "2", "3", "0", "5", "6", "7")]
    with pytest.raises(DataError, match="d: class 'class 0': only one image, or images that all"):
        split(replace(data, marks=twins), 0.3, seed=0, name="d")
    with pytest.raises(DataError, match=r"d: 9 classes .*'class 4', ….: only one image"):
        split(clusters(9, classes=9), 0.3, seed=0, name="d")
    # Inside the training data they stay where a classifier can learn them.
    first, second = split_positions(clusters(9, classes=9), 0.2, seed=0)
    assert (len(first), len(second)) == (9, 0)


def test_classes_that_cannot_be_learnt_are_named() -> None:
    train, test = clusters(6, classes=2), clusters(9, classes=3, seed=1)
    with pytest.raises(DataError, match="d: class 'class 2': in the test data but without a train"):
        class_targets(train, test, "d")
    with pytest.raises(DataError, match="d: all training images have the label 'class 0'"):
        class_targets(clusters(5, classes=1), clusters(5, classes=1), "d")
    classes, train_N, test_M = class_targets(test, train, "d")
    assert classes == ["class 0", "class 1", "class 2"]
    assert (train_N.tolist(), test_M.tolist()) == ([0, 1, 2] * 3, [0, 1] * 3)


def test_training_images_that_the_test_data_show_are_left_out() -> None:
    train, test = clusters(6), clusters(6, seed=1)
    kept, dropped = without_leak(train, replace(test, marks=[("0/4.png",), *test.marks[1:]]))
    assert dropped == 1
    assert "0/4.png" not in kept.uris
    assert without_leak(train, test) == (train, 0)
