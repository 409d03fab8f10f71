"""What a report shows, in whatever form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clipsys.evaluation.comparison import Comparison
from clipsys.evaluation.reports.plots import Plot
from clipsys.evaluation.reports.sheets import Sheet
from clipsys.evaluation.reports.tables import figure_cells, shown
from clipsys.evaluation.results import Result

#: Samples that changed which a report lists.
MAX_CHANGES = 50


@dataclass(frozen=True)
class Part:
    """What a report shows of one result or comparison."""

    about: Result | Comparison
    plots: list[Plot]


@dataclass(frozen=True)
class Report:
    """Everything that a report shows.

    Attributes:
        parts: results and comparisons, in their order.
        overview: a plot of all models; None for one model.
        sheets: contact sheets.
        pictures: uri -> JPEG, of all sheets.
        facts: names and values that say where the figures come from.
    """

    parts: list[Part]
    overview: Plot | None
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
        return f"Difference: second less first. p: {' or '.join(tests)}."
    counts = [f"{name} {value:,.6g}" for name, value in about.counts.items()]
    made = [
        f"{name} {value[:12] if name == 'fingerprint' else value}"
        for name, value in about.encoder.items()
    ]
    return ", ".join([*counts, *made])


def table_of(about: Result | Comparison) -> list[list[str]]:
    """Rows of cells, the header first."""
    if isinstance(about, Comparison):
        rows = [
            [
                "figure",
                "first",
                "second",
                "difference",
                "95 % interval",
                "p",
                "only 1st",
                "only 2nd",
            ]
        ]
        for name, one in about.differences.items():
            interval = "-" if one.interval is None else "{:+.4f} to {:+.4f}".format(*one.interval)
            rows.append(
                [
                    name,
                    shown(one.first),
                    shown(one.second),
                    f"{one.value:+.4f}",
                    interval,
                    f"{one.test.p_value:.3g}",
                    str(one.only_first),
                    str(one.only_second),
                ]
            )
        return rows
    header = ["figure", "value", "95 % interval", "samples", "chance"]
    return [header, *([name, *figure_cells(one)] for name, one in about.figures.items())]


def changes_of(about: Result | Comparison) -> list[list[str]]:
    """The samples that changed most, the header first; empty where there are none."""
    if not isinstance(about, Comparison) or not about.changes:
        return []
    rows = [["sample", "right", "first", "second"]]
    for one in about.changes[:MAX_CHANGES]:
        first, second = (one.first_label, one.second_label)
        if not one.expected:
            first, second = f"{one.first:.3g}", f"{one.second:.3g}"
        rows.append([one.key, one.expected or one.figure, first, second])
    return rows
