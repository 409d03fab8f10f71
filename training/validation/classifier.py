"""The classifier that an objective trains, on held-out samples with labels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from clipsys.errors import DataError, SampleError
from clipsys.evaluation.metrics.classification import flat_figures, predictions
from clipsys.evaluation.tasks.retrieval import Floats
from clipsys.shards.samples import Sample
from clipsys.training.data.samples import label_of
from clipsys.training.distributed.collectives import rank
from clipsys.training.model.outputs import Inputs
from clipsys.training.model.towers import Towers

_logger = logging.getLogger(__name__)


class Classifier(NamedTuple):
    """What is measured.

    Attributes:
        scores: from towers and inputs to (B, C) logits.
        classes: C labels, in the order of their numbers.
        label_key: metadata key of the label; None is the ``.cls`` member.
        needs_caption: whether a sample without a text cannot be classified.
    """

    scores: Callable[[Towers, Inputs], torch.Tensor]
    classes: tuple[str, ...]
    label_key: str | None
    needs_caption: bool


class ClassifiedSamples(NamedTuple):
    """Rows of the held-out samples that can be judged, and the number of the class of each."""

    rows: list[int]
    numbers: list[int]


def classified_samples(samples: Sequence[Sample], classifier: Classifier) -> ClassifiedSamples:
    """The samples that have what the classifier is judged by.

    Raises:
        DataError: none has.
    """
    numbers = {name: number for number, name in enumerate(classifier.classes)}
    found = ClassifiedSamples([], [])
    first = ""
    for row, sample in enumerate(samples):
        try:
            label = label_of(sample, classifier.label_key, f"sample {sample.key}")
        except SampleError as error:
            first = first or str(error)
            continue
        if label not in numbers:
            first = first or f"sample {sample.key}: {label!r} is none of the classes"
        elif classifier.needs_caption and not sample.captions:
            first = first or f"sample {sample.key} has no text"
        else:
            found.rows.append(row)
            found.numbers.append(numbers[label])
    if not found.rows:
        raise DataError(f"evaluation.classifier: no sample of data.validation can be used; {first}")
    if first and rank() == 0:
        _logger.warning(
            "evaluation.classifier: %d of %d samples of data.validation cannot be used; the "
            "first: %s",
            *(len(samples) - len(found.rows), len(samples), first),
        )
    return found


def classifier_figures(
    scores_NC: Floats, samples: ClassifiedSamples, classifier: Classifier
) -> dict[str, float]:
    """Accuracy, and precision, recall and F1 over classes, by name.

    Args:
        scores_NC: of all held-out samples.
        samples: which of them count, with the numbers of their classes.
        classifier: what was measured.
    """
    found = predictions(scores_NC[np.asarray(samples.rows)], samples.numbers, classifier.classes)
    figures = {**flat_figures(found), "samples": float(len(samples.rows))}
    return {f"classifier/{name}": value for name, value in figures.items()}
