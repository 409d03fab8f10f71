"""The verb ``clipsys search``.

Heavy imports stand inside the functions: this module is loaded to print its help.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional, TypeAlias

import typer

if TYPE_CHECKING:
    from clipsys.retrieval.search.query import Hit, Part, Query
    from clipsys.retrieval.search.searching import Options

#: What was asked in the words of the user, and the hits.
Answer: TypeAlias = "tuple[str | None, list[Hit]]"


def search(
    collection: Annotated[Path, typer.Argument(help="Folder of the collection.")],
    query: Annotated[
        Optional[str],  # noqa: UP045  (typer evaluates annotations on Python 3.10 as well)
        typer.Argument(
            help="What to look for: 'a dog', 'a dog + 0.5*beach - snow', 'item:12', "
            "'image:PATH - people'; signs stand between spaces."
        ),
    ] = None,
    *,
    image: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(help="An image to look for. May be repeated."),
    ] = None,
    like: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option(metavar="ID", help="More like this item. May be repeated."),
    ] = None,
    negative: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--not", help="What the hits should be unlike, as in QUERY. May be repeated."),
    ] = None,
    words: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Words of the captions, alone or fused with the rest: 'dog -brown', "
            "'\"on the beach\"', 'surf*'."
        ),
    ] = None,
    where: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="Only items whose metadata match: K=V, K!=V, K<V, K<=V, K>V, K>=V, "
            "'K in A,B', 'K contains V'. May be repeated."
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Number of hits.")] = 10,
    offset: Annotated[int, typer.Option(min=0, help="Hits to leave out before these.")] = 0,
    min_score: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Cosine below which nothing is a hit."),
    ] = None,
    relevant_only: Annotated[
        bool,
        typer.Option("--relevant-only", help="Only what stands out from the rest, if anything."),
    ] = False,
    diverse: Annotated[
        bool, typer.Option("--diverse", help="Fold near-duplicates into one hit.")
    ] = False,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Where the collection's model lies, if not where it was."),
    ] = None,
    queries: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="A file with a QUERY a line, answered together; - reads them here."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, a hit a row.")] = False,
) -> None:
    """Searches a collection by text, image, item and caption words."""
    from clipsys.errors import QueryError
    from clipsys.retrieval.collection import Collection
    from clipsys.retrieval.search.searching import NEAR_DUPLICATE, Options
    from clipsys.retrieval.storage.filters import parse_where

    if as_json and as_csv:
        raise typer.BadParameter("give one of --json and --csv")
    options = Options(
        k,
        offset,
        parse_where(where or None),
        min_score,
        relevant_only,
        NEAR_DUPLICATE if diverse else None,
    )
    others = [*(image or ()), *(like or ()), *(negative or ())]
    if queries is not None:
        if query is not None or others or words is not None:
            raise QueryError("--queries stands alone: write the parts of each query in its line")
        asked: list[str | None] = [*_lines(queries)]
        wanted: list[str | Query] = [line for line in asked if line is not None]
    else:
        asked = [query]
        wanted = [_compose(query, image or (), like or (), negative or (), words)]
    with Collection.open(collection, few_searches=queries is None, model=model) as photos:
        answers = list(zip(asked, photos.search_batch(wanted, options), strict=True))
    _print(answers, options, batch=queries is not None, as_json=as_json, as_csv=as_csv)


def _compose(
    query: str | None,
    images: Sequence[Path],
    items: Sequence[int],
    negatives: Sequence[str],
    words: str | None,
) -> Query:
    from clipsys.retrieval.search.grammar import parse_part, parse_query
    from clipsys.retrieval.search.query import Part, Query

    parts: list[Part] = list(parse_query(query).parts) if query is not None else []
    parts += [Part(image=path) for path in images]
    parts += [Part(item=item) for item in items]
    parts += [parse_part(text, -1) for text in negatives]
    return Query(tuple(parts), words)


def _lines(path: Path) -> Iterator[str]:
    import sys

    from clipsys.errors import QueryError

    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise QueryError(f"{path}: the queries cannot be read ({reason})") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise QueryError(f"{path}: there are no queries; write one a line")
    yield from lines


def _print(
    answers: Sequence[Answer], options: Options, *, batch: bool, as_json: bool, as_csv: bool
) -> None:
    if as_csv:
        _print_csv(answers)
        return
    if as_json:
        import json

        documents = [
            {"query": query, "hits": [hit.to_dict() for hit in hits]} for query, hits in answers
        ]
        typer.echo(json.dumps(documents if batch else documents[0], indent=2))
        return
    for query, hits in answers:
        if batch:
            typer.echo(query)
        if hits:
            _print_table(hits)
        else:
            hint = "; without --relevant-only there are some" if options.relevant_only else ""
            typer.echo(f"no hits{hint}", err=True)


def _print_csv(answers: Sequence[Answer]) -> None:
    import csv
    import io
    import json

    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["query", "rank", "id", "score", "relevance", "uri", "caption", "metadata", "duplicates"]
    )
    for query, hits in answers:
        for hit in hits:
            row = [
                query,
                hit.rank,
                hit.id,
                hit.score,
                hit.relevance,
                hit.uri,
                hit.caption,
                json.dumps(dict(hit.metadata), ensure_ascii=False),
                " ".join(map(str, hit.duplicates)),
            ]
            writer.writerow(row)
    typer.echo(_printable(buffer.getvalue()), nl=False)


def _print_table(hits: Sequence[Hit]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("rank", "id", "score", "stands out"):
        table.add_column(name, justify="right")
    table.add_column("image", overflow="fold")
    table.add_column("caption")
    for hit in hits:
        more = f" (and {len(hit.duplicates)} like it)" if hit.duplicates else ""
        cells = (
            str(hit.rank),
            str(hit.id),
            "" if hit.score is None else f"{hit.score:.3f}",
            "" if hit.relevance is None else f"{hit.relevance:+.1f}",
            f"{hit.uri}{more}",
            hit.caption or "",
        )
        # Text, not str: brackets in a file name are not rich's markup.
        table.add_row(*(Text(_printable(cell)) for cell in cells))
    Console().print(table)


def _printable(text: str) -> str:
    """Names of files that are not UTF-8 hold what a terminal cannot print."""
    return text.encode("utf-8", "replace").decode("utf-8")
