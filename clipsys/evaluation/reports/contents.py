"""What a report shows, in whatever form."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clipsys.evaluation.comparison import Comparison
from clipsys.evaluation.reports.canvas import Plot
from clipsys.evaluation.reports.sheets import Sheet
from clipsys.evaluation.reports.tables import (
    difference_cells,
    figures_table,
    grid_table,
    has_grid,
    only_cells,
    spread_changes,
)
from clipsys.evaluation.results import ClassificationDetails, Result

#: Samples that changed which a report lists.
MAX_CHANGES = 30
#: Pairs of classes that a report names of a confusion matrix.
MAX_CONFUSIONS = 10


@dataclass(frozen=True)
class Part:
    """What a report shows of one result or comparison."""

    about: Result | Comparison
    plots: list[Plot]


@dataclass(frozen=True)
class Table:
    """Rows of cells.

    Attributes:
        title: may be empty.
        rows: the header first.
        kind: ``folded``: shown on demand, where the form of the report can.
    """

    title: str
    rows: list[list[str]]
    kind: str = ""


@dataclass(frozen=True)
class Report:
    """Everything that a report shows.

    Attributes:
        parts: results and comparisons, in their order.
        overviews: plots of all models, one for each task of several.
        sheets: contact sheets.
        pictures: uri -> JPEG, of all sheets.
        facts: names and values that say where the figures come from.
    """

    parts: list[Part]
    overviews: list[Plot]
    sheets: Sequence[Sheet]
    pictures: dict[str, bytes]
    facts: dict[str, str]


def heading(about: Result | Comparison) -> str:
    """The title of a part."""
    if isinstance(about, Comparison):
        return f"{about.task}: {about.second} against {about.first}"
    return f"{about.title}: {about.model} on {about.data}"


def sentence(text: str) -> str:
    """A protocol as a sentence."""
    return f"{text[:1].upper()}{text[1:]}."


def facts_of(about: Result | Comparison) -> str:
    """The counts of a result in one line; the tests of a comparison."""
    if isinstance(about, Comparison):
        tests = sorted({one.test.name for one in about.differences.values()})
        return (
            f"Difference: second less first. p: {' or '.join(tests)}. Only: samples that one model "
            "alone got right."
        )
    counts = [f"{name} {value:,.6g}" for name, value in about.counts.items()]
    made = [
        f"{name} {value[:12] if name == 'fingerprint' else value}"
        for name, value in about.encoder.items()
    ]
    return ", ".join([*counts, *made])


def tables_of(about: Result | Comparison) -> list[Table]:
    """The tables of a result or a comparison; the first one has its figures."""
    if isinstance(about, Comparison):
        tables = [Table("", _differences(about)), _changes(about)]
    elif has_grid(about):
        whole = figures_table(about, whole=True)
        tables = [
            Table("", figures_table(about)),
            Table("", grid_table(about)),
            Table("All figures", whole, "folded"),
        ]
    else:
        tables = [Table("", figures_table(about))]
        if isinstance(about.details, ClassificationDetails):
            tables.append(Table("Most frequent confusions", _confusions(about.details)))
    return [one for one in tables if len(one.rows) > 1]


def _differences(about: Comparison) -> list[list[str]]:
    rows = [
        ["figure", "first", "second", "difference", "95 % interval", "p", "only 1st", "only 2nd"]
    ]
    for name, one in about.differences.items():
        rows.append([name, *difference_cells(one), *only_cells(one)])
    return rows


def _changes(about: Comparison) -> Table:
    """Samples that changed; the folder that all are in stands in the title."""
    changes = spread_changes(about.changes)[:MAX_CHANGES]
    classes = any(one.expected for one in changes)
    shared = os.path.commonprefix([one.key for one in changes])  # noqa: RUF071  (cut at a slash)
    folder, slash, _ = shared.rpartition("/")
    rows = [["sample", "right" if classes else "figure", "first", "second"]]
    for one in changes:
        first, second = one.first_label, one.second_label
        if not one.expected:
            first, second = f"{one.first:.3g}", f"{one.second:.3g}"
        key = one.key.removeprefix(f"{folder}{slash}")
        rows.append([key, one.expected or one.figure, first, second])
    return Table(f"Samples that changed, in {folder}" if folder else "Samples that changed", rows)


def _confusions(details: ClassificationDetails) -> list[list[str]]:
    wrong_CC = details.confusion_CC - np.diag(np.diag(details.confusion_CC))
    order = np.argsort(-wrong_CC, axis=None, kind="stable")[:MAX_CONFUSIONS]
    rows = [["class", "predicted as", "images", "of"]]
    for true, predicted in zip(*np.unravel_index(order, wrong_CC.shape), strict=True):
        if wrong_CC[true, predicted]:
            names = details.classes[true], details.classes[predicted]
            counts = wrong_CC[true, predicted], details.support_C[true]
            rows.append([*names, *(f"{count:,}" for count in counts)])
    return rows
