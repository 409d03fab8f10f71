"""A report as Markdown, with its pictures in files beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from clipsys.evaluation.reports.contents import (
    Report,
    changes_of,
    facts_of,
    heading,
    sentence,
    table_of,
)
from clipsys.evaluation.reports.sheets import Sheet
from clipsys.printing import printable

#: Characters that mean something in Markdown or HTML.
_MEANING = re.compile(r"([\\`*_{}\[\]<>()#+!|~$&])")


def document(
    report: Report,
    plot_files: Mapping[int, str],
    files: Mapping[str, str],
    pictures: Mapping[int, str],
) -> str:
    """The report as one text.

    Args:
        report: what it shows.
        plot_files: ``id`` of a plot -> its file.
        files: uri of an image -> the file of its thumbnail.
        pictures: ``id`` of a tile with a picture of its own -> its file.
    """
    blocks = [
        "# Evaluation",
        *(f"- {name}: {_text(value)}" for name, value in report.facts.items()),
    ]
    lines = ["\n".join(blocks)]
    if report.overview is not None:
        lines.append(_picture(report.overview.title, plot_files[id(report.overview)]))
    for part in report.parts:
        lines += [f"## {_text(heading(part.about))}", f"{_text(sentence(part.about.protocol))}"]
        facts = facts_of(part.about)
        lines += [_text(facts)] if facts else []
        lines.append(_table(table_of(part.about)))
        lines += [_picture(plot.title, plot_files[id(plot)]) for plot in part.plots]
        changes = changes_of(part.about)
        if changes:
            lines += ["### Samples that changed", _table(changes)]
    for sheet in report.sheets:
        lines += [f"## {_text(sheet.title)}", _text(sheet.note), _sheet(sheet, files, pictures)]
    return "\n\n".join(lines) + "\n"


def _sheet(sheet: Sheet, files: Mapping[str, str], pictures: Mapping[int, str]) -> str:
    columns = max(map(len, sheet.rows), default=0)
    rows = [["" for _ in range(columns)]]
    for row in sheet.rows:
        cells = []
        for tile in row:
            file = pictures.get(id(tile)) or files.get(tile.uri)
            words = "<br>".join(_text(line) for line in tile.lines)
            cells.append(f"![]({file})<br>{words}" if file else words)
        rows.append(cells + [""] * (columns - len(cells)))
    return _rows(rows)


def _table(rows: Sequence[Sequence[str]]) -> str:
    return _rows([[_text(cell) for cell in row] for row in rows])


def _rows(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, f"|{' --- |' * len(rows[0])}")
    return "\n".join(lines)


def _picture(title: str, file: str) -> str:
    return f"![{_text(title)}]({file})"


def _text(text: str) -> str:
    return _MEANING.sub(r"\\\1", printable(text))
