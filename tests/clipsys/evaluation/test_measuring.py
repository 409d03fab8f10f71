from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clipsys
from clipsys.errors import ConfigError, DataError
from clipsys.evaluation.cache import EmbeddingCache
from clipsys.evaluation.class_prompts import class_question
from clipsys.evaluation.data import open_data
from clipsys.evaluation.measuring import Evaluation, evaluate
from clipsys.evaluation.options import EvaluationOptions
from tests.conftest import noise_image, write_training_shards


@pytest.fixture(scope="module")
def encoder(model_folder: Path) -> clipsys.Encoder:
    return clipsys.load(model_folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_training_shards(tmp_path_factory.mktemp("s"), 24)


def test_a_result_is_the_documented_document(encoder: clipsys.Encoder, shards: str) -> None:
    (result,) = evaluate(encoder, "retrieval", shards, match="family", cache=False)
    document = result.document()
    assert set(document) == {
        "task", "model", "data", "protocol", "encoder", "metrics", "intervals", "samples",
    }  # fmt: skip
    assert document["metrics"]["text_to_image/queries"] == 48
    low, high = document["intervals"]["text_to_image/recall@10"]
    assert low <= document["metrics"]["text_to_image/recall@10"] <= high
    (zeroshot,) = evaluate(encoder, "zeroshot", shards, cache=False)
    assert (zeroshot.counts["classes"], zeroshot.figures["accuracy@1"].chance) == (4, 0.25)
    (probe,) = evaluate(encoder, "probe", shards, cache=False)
    assert probe.variant == "logistic"
    assert 0 <= probe.metrics()["accuracy@1"] <= 1


def test_predictions_are_those_of_the_classifier(encoder: clipsys.Encoder, shards: str) -> None:
    evaluation = Evaluation(encoder, open_data(shards), EvaluationOptions(templates="siglip"))
    result = evaluation.zeroshot()
    details: Any = result.details
    classifier = clipsys.ZeroShotClassifier(encoder, details.classes, "siglip", cache=False)
    images = [record.read() for record in evaluation.images.records]
    found = classifier.predict(images)
    assert [one.label for one in found] == [details.classes[p] for p in details.predicted_N]
    assert details.confidence_N == pytest.approx([one.probability for one in found], abs=1e-5)


def test_every_task_shares_the_images_and_a_later_run_their_vectors(
    encoder: clipsys.Encoder, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = EmbeddingCache(tmp_path / "cache")
    options = EvaluationOptions(probes=["logistic", "knn"], shots=[1, 2], seeds=2)
    first = Evaluation(encoder, open_data(shards), options, cache=cache)
    tasks: tuple[Any, ...] = ("zeroshot", "retrieval", "probe")
    before = [one.metrics() for task in tasks for one in first.run(task)]
    assert len(before) == 6

    def encoded(*_: object) -> None:
        raise AssertionError("something was encoded again")

    monkeypatch.setattr(encoder, "encode_pixels_fixed", encoded)
    monkeypatch.setattr(encoder, "encode_text_fixed", lambda texts: encoded() if texts else [])
    again = Evaluation(encoder, open_data(shards), options, cache=cache)
    assert [one.metrics() for task in tasks for one in again.run(task)] == before


@pytest.mark.parametrize("on", ["zeroshot", "retrieval", "probe"])
def test_any_task_can_be_measured_on_corrupted_images(
    encoder: clipsys.Encoder, shards: str, on: Any
) -> None:
    (result,) = evaluate(
        encoder, "robustness", shards, on=on, corruptions=["contrast"], severities=[5], cache=False
    )
    figures = result.figures
    name = "text_to_image/recall@1" if on == "retrieval" else "accuracy@1"
    drop = figures[f"clean/{name}"].value - figures[f"contrast/{name}"].value
    assert figures[f"drop/{name}"].value == pytest.approx(drop)
    assert result.variant == ("logistic" if on == "probe" else on)


def test_a_probe_takes_training_data_of_its_own(encoder: clipsys.Encoder, tmp_path: Path) -> None:
    seeds = itertools.count()  # an image that occurs in both parts is left out of one
    for split, count in (("train", 5), ("test", 3)):
        for label in ("a", "b"):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                noise_image(next(seeds)).save(folder / f"{number}.png")
    (result,) = evaluate(encoder, "probe", tmp_path, split="test", train_split="train", cache=False)
    assert (result.counts["train_images"], result.counts["test_images"]) == (10, 6)
    (tmp_path / "test" / "c").mkdir()
    noise_image(next(seeds)).save(tmp_path / "test" / "c" / "0.png")
    with pytest.raises(DataError, match="'c'"):
        evaluate(encoder, "probe", tmp_path, split="test", train_split="train", cache=False)


def test_neighbours_have_figures_and_a_sheet(encoder: clipsys.Encoder, shards: str) -> None:
    evaluation = Evaluation(encoder, open_data(shards))
    result, sheets = evaluation.neighbours(layer="auto")
    assert result.figures["cosine@1"].value <= 1
    assert len(sheets) == 2
    assert sheets[0].thumbnails()


def test_images_that_cannot_be_used_are_counted_not_fatal(
    encoder: clipsys.Encoder, image_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (image_folder / "cats" / "bad.png").write_bytes(b"nothing")
    (result,) = evaluate(encoder, "zeroshot", image_folder, cache=False)
    assert result.counts["images"] == 6
    assert "bad.png" in caplog.text


def test_unlabelled_images_cannot_be_classified(encoder: clipsys.Encoder, tmp_path: Path) -> None:
    noise_image(0).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="has no label; expected one folder per class"):
        evaluate(encoder, "zeroshot", tmp_path, cache=False)
    (tmp_path / "x").mkdir()
    noise_image(0).save(tmp_path / "x" / "a.png")
    (tmp_path / "a.png").unlink()
    with pytest.raises(ConfigError, match="all images are of one class, 'x'"):
        evaluate(encoder, "zeroshot", tmp_path, cache=False)


def test_names_of_numbered_classes_come_from_the_data_or_a_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    question, labels = class_question(["1", "0"], [], known=["0", "1", "2"])
    assert (question.names, labels) == (["0", "1", "2"], ["1", "0"])
    (tmp_path / "classnames.txt").write_text("crane\nmissile\ncrane\n")
    with caplog.at_level(logging.WARNING, "clipsys"):
        question, labels = class_question(["0", "2", "1"], [tmp_path], templates="plain")
    assert (question.labels, question.names) == (["0", "1"], ["crane", "missile"])
    assert labels == ["0", "0", "1"]
    assert "labels 0 and 2 are both called 'crane', and count as one class" in caplog.text
    assert question.prompts == ["crane", "missile"]
    with pytest.raises(ConfigError, match="template 'a photo': expected one"):
        class_question(["0", "1"], [tmp_path], templates=["a photo"])


def test_class_vectors_are_means_of_the_prompts(encoder: clipsys.Encoder) -> None:
    question, _ = class_question(["a", "b"], [], templates=["{}", "my {}"])
    found = question.vectors(encoder.encode_text(question.prompts))
    mean = encoder.encode_text(["b", "my b"]).mean(axis=0)
    assert found[1] == pytest.approx(mean / np.linalg.norm(mean), abs=1e-6)
