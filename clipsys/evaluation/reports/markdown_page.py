"""A report as Markdown, with its pictures in files beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from clipsys.evaluation.reports.contents import (
    Report,
    facts_of,
    heading,
    sentence,
    tables_of,
)
from clipsys.evaluation.reports.sheets import Sheet
from clipsys.printing import printable

#: What means something in Markdown or HTML, or makes a link of an address. Names of figures and
#: most paths have none of it, so that the text can be read as it is.
_MEANING = re.compile(
    r"([\\`*\[\]<>#|~$]"
    r"|(?<![^\W_])_|_(?![^\W_])"  # not within a word
    r"|&(?=#?\w+;)|\{(?=[:#.%{])"
    r"|:(?=//)|(?<=\bwww)\.|(?<=[\w.+-])@(?=[\w-]+\.))",
    re.IGNORECASE,
)


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
    lines += [_picture(plot.title, plot_files[id(plot)]) for plot in report.overviews]
    for part in report.parts:
        lines += [f"## {_text(heading(part.about))}", f"{_text(sentence(part.about.protocol))}"]
        facts = facts_of(part.about)
        lines += [_text(facts)] if facts else []
        figures, *further = tables_of(part.about)
        lines.append(_table(figures.rows))
        lines += [_picture(plot.title, plot_files[id(plot)]) for plot in part.plots]
        for table in further:
            lines += (
                [f"### {table.title}", _table(table.rows)] if table.title else [_table(table.rows)]
            )
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
