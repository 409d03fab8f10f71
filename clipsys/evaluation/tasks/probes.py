"""Probes: classifiers on frozen image features.

    LabelledVectors --split (or training data of its own)--> train, test
        logistic   logistic regression, C chosen as in the CLIP paper
        mlp        perceptron of one hidden layer
        knn        votes of the nearest neighbours, as in DINO; leave-one-out without training data

Legend of shapes: N images, M test images, D width, C classes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from clipsys.evaluation.metrics.classification import predictions
from clipsys.evaluation.results import Doubles, Integers, Result
from clipsys.evaluation.tasks.knn import KNN_NEIGHBOURS, KNN_TEMPERATURE, neighbour_votes
from clipsys.evaluation.tasks.scoring import Scored, score_classes
from clipsys.evaluation.tasks.splitting import (
    LabelledVectors,
    class_targets,
    group_numbers,
    split,
    split_positions,
    without_leak,
)
from clipsys.evaluation.tasks.trained_probes import (
    DEFAULT_C,
    VALIDATION_SHARE,
    Scorer,
    TrainingPart,
    logistic_regression,
    perceptron,
)

_logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]
Kind = Literal["logistic", "mlp", "knn"]

#: Share of the images that a probe is tested on where there are no training data of its own.
TEST_SHARE = 0.3


@dataclass(frozen=True)
class ProbeSettings:
    """How a probe is trained.

    Attributes:
        kind: which classifier.
        neighbours: voters of ``knn``.
        hidden: width of the hidden layer of ``mlp``.
        seed: of the splits and of the weights of ``mlp``.
    """

    kind: Kind = "logistic"
    neighbours: int = KNN_NEIGHBOURS
    hidden: int = 512
    seed: int = 0


@dataclass(frozen=True)
class FittedProbe:
    """A trained classifier.

    Attributes:
        score: vectors (M, D) -> (M, C) probabilities, or shares of votes.
        described: how it was made, for the protocol.
        counts: settings that were chosen: ``C``, ``epochs``.
    """

    score: Scorer
    described: str
    counts: dict[str, float]


def probe_result(
    train: LabelledVectors,
    test: LabelledVectors | None = None,
    settings: ProbeSettings = ProbeSettings(),
    *,
    model: str = "",
    data: str = "",
) -> Result:
    """Trains a classifier on frozen features and tests it.

    Args:
        train: training data; with no test data, what `TEST_SHARE` is held out of (and for ``knn``,
            where every image is classified by all others).
        test: test data; training images that they show too are left out.

    Raises:
        DataError: a test class has no training image, there is one class only, or a class is too
            small to be split.
    """
    name = data or "the data"
    if test is None and settings.kind == "knn":
        return _leave_one_out(train, settings, model=model, data=data)
    train, test, described = train_and_test(train, test, seed=settings.seed, name=name)
    return Probe(train, settings, model=model, data=data, described=described)(test)


class Probe:
    """A probe trained once, to be tested several times, on corrupted images for instance."""

    def __init__(
        self,
        train: LabelledVectors,
        settings: ProbeSettings = ProbeSettings(),
        *,
        model: str = "",
        data: str = "",
        described: str = "tested on separate data",
    ) -> None:
        """
        Args:
            train: images that the test data do not show, as `train_and_test` gives them.
            described: where the test data come from, for the protocol.

        Raises:
            DataError: there is one class only.
        """
        self._train, self._settings = train, settings
        self._model, self._data, self._described = model, data, described
        classes, self._targets_N, _ = class_targets(train, train, data or "the data")
        self._fitted = fit_probe(train, self._targets_N, len(classes), settings)

    def __call__(self, test: LabelledVectors) -> Result:
        """The figures on test data.

        Raises:
            DataError: a test class has no training image.
        """
        train = self._train
        classes, _, test_M = class_targets(train, test, self._data or "the data")
        scored = score_probe(
            self._fitted, self._targets_N, test, test_M, classes, self._settings.kind
        )
        return Result(
            task="probe",
            variant=self._settings.kind,
            model=self._model,
            data=self._data,
            protocol=f"{self._fitted.described}; {self._described}",
            figures=scored.figures,
            counts=count_images(len(classes), len(train), len(test)) | self._fitted.counts,
            outcomes={"": scored.outcomes},
            details=scored.details,
        )


def score_probe(
    fitted: FittedProbe,
    train_N: Integers,
    test: LabelledVectors,
    test_M: Integers,
    classes: Sequence[str],
    kind: Kind,
) -> Scored:
    """Figures of a trained probe on test data."""
    return score_classes(
        fitted.score(test.vectors_ND),
        test_M,
        classes,
        test.uris,
        test.groups(),
        chance=majority_chance(train_N, test_M),
        calibrated=kind != "knn",
    )


def train_and_test(
    train: LabelledVectors, test: LabelledVectors | None, *, seed: int, name: str
) -> tuple[LabelledVectors, LabelledVectors, str]:
    """Both parts without a leak, and a sentence that says how they came about."""
    if test is None:
        first, second = split(train, TEST_SHARE, seed=seed, name=name)
        return (
            first,
            second,
            f"tested on a stratified {TEST_SHARE:.0%} of the images (seed {seed}), images that "
            "show the same thing on one side",
        )
    kept, dropped = without_leak(train, test)
    if not dropped:
        return kept, test, "tested on separate data"
    said = f"{dropped} training images that the test data show too are left out"
    _logger.warning("%s: %s", name, said)
    return kept, test, f"tested on separate data, {said}"


def fit_probe(
    train: LabelledVectors, train_N: Integers, num_classes: int, settings: ProbeSettings
) -> FittedProbe:
    """Trains on all of ``train``.

    Args:
        train_N: classes to train on, which label noise may have changed.
    """
    if settings.kind == "knn":
        k = settings.neighbours

        def votes(query_MD: Floats) -> Doubles:
            return neighbour_votes(query_MD, train.vectors_ND, train_N, num_classes, k=k)

        return FittedProbe(votes, _knn_sentence(k), {"neighbours": k})
    fit, validation = split_positions(train, VALIDATION_SHARE, seed=settings.seed)
    part = TrainingPart(train.vectors_ND, train_N, fit, validation)
    if settings.kind == "mlp":
        score, epochs = perceptron(part, num_classes, hidden=settings.hidden, seed=settings.seed)
        how = f"perceptron with one hidden layer of {settings.hidden} on unit features, " + (
            f"stopped by the loss on {VALIDATION_SHARE:.0%} of the training data (seed "
            f"{settings.seed})"
            if len(validation)
            else f"trained for {epochs} epochs, as no training image can be held out to stop it by"
        )
        return FittedProbe(score, how, {"epochs": epochs})
    score, c = logistic_regression(part, num_classes)
    how = "logistic regression on unit features, " + (
        f"C by the search of the CLIP paper on {VALIDATION_SHARE:.0%} of the training data (seed "
        f"{settings.seed}), then trained on all of them"
        if len(validation)
        else f"C = {DEFAULT_C:g}, as no training image can be held out to choose it on"
    )
    return FittedProbe(score, how, {"C": c})


def majority_chance(train_N: Integers, test_M: Integers) -> float:
    """Accuracy of always answering the most frequent class of the training data."""
    return float((test_M == np.bincount(train_N).argmax()).mean())


def knn_figures(
    image_ND: Floats, labels: Sequence[str], same: Sequence[object] | None = None
) -> dict[str, float]:
    """Each image is classified by its nearest neighbours among all others.

    A class with as many votes as the right one counts as predicted instead of it.

    Args:
        image_ND: unit norm.
        labels: N.
        same: N values; images of equal value show the same thing and do not vote for each other.
            None: only the image itself does not vote.

    Returns:
        ``accuracy@1``, and the share of the largest class as ``chance_accuracy@1``.
    """
    marks = [(repr(one),) for one in same or range(len(labels))]
    classes, target_N = np.unique(np.asarray(labels), return_inverse=True)
    groups_N = group_numbers(marks)
    votes_NC = neighbour_votes(
        image_ND, image_ND, target_N, len(classes), groups_N=groups_N, groups_M=groups_N
    )
    return {
        "accuracy@1": float(
            (predictions(votes_NC, target_N, classes.tolist()).ranks_N == 0).mean()
        ),
        "chance_accuracy@1": majority_chance(target_N, target_N),
        "classes": len(classes),
        "images": len(labels),
    }


def _leave_one_out(
    images: LabelledVectors, settings: ProbeSettings, *, model: str, data: str
) -> Result:
    name = data or "the data"
    classes, target_N, _ = class_targets(images, images, name)
    groups_N = images.groups()
    votes_NC = neighbour_votes(
        images.vectors_ND,
        images.vectors_ND,
        target_N,
        len(classes),
        k=settings.neighbours,
        groups_N=groups_N,
        groups_M=groups_N,
    )
    scored = score_classes(
        votes_NC,
        target_N,
        classes,
        images.uris,
        groups_N,
        chance=majority_chance(target_N, target_N),
        calibrated=False,
    )
    return Result(
        task="probe",
        variant=settings.kind,
        model=model,
        data=data,
        protocol=f"{_knn_sentence(settings.neighbours)}; every image by all others but those that "
        "show the same thing",
        figures=scored.figures,
        counts={
            "classes": len(classes),
            "images": len(images),
            "neighbours": settings.neighbours,
        },
        outcomes={"": scored.outcomes},
        details=scored.details,
    )


def _knn_sentence(k: int) -> str:
    return f"{k} nearest neighbours vote with weight exp(cosine / {KNN_TEMPERATURE:g})"


def count_images(classes: int, train: int, test: int) -> dict[str, float]:
    """Counts of a result."""
    return {"classes": classes, "images": test, "train_images": train, "test_images": test}
