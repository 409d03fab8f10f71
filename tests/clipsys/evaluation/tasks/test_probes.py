from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import f1_score, precision_score, recall_score

from clipsys.errors import DataError
from clipsys.evaluation.results import ClassificationDetails, CurveDetails
from clipsys.evaluation.tasks.few_shot import draw_shots, few_shot_result
from clipsys.evaluation.tasks.probes import Kind, Probe, ProbeSettings, knn_figures, probe_result
from clipsys.evaluation.tasks.splitting import LabelledVectors
from tests.clipsys.evaluation.tasks.data import clusters

KINDS: Sequence[Kind] = ("logistic", "mlp", "knn")


@pytest.mark.parametrize("kind", KINDS)
def test_a_probe_gives_every_figure_with_interval_and_chance(kind: Kind) -> None:
    train, test = clusters(90), clusters(60, seed=1)
    result = probe_result(train, test, ProbeSettings(kind), model="m", data="d")
    details = result.details
    assert isinstance(details, ClassificationDetails)
    figure = result.figures["accuracy@1"]
    assert figure.interval is not None
    assert figure.interval[0] < figure.value <= figure.interval[1]
    assert figure.value == result.outcomes[""].values["accuracy@1"].mean() > 0.8
    assert figure.chance == pytest.approx(1 / 3)
    assert result.metrics()["train_images"] == 90
    truth, found = details.targets_N, details.predicted_N
    for average in ("macro", "weighted"):
        for name, score in (
            ("precision", precision_score),
            ("recall", recall_score),
            ("f1", f1_score),
        ):
            expected = score(truth, found, average=average)
            assert result.metrics()[f"{average}_{name}"] == pytest.approx(expected)
    assert (details.reliability is None) == (kind == "knn")
    assert result.outcomes[""].keys == test.uris
    again = probe_result(train, test, ProbeSettings(kind), model="m", data="d")
    assert again.document() == result.document()


def test_one_data_set_is_split_and_the_protocol_says_how() -> None:
    result = probe_result(clusters(60), settings=ProbeSettings(seed=3))
    assert (result.metrics()["train_images"], result.metrics()["test_images"]) == (42, 18)
    assert "tested on a stratified 30% of the images (seed 3)" in result.protocol
    assert "C by the search of the CLIP paper on 20% of the training data" in result.protocol


