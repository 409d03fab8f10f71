"""A report as one HTML page: pictures inside, no script, nothing from a network.

Class names, captions and paths are anybody's text: all of it is escaped.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Sequence
from html import escape

from clipsys.evaluation.reports.canvas import Plot
from clipsys.evaluation.reports.contents import (
    Part,
    Report,
    Table,
    facts_of,
    heading,
    sentence,
    tables_of,
)
from clipsys.evaluation.reports.sheets import Sheet, Tile
from clipsys.printing import printable

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de;
  --paper: #ffffff; --raised: #f6f8fa; --right: #009e73; --wrong: #d55e00; --link: #0969da; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9da7b1; --line: #3d444d; --paper: #0d1117; --raised: #161b22;
    --link: #58a6ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: 1rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .5rem; }
a { color: var(--link); }
p, dl, nav { margin: .4rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .8rem; color: var(--soft);
  font-size: .9rem; }
dt { font-weight: 600; }
dd { margin: 0; }
.protocol, .counts { color: var(--soft); font-size: .92rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .8rem 0;
  overflow-wrap: normal; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
th.words, td.words { text-align: left; }
th.sentences, td.sentences { text-align: left; }
td.sentences { white-space: normal; overflow-wrap: anywhere; min-width: 14rem; max-width: 32rem; }
summary { cursor: pointer; color: var(--link); }
figure { margin: 1rem 0; }
figure img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; padding: 6px;
  border: 1px solid var(--line); }
figcaption { color: var(--soft); font-size: .9rem; }
.row { display: flex; flex-wrap: wrap; gap: .7rem; margin: .7rem 0; }
.sheet.short { display: grid; column-gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 29rem), 1fr)); }
.sheet.long .row { border-top: 1px solid var(--line); padding-top: .7rem; gap: .45rem; }
.sheet.long .tile { width: 6.25rem; }
.sheet.long .tile img { height: 6.25rem; }
.tile { width: 9.2rem; font-size: .82rem; line-height: 1.3; }
.tile.words { align-self: center; padding: .5rem; background: var(--raised); border-radius: 6px; }
.tile.wide { width: 100%; }
.tile.wide img { height: auto; object-fit: contain; }
.tile img { display: block; width: 100%; height: 9.2rem; object-fit: contain;
  background: var(--raised); border: 3px solid transparent; border-radius: 6px;
  margin-bottom: .25rem; }
.tile.right img { border-color: var(--right); }
.tile.wrong img { border-color: var(--wrong); }
.tile.words.right { border-left: 4px solid var(--right); }
.tile.words.wrong { border-left: 4px solid var(--wrong); }
@media (max-width: 30rem) {
  body { padding: 1rem .7rem 3rem; } .tile { width: 6.8rem; } .tile img { height: 6.8rem; }
  th, td { padding: .25rem .45rem; } }
@media print { body { max-width: none; } figure, .row { break-inside: avoid; } }
"""


#: Tiles that stand beside each other on a wide screen.
_A_ROW = 6
#: Letters of a cell that is never broken.
_LONGEST_WORD = 30
#: Of a cell: a number, an interval, or nothing.
_NUMBER = re.compile(r"(?:[-+]?[\d.,]+(?:e[-+]\d+)?(?: to [-+]?[\d.,]+)?|-|never.*|nan)\Z")


