"""What ``clipsys search`` prints: hits as a table, JSON, CSV or paths alone."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

import typer

from clipsys.printing import json_text, print_paths, print_rows, printable

if TYPE_CHECKING:
    from clipsys.retrieval.search.query import Hit

_COLUMNS = (
    "query", "rank", "id", "score", "relevance", "uri", "caption", "metadata", "duplicates",
)  # fmt: skip


class Format(Enum):
    """How hits are printed."""

    table = "table"
    json = "json"
    csv = "csv"
    paths = "paths"
    paths0 = "paths0"


@dataclass(frozen=True)
class Answer:
    """A query in the words of the user, and what came of it.

    Attributes:
        query: None where only options said what to look for.
        hits: best first, or as sorted.
        error: why it cannot be answered.
        note: what is to be known about the hits, or about there being none.
    """

    query: str | None
    hits: list[Hit] = field(default_factory=list)
    error: str | None = None
    note: str | None = None

    def to_dict(self) -> dict[str, object]:
        """The JSON form; `error` and `note` only where there is one."""
        document: dict[str, object] = {
            "query": self.query,
            "hits": [hit.to_dict() for hit in self.hits],
        }
        for name, text in (("error", self.error), ("note", self.note)):
            if text is not None:
                document[name] = text
        return document


def print_answers(answers: Sequence[Answer], how: Format, *, batch: bool) -> None:
    """Prints hits on stdout, and notes on stderr."""
    if how is Format.json:
        documents = [answer.to_dict() for answer in answers]
        typer.echo(json_text(documents if batch else documents[0]))
    elif how is Format.csv:
        _print_csv(answers)
    elif how in (Format.paths, Format.paths0):
        uris = [hit.uri for answer in answers for hit in answer.hits]
        print_paths(uris, separator="\0" if how is Format.paths0 else "\n")
    for answer in answers:
        if how is Format.table:
            _print_table(answer, with_query=batch)
        note = answer.note
        if note is None and how is Format.table and not answer.hits and answer.error is None:
            note = "no hits"
        if note is not None:
            about = f"{answer.query}: " if batch else ""
            typer.echo(printable(f"{about}{note}"), err=True)


def _print_csv(answers: Sequence[Answer]) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for answer in answers:
        for hit in answer.hits:
            row = [
                answer.query,
                hit.rank,
                hit.id,
                hit.score,
                hit.relevance,
                hit.uri,
                hit.caption,
                json.dumps(dict(hit.metadata), ensure_ascii=False),
                " ".join(map(str, hit.duplicates)),
            ]
            # Line breaks inside a cell are CSV's own business: it has quotation marks for them.
            writer.writerow(
                [printable(cell, keep="\n\t") if isinstance(cell, str) else cell for cell in row]
            )
    typer.echo(buffer.getvalue(), nl=False)


def _print_table(answer: Answer, *, with_query: bool) -> None:
    if with_query and answer.error is None:
        typer.echo(printable(answer.query))
    if not answer.hits:
        return
    rows = [
        (
            hit.rank,
            hit.id,
            "" if hit.score is None else f"{hit.score:.3f}",
            "" if hit.relevance is None else f"{hit.relevance:+.1f}",
            hit.uri,
            _text(hit),
        )
        for hit in answer.hits
    ]
    print_rows(("rank", "id", "score", "relevance", "image", "caption"), rows, numeric=4)


def _text(hit: Hit) -> str:
    more = f"(and {len(hit.duplicates)} like it) " if hit.duplicates else ""
    return f"{more}{hit.caption or ''}".strip()
