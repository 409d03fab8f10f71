"""How the tasks of an evaluation measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from clipsys.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corruptions_of
from clipsys.evaluation.encoding import Decode
from clipsys.evaluation.tasks.probes import Kind
from clipsys.evaluation.tasks.retrieval import Captions, Duplicates
from clipsys.zeroshot.templates import find_templates

#: Tasks that measure a model by themselves; `robustness` measures one of them.
BasicTask = Literal["zeroshot", "retrieval", "probe"]
Task = Literal["zeroshot", "retrieval", "probe", "robustness"]


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """How tasks measure.

    Attributes:
        captions: retrieval: whether every caption is a query, or the first of each image.
        match: metadata key; images of equal value are hits of each other (retrieval), and stay on
            one side of a split or do not vote for each other (probe).
        duplicates: retrieval: whether images of equal content and images with an equal caption are
            correct too (``equal``), or only those that a caption was written for (``own``).
        templates: zero-shot: prompts with ``{}`` for the class, or the name of a set; None: those
            beside the data, or ``simple``.
        classnames: zero-shot: a file with the names of numbered classes, one a line.
        probes: probe: the classifiers that are trained.
        shots: probe: images of each class, for the few-shot curve; empty: no curve.
        seeds: probe: draws of few-shot images.
        label_noise: probe: shares of wrong training labels, for a curve; empty: no curve.
        on: robustness: the task that is measured on corrupted images.
        corruptions, severities: robustness: those that are measured.
        decode: ``exact``, or ``fast`` (large JPEGs at a fraction of their size).
        num_processes: that encode images together; figures do not depend on it.

    Raises:
        ConfigError: a corruption, a severity or a set of templates does not exist.
    """

    captions: Captions = "all"
    match: str | None = None
    duplicates: Duplicates = "equal"
    templates: str | Sequence[str] | None = None
    classnames: str | None = None
    probes: Sequence[Kind] = ("logistic",)
    shots: Sequence[int] = ()
    seeds: int = 5
    label_noise: Sequence[float] = ()
    on: BasicTask = "zeroshot"
    corruptions: Sequence[str] = tuple(CORRUPTIONS)
    severities: Sequence[int] = SEVERITIES
    decode: Decode = "exact"
    num_processes: int = 1

    def __post_init__(self) -> None:
        corruptions_of(self.corruptions, self.severities)
        if self.templates is not None:
            find_templates(self.templates)