def test_neighbours_without_training_data_are_those_of_knn_figures() -> None:
    data = clusters(60, noise=1.5)
    data = replace(data, marks=[(number // 2,) for number in range(60)])
    result = probe_result(data, settings=ProbeSettings("knn"))
    figures = knn_figures(data.vectors_ND, data.labels, [number // 2 for number in range(60)])
    assert result.metrics().items() >= figures.items()
    assert result.outcomes[""].units_N.tolist() == [number // 2 for number in range(60)]
    other = probe_result(data, settings=ProbeSettings("knn", neighbours=3))
    assert "3 nearest neighbours vote" in other.protocol


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_probed_is_one_line(kind: Kind) -> None:
    settings = ProbeSettings(kind)
    with pytest.raises(DataError, match=r"^d: class 'class 2': in the test data but without"):
        probe_result(clusters(8, classes=2), clusters(9, seed=1), settings, data="d")
    with pytest.raises(DataError, match=r"^d: all training images have the label 'class 0'"):
        probe_result(clusters(8, classes=1), None, settings, data="d")


def test_training_images_that_are_tested_too_are_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = clusters(30)
    result = probe_result(data, data.take(np.arange(6)), data="d")
    assert result.metrics()["train_images"] == 24
    assert "6 training images that the test data show too are left out" in result.protocol
    assert "d: 6 training images" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_a_probe_that_is_trained_once_can_be_tested_again(kind: Kind) -> None:
    train, test = clusters(60), clusters(30, seed=1)
    probe = Probe(train, ProbeSettings(kind), model="m", data="d")
    expected = probe_result(train, test, ProbeSettings(kind), model="m", data="d")
    assert probe(test).document() == expected.document()
    assert probe(test.take(np.arange(7))).metrics()["test_images"] == 7


def test_few_shots_are_means_over_seeds_on_one_curve() -> None:
    train, test = clusters(90, noise=1.2), clusters(60, noise=1.2, seed=1)
    result = few_shot_result(train, test, shots=(4, 1), seeds=3)
    assert isinstance(result.details, CurveDetails)
    (line,) = result.details.lines.values()
    assert [position for position, _ in line] == [1, 4]
    assert set(result.figures) == {
        f"{prefix}/{name}"
        for prefix in ("1_shot", "4_shots")
        for name in ("accuracy@1", "seed_std_accuracy@1")
    }
    one, four = (figure for _, figure in line)
    assert one.value < four.value
    assert one.interval is not None
    assert one.interval[0] < one.value < one.interval[1]
    assert result.outcomes["4_shots"].values["accuracy@1"].mean() == pytest.approx(four.value)
    first = probe_result(train.take(draw_shots(np.arange(90) % 3, np.arange(90), 1, seed=0)), test)
    single = few_shot_result(train, test, shots=(1,), seeds=1)
    assert single.figures["1_shot/accuracy@1"].value == first.figures["accuracy@1"].value


def test_shots_are_different_images_and_grow() -> None:
    targets, groups = np.arange(40) % 2, np.arange(40) // 4
    chosen = [draw_shots(targets, groups, count, seed=7) for count in (1, 3, 5)]
    for count, positions in zip((1, 3, 5), chosen, strict=True):
        assert np.bincount(targets[positions]).tolist() == [count, count]
        for label in (0, 1):
            own = groups[positions[targets[positions] == label]]
            assert len(set(own.tolist())) == count
    assert set(chosen[0]) < set(chosen[1]) < set(chosen[2])
    assert not np.array_equal(chosen[2], draw_shots(targets, groups, 5, seed=8))


def test_classes_with_too_few_images_for_the_shots_are_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    train, test = clusters(10, classes=3), clusters(9, seed=1)
    with caplog.at_level(logging.WARNING):
        result = few_shot_result(train, test, shots=(2, 4, 8), seeds=1, data="d")
    assert "d: 2 classes ('class 1', 'class 2'): fewer than 4 different training" in caplog.text
    assert "4, 8 shots are left out" in caplog.text
    assert set(result.outcomes) == {"2_shots"}
    with pytest.raises(DataError, match=r"fewer than 4 .* images, the smallest of the shots"):
        few_shot_result(train, test, shots=(4,), data="d")


def test_a_probe_finds_what_is_linearly_there_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    labels = [str(n % 2) for n in range(80)]
    signal = np.array([[float(label), 0.0] for label in labels]) + rng.normal(0, 0.1, (80, 2))
    noise = rng.normal(size=(80, 2))

    def accuracy(vectors: np.ndarray) -> float:
        names = [str(number) for number in range(80)]
        marks = [(name,) for name in names]
        images = LabelledVectors(vectors.astype(np.float32), labels, names, marks)
        found = probe_result(images.take(np.arange(60)), images.take(np.arange(60, 80)))
        return found.figures["accuracy@1"].value

    assert accuracy(signal) == 1.0
    assert accuracy(noise) < 0.8


def test_nearest_neighbours_vote_as_a_loop_would_let_them() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(60, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = [f"class {number}" for number in rng.integers(0, 3, 60)]
    things = [number // 2 for number in range(60)]
    right = 0
    for row in range(60):
        others = [other for other in range(60) if things[other] != things[row]]
        others.sort(key=lambda other: -float(vectors[row] @ vectors[other]))
        votes: dict[str, float] = {}
        for other in others[:20]:
            vote = np.exp(float(vectors[row] @ vectors[other]) / 0.07)
            votes[labels[other]] = votes.get(labels[other], 0.0) + vote
        right += max(votes, key=votes.__getitem__) == labels[row]
    figures = knn_figures(vectors, labels, things)
    assert figures["accuracy@1"] == pytest.approx(right / 60)
    assert figures["chance_accuracy@1"] == max(labels.count(one) for one in set(labels)) / 60
    # Without saying what is the same thing, only the image itself does not vote.
    twins = np.repeat(vectors[::2], 2, axis=0)
    assert knn_figures(twins, [str(number // 2) for number in range(60)])["accuracy@1"] > 0.9


def test_an_image_without_any_neighbour_is_not_classified_by_itself() -> None:
    vectors = np.eye(2, dtype=np.float32)
    found = knn_figures(vectors, ["a", "b"], [0, 0])
    assert (found["images"], found["accuracy@1"]) == (2, 0.0)
