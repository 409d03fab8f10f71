from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from clipsys.corpora.records import Record
from clipsys.evaluation.embedded import EmbeddedImages
from clipsys.evaluation.results import Result
from clipsys.evaluation.tasks import neighbours
from clipsys.evaluation.tasks.neighbours import (
    nearest_neighbours,
    neighbours_result,
    spread_queries,
)


def _images(
    vectors: Sequence[Sequence[float]] | np.ndarray,
    labels: Sequence[str | None] | None = None,
    contents: Sequence[str] | None = None,
) -> EmbeddedImages:
    vectors_ND = np.asarray(vectors, np.float32)
    vectors_ND = vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    count = len(vectors_ND)
    records = [
        Record(uri=f"{n}.png", read=lambda: b"", label=labels[n] if labels else None)
        for n in range(count)
    ]
    return EmbeddedImages(records, vectors_ND, contents or [str(n) for n in range(count)])


def _random(count: int, *, copies: int = 0) -> EmbeddedImages:
    rng = np.random.default_rng(count)
    vectors = rng.normal(size=(count, 6))
    contents = [str(n) for n in range(count)]
    for n in range(copies):
        vectors[count - 1 - n], contents[count - 1 - n] = vectors[n], contents[n]
    return _images(vectors, [f"class {n % 3}" for n in range(count)], contents)


def _naive(images: EmbeddedImages, k: int) -> list[list[int]]:
    found = []
    for one in range(len(images)):
        others = [n for n in range(len(images)) if images.contents[n] != images.contents[one]]
        cosines = {n: float(images.vectors_ND[one] @ images.vectors_ND[n]) for n in others}
        found.append(sorted(others, key=lambda n: (-cosines[n], n))[:k])
    return found


def _measured(images: EmbeddedImages, k: int = 8) -> Result:
    return neighbours_result(images, nearest_neighbours(images, k), model="m", data="d")


@pytest.mark.parametrize(("copies", "block"), [(0, 40), (6, 40), (6, 7)])
def test_the_nearest_others_are_those_of_a_loop_over_all(
    copies: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "QUERIES", block)
    images = _random(40, copies=copies)
    found = nearest_neighbours(images, 5)
    # Copies of one picture are equally near up to rounding: contents are compared.
    assert np.array(images.contents)[found.nearest_SK].tolist() == [
        [images.contents[n] for n in row] for row in _naive(images, 5)
    ]
    assert (np.diff(found.cosine_SK) <= 0).all()


def test_of_many_images_some_are_asked_for_their_neighbours_among_all() -> None:
    images = _random(40)
    found = nearest_neighbours(images, 5, max_queries=6)
    naive = _naive(images, 5)
    queries = found.queries_S.tolist()
    assert queries == sorted(set(queries))
    assert len(queries) == 6
    assert [found.of(one)[0].tolist() for one in queries] == [naive[one] for one in queries]
    result = neighbours_result(images, found, model="m", data="d")
    assert result.figures["cosine@1"].samples == 6
    assert result.outcomes[""].keys == [f"{one}.png" for one in queries]
    assert set(spread_queries(images, 4, among=found.queries_S)) <= set(queries)


def test_shares_of_the_same_label_and_their_chance_are_those_of_a_loop_over_all() -> None:
    images = _random(40, copies=6)
    labels = [record.label for record in images.records]
    same = [[labels[n] == labels[one] for n in row] for one, row in enumerate(_naive(images, 8))]
    figures = _measured(images).figures
    assert figures["same_label@1"].value == pytest.approx(np.mean([row[0] for row in same]))
    assert figures["same_label@8"].value == pytest.approx(np.mean(same))
    pairs = [
        labels[one] == labels[n]
        for one in range(40)
        for n in range(40)
        if images.contents[one] != images.contents[n]
    ]
    assert figures["same_label@1"].chance == pytest.approx(np.mean(pairs))


def test_of_equally_near_images_the_first_ones_are_taken() -> None:
    images = _images([[1, 0], *[[0, 1]] * 6])
    assert nearest_neighbours(images, 3).nearest_SK[0].tolist() == [1, 2, 3]
    assert nearest_neighbours(images, 3).nearest_SK[6].tolist() == [1, 2, 3]


def test_copies_of_a_picture_are_not_its_neighbours() -> None:
    images = _images([[1, 0], [1, 0], [0, 1]], ["a", "a", "b"], ["x", "x", "y"])
    found = nearest_neighbours(images)
    assert found.nearest_SK.tolist() == [[2, -1], [2, -1], [0, 1]]
    result = neighbours_result(images, found, model="m", data="d")
    assert result.figures["same_label@1"].value == 0
    assert result.figures["cosine@1"].samples == 3
    outcomes = result.outcomes[""]
    assert outcomes.units_N.tolist() == [0, 0, 1]  # copies are one unit of the bootstrap


@pytest.mark.parametrize("contents", [["x"], ["x", "x", "x"]])
def test_images_without_any_other_picture_give_no_figure(contents: list[str]) -> None:
    images = _images([[1, 0]] * len(contents), ["a"] * len(contents), contents)
    result = _measured(images)
    assert (nearest_neighbours(images).nearest_SK == -1).all()
    assert dict(result.figures) == {}
    assert result.counts["images"] == len(contents)


def test_one_image_without_a_label_leaves_the_labels_out() -> None:
    images = _images([[1, 0], [0, 1], [1, 1]], ["a", None, "a"])
    assert list(_measured(images).figures) == ["cosine@1"]


def test_two_images_are_neighbours_of_each_other() -> None:
    result = _measured(_images([[1, 0], [0.6, 0.8]], ["a", "a"]))
    assert list(result.figures) == ["cosine@1", "same_label@1"]
    assert result.figures["cosine@1"].value == pytest.approx(0.6)


def test_queries_show_every_label_before_any_twice() -> None:
    images = _images(np.eye(20), ["rare"] + ["often"] * 10 + ["seldom"] * 9)
    chosen = spread_queries(images, 4)
    assert chosen == spread_queries(images, 4)
    labels = [images.records[place].label for place in chosen]
    assert labels == sorted(str(label) for label in labels)
    assert set(labels) == {"rare", "often", "seldom"}
    assert len(spread_queries(images, 50)) == 20
