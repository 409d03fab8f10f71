"""Classes and prompts of a zero-shot classification, from labelled images."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipsys.evaluation.class_names import class_names, prompt_templates
from clipsys.evaluation.results import Floats
from clipsys.zeroshot.class_vectors import mean_vectors
from clipsys.zeroshot.templates import DEFAULT_TEMPLATES, find_templates

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassQuestion:
    """What a zero-shot classification of a data set asks.

    Attributes:
        labels: C labels, sorted.
        names: C names, as people read them and as they go into the prompts.
        templates: sentences with ``{}`` for the name.
    """

    labels: list[str]
    names: list[str]
    templates: list[str]

    @property
    def prompts(self) -> list[str]:
        """The texts to encode, class by class."""
        return [one.replace("{}", name) for name in self.names for one in self.templates]

    def vectors(self, text_MD: Floats) -> Floats:
        """One unit vector a class, of the vectors of `prompts`."""
        return mean_vectors(text_MD, [len(self.templates)] * len(self.names))


def class_question(
    labels: Sequence[str],
    places: Iterable[Path],
    *,
    known: Sequence[str] = (),
    classnames: str | None = None,
    templates: str | Sequence[str] | None = None,
    setting: str = "--classnames",
) -> tuple[ClassQuestion, list[str]]:
    """Decides on the classes and prompts of labelled images, and on the class of each image.

    Labels with the same name (two of ImageNet's) are one class: no prompt tells them apart.

    Args:
        labels: of all images.
        places: folders in which class names and templates may lie, and in their parents.
        known: names of the classes that the data bring themselves; labels are these.
        classnames: a file with the names of numbered classes.
        templates: sentences, or the name of a set; None: those beside the data, or ``simple``.
        setting: how the user names a file of class names, for messages.

    Returns:
        The question, and the label of each image among those of the question.

    Raises:
        DataError: labels are numbers and nothing says their names.
        ConfigError: a template has no place for the name.
    """
    places = list(places)
    if known and classnames is None:
        names = {name: name for name in dict.fromkeys(known)} | {one: one for one in labels}
    else:
        names = class_names(labels, places, file=classnames, setting=setting)
    names = {label: name.strip() for label, name in names.items()}
    first_of: dict[str, str] = {}
    for label in sorted(names):
        other = first_of.setdefault(names[label], label)
        if other != label:
            _logger.warning(
                "labels %s and %s are both called %r, and count as one class",
                *(other, label, names[label]),
            )
    classes = sorted(first_of.values())
    given = templates if templates is not None else prompt_templates(places) or DEFAULT_TEMPLATES
    question = ClassQuestion(classes, [names[one] for one in classes], find_templates(given))
    return question, [first_of[names[label]] for label in labels]
