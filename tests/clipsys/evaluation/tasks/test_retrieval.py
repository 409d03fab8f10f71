from __future__ import annotations

import numpy as np
import pytest

from clipsys.errors import DataError
from clipsys.evaluation.results import RetrievalDetails
from clipsys.evaluation.tasks.retrieval import (
    RetrievalTargets,
    retrieval_figures,
    retrieval_result,
    retrieval_targets,
)

_ITEMS = [
    (("red", "a red one"), {"family": "r"}),
    (("blue",), {"family": "b"}),
    (("scarlet", "ruby"), {"family": "r"}),
]


def _pairs(targets: RetrievalTargets) -> list[list[int]]:
    """The images that are correct for each text."""
    rows, images = targets.relation.pairs(0, len(targets.texts))
    return [sorted(images[rows == row].tolist()) for row in range(len(targets.texts))]


def test_every_caption_or_the_first_is_a_query() -> None:
    assert retrieval_targets(_ITEMS).texts == ["red", "a red one", "blue", "scarlet", "ruby"]
    first = retrieval_targets(_ITEMS, captions="first")
    assert (first.texts, _pairs(first)) == (["red", "blue", "scarlet"], [[0], [1], [2]])


def test_match_makes_items_of_one_value_hits_of_each_other() -> None:
    targets = retrieval_targets(_ITEMS, match="family")
    assert _pairs(targets) == [[0, 2], [0, 2], [1], [0, 2], [0, 2]]
    assert "any image with the same family" in targets.protocol
    with pytest.raises(DataError, match="item 0 has no metadata key 'colour'; it has family"):
        retrieval_targets(_ITEMS, match="colour")


def test_equal_images_and_equal_captions_are_correct_unless_only_the_own_one_is() -> None:
    items = [(("dog", "pet"), {}), (("dog",), {}), (("cat",), {}), ((), {})]
    contents = ["x", "y", "z", "x"]  # the last one is a copy of the first, without a caption
    equal = retrieval_targets(items, contents=contents)
    assert _pairs(equal) == [[0, 1, 3], [0, 3], [0, 1, 3], [2]]
    own = retrieval_targets(items, contents=contents, duplicates="own")
    assert _pairs(own) == [[0], [0], [1], [2]]
    assert "images with an equal caption" in equal.protocol
    assert "equal" not in own.protocol
    # Captions are shared by no chain: "pet" is not correct for the second dog.
    figures = retrieval_figures(np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32), equal)
    assert figures["image_to_text/queries"] == 4


def test_captions_are_needed() -> None:
    with pytest.raises(DataError, match="no item has a caption"):
        retrieval_targets([((), {})])


def test_a_perfect_encoder_has_recall_one_both_ways() -> None:
    targets = retrieval_targets(_ITEMS)
    image_ND = np.eye(3, dtype=np.float32)
    figures = retrieval_figures(image_ND, image_ND[targets.image_of_M], targets)
    assert figures["text_to_image/recall@1"] == figures["image_to_text/recall@1"] == 1.0
    assert figures["text_to_image/map"] == figures["image_to_text/map"] == 1.0
    assert (figures["text_to_image/candidates"], figures["image_to_text/candidates"]) == (3, 5)
    assert figures["text_to_image/chance_recall@1"] == pytest.approx(1 / 3)


def _noisy(num_images: int = 60) -> tuple[np.ndarray, np.ndarray, RetrievalTargets]:
    rng = np.random.default_rng(0)
    items = [
        ((f"text {n}", f"words {n}", "same" if n < 2 else f"own {n}"), {})
        for n in range(num_images)
    ]
    targets = retrieval_targets(items, contents=[str(max(n, 3)) for n in range(num_images)])
    images = rng.normal(size=(num_images, 8)).astype(np.float32)
    images[:4] = images[3]
    texts = images[targets.image_of_M] + rng.normal(0, 0.7, (len(targets.texts), 8))
    unit = [one / np.linalg.norm(one, axis=1, keepdims=True) for one in (images, texts)]
    return unit[0].astype(np.float32), unit[1].astype(np.float32), targets


def test_figures_equal_those_of_the_whole_score_matrix() -> None:
    images, texts, targets = _noisy()
    figures = retrieval_figures(images, texts, targets)
    correct = np.zeros((len(texts), len(images)), bool)
    correct[targets.relation.pairs(0, len(texts))] = True
    for name, scores, right in (
        ("text_to_image", texts @ images.T, correct),
        ("image_to_text", images @ texts.T, correct.T),
    ):
        firsts, precisions = [], []
        for row, own in zip(scores, right, strict=True):
            order = sorted(range(len(row)), key=lambda n: (-row[n], own[n]))
            hits = [place for place, n in enumerate(order) if own[n]]
            firsts.append(hits[0])
            precisions.append(np.mean([(i + 1) / (place + 1) for i, place in enumerate(hits)]))
        for k in (1, 5, 10):
            assert figures[f"{name}/recall@{k}"] == pytest.approx(np.mean(np.array(firsts) < k))
        assert figures[f"{name}/median_rank"] == np.median(firsts) + 1
        assert figures[f"{name}/map"] == pytest.approx(np.mean(precisions))


def test_the_result_has_intervals_curves_and_the_worst_queries() -> None:
    images, texts, targets = _noisy()
    uris = [f"{number}.png" for number in range(60)]
    result = retrieval_result(images, texts, targets, uris=uris, model="m", data="d")
    assert retrieval_figures(images, texts, targets) == result.metrics()
    for name, figure in result.figures.items():
        assert figure.interval is not None, name
        assert figure.interval[0] <= figure.value <= figure.interval[1], name
    # Three copies of a picture are one unit, of text queries too.
    assert len(set(result.outcomes["image_to_text"].units_N.tolist())) == 57
    assert len(set(result.outcomes["text_to_image"].units_N.tolist())) == 57
    details = result.details
    assert isinstance(details, RetrievalDetails)
    curve = details.curves["text_to_image"]
    assert curve[1] == result.figures["text_to_image/recall@1"].value
    assert list(curve.values()) == sorted(curve.values())
    assert curve[60] == details.chance_curves["text_to_image"][60] == 1.0
    misses = details.misses["text_to_image"]
    assert [miss.rank for miss in misses] == sorted((miss.rank for miss in misses), reverse=True)
    assert misses[0].query in targets.texts
    assert misses[0].expected in uris


def test_own_captions_give_the_recall_that_clip_benchmark_counts() -> None:
    """A hit is one correct pair or more among the k highest scores of a row of the whole matrix."""
    images, texts, _ = _noisy()
    items = [((f"text {n}", f"words {n}", "same"), {}) for n in range(60)]
    targets = retrieval_targets(items, duplicates="own")
    images[:4] = np.eye(8, dtype=np.float32)[:4]  # it counts ties in favour or against, by chance
    figures = retrieval_figures(images, texts, targets)
    scores = texts @ images.T
    correct = targets.image_of_M[:, None] == np.arange(60)
    for name, one, own in (
        ("text_to_image", scores, correct),
        ("image_to_text", scores.T, correct.T),
    ):
        for k in (1, 5, 10):
            highest = np.argsort(-one, axis=1)[:, :k]
            hits = np.take_along_axis(own, highest, axis=1).any(axis=1)
            assert figures[f"{name}/recall@{k}"] == pytest.approx(hits.mean())