def page(report: Report) -> str:
    """The page."""
    sections = [
        (f"part-{number}", heading(part.about)) for number, part in enumerate(report.parts, 1)
    ]
    sections += [(f"sheet-{number}", one.title) for number, one in enumerate(report.sheets, 1)]
    contents = "".join(f'<li><a href="#{name}">{_text(title)}</a></li>' for name, title in sections)
    facts = "".join(
        f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in report.facts.items()
    )
    body = [
        f"<h1>Evaluation</h1><dl>{facts}</dl>",
        f'<nav aria-label="Contents"><ul>{contents}</ul></nav>',
        *(_plot(plot) for plot in report.overviews),
        *(_part(name, part) for (name, _), part in zip(sections, report.parts, strict=False)),
        *(_sheet(f"sheet-{number}", one, report) for number, one in enumerate(report.sheets, 1)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Evaluation</title><style>{_STYLE}</style></head>\n"
        f"<body><main>\n{_joined(body)}\n</main></body></html>\n"
    )


def _part(name: str, part: Part) -> str:
    figures, *further = tables_of(part.about)
    return _joined(
        [
            f'<section id="{name}"><h2>{_text(heading(part.about))}</h2>',
            f'<p class="protocol">{_text(sentence(part.about.protocol))}</p>',
            f'<p class="counts">{_text(facts_of(part.about))}</p>',
            _table(figures),
            *(_plot(plot) for plot in part.plots),
            *(_table(table) for table in further),
            "</section>",
        ]
    )


def _table(table: Table) -> str:
    header, *rows = table.rows
    kinds = [_kind([row[place] for row in rows]) for place in range(len(header))]
    kinds = [f' class="{one}"' if one else "" for one in kinds]
    head = _cells(header, "th", [f' scope="col"{kind}' for kind in kinds])
    lines = [f"<tr>{_cells(row, 'td', kinds)}</tr>" for row in rows]
    text = (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
    title = _text(table.title)
    if table.kind == "folded":
        return f"<details><summary>{title}</summary>{text}</details>"
    return f"<h3>{title}</h3>{text}" if title else text


def _cells(cells: Sequence[str], tag: str, attributes: Sequence[str]) -> str:
    pairs = zip(cells, attributes, strict=True)
    return "".join(f"<{tag}{attribute}>{_text(cell)}</{tag}>" for cell, attribute in pairs)


def _kind(column: Sequence[str]) -> str:
    """How a column is set: numbers to the right, names to the left, long texts broken."""
    if all(_NUMBER.match(cell) for cell in column):
        return ""
    return "words" if max(map(len, column)) <= _LONGEST_WORD else "sentences"


def _plot(plot: Plot) -> str:
    source = _inline(plot.png, "png")
    title = _text(plot.title)
    return f'<figure><img src="{source}" alt="{title}"><figcaption>{title}</figcaption></figure>'


def _sheet(name: str, sheet: Sheet, report: Report) -> str:
    rows = [
        f'<div class="row">{"".join(_tile(tile, report) for tile in row)}</div>'
        for row in sheet.rows
    ]
    longest = max(map(len, sheet.rows), default=0)
    single = any(tile.image is not None for row in sheet.rows for tile in row)
    kind = "long" if longest > _A_ROW else "short" if longest <= _A_ROW // 2 and not single else ""
    return _joined(
        [
            f'<section id="{name}"><h2>{_text(sheet.title)}</h2>',
            f'<p class="protocol">{_text(sheet.note)}</p>',
            f'<div class="sheet {kind}">',
            *rows,
            "</div></section>",
        ]
    )


def _tile(tile: Tile, report: Report) -> str:
    words = "<br>".join(_text(line) for line in tile.lines)
    kinds = ["tile", *([tile.mark] if tile.mark else [])]
    picture = ""
    if tile.image is not None:
        buffer = io.BytesIO()
        tile.image.save(buffer, "PNG")
        picture = f'<img src="{_inline(buffer.getvalue(), "png")}" alt="">'
        kinds.append("wide")
    elif tile.uri in report.pictures:
        source = _inline(report.pictures[tile.uri], "jpeg")
        picture = f'<img src="{source}" alt="" title="{_text(tile.uri)}">'
    else:
        kinds.append("words")
    return f'<div class="{" ".join(kinds)}">{picture}{words}</div>'


def _inline(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _text(text: str) -> str:
    return escape(printable(text), quote=True)


def _joined(parts: Iterable[str]) -> str:
    return "\n".join(part for part in parts if part)
