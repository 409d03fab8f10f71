"""The verb ``clipsys search``.

Heavy imports stand inside the functions: this module is loaded to print its help.
"""

from __future__ import annotations

import codecs
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipsys.commands import options
from clipsys.printing import printable
from clipsys.retrieval.commands.hits import Answer, Format, print_answers

if TYPE_CHECKING:
    from clipsys.retrieval.collection import Collection
    from clipsys.retrieval.search.options import Options
    from clipsys.retrieval.search.query import Hit, Part, Query


def search(
    collection: options.CollectionFolder,
    query: Annotated[
        str | None,
        typer.Argument(
            help="What to look for: 'a dog', 'a dog + 0.5*beach - snow', 'item:12', "
            "'image:PATH - people'; signs stand between spaces."
        ),
    ] = None,
    *,
    image: Annotated[
        list[Path] | None, typer.Option(help="An image to look for. May be repeated.")
    ] = None,
    like: Annotated[
        list[int] | None, typer.Option(metavar="ID", help="More like this item. May be repeated.")
    ] = None,
    negative: Annotated[
        list[str] | None,
        typer.Option("--not", help="What the hits should be unlike, as in QUERY. May be repeated."),
    ] = None,
    words: Annotated[
        str | None,
        typer.Option(
            help="Words of the captions and file names, alone or fused with the rest: "
            "'dog -brown', '\"on the beach\"', 'surf*'."
        ),
    ] = None,
    where: options.Where = None,
    sort: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="Put the hits in the order of a metadata key, -KEY for descending; also uri, "
            "caption, added, modified. With --relevant-only or --min-score all that they leave, "
            "otherwise the best -k.",
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Number of hits.")] = 10,
    offset: Annotated[int, typer.Option(min=0, help="Hits to leave out before these.")] = 0,
    min_score: Annotated[
        float | None, typer.Option(help="Cosine below which nothing is a hit.")
    ] = None,
    relevant_only: Annotated[
        bool,
        typer.Option(
            "--relevant-only",
            help="Only hits of a relevance that chance hardly explains. Where there is none, the "
            "scores do not tell whether anything matches.",
        ),
    ] = False,
    diverse: Annotated[
        bool, typer.Option("--diverse", help="Fold near-duplicates into one hit.")
    ] = False,
    model: options.MovedModel = None,
    queries: Annotated[
        Path | None,
        typer.Option(
            help="A file with a QUERY a line, answered together; - reads them here. A line that "
            "cannot be answered is named, and the exit status is 1."
        ),
    ] = None,
    as_json: options.Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, a hit a row.")] = False,
    paths: options.Paths = False,
    paths0: options.Paths0 = False,
) -> None:
    """Search a collection by text, image, item and words; list what passes a filter.

    Into a pipe, a hit is one line whose cells are separated by tabs.
    """
    from clipsys.errors import QueryError
    from clipsys.retrieval.collection import Collection
    from clipsys.retrieval.search.options import NEAR_DUPLICATE, Options
    from clipsys.retrieval.storage.conditions import parse_where

    given = {"json": as_json, "csv": as_csv, "paths": paths, "paths0": paths0}
    options.one_of(**given)
    how = Format(next((name for name, is_given in given.items() if is_given), "table"))
    asked = Options(
        k,
        offset,
        parse_where(where or None),
        min_score,
        relevant_only,
        NEAR_DUPLICATE if diverse else None,
        sort,
    )
    others = [*(image or ()), *(like or ()), *(negative or ())]
    if queries is not None and (query is not None or others or words is not None):
        raise QueryError("--queries stands alone: write the parts of each query in its line")
    lines = _lines(queries) if queries is not None else []
    composed = _compose(query, image or (), like or (), negative or (), words)
    with Collection.open(collection, few_searches=queries is None, model=model) as photos:
        if queries is None:
            (hits,) = photos.search_batch([composed], asked)
            answers = [Answer(query, hits, note=photos.doubt(composed, hits, asked))]
        else:
            answers = _answer_lines(photos, queries, lines, asked)
    print_answers(answers, how, batch=queries is not None)
    if any(answer.error is not None for answer in answers):
        raise typer.Exit(1)


def _compose(
    query: str | None,
    images: Sequence[Path],
    items: Sequence[int],
    negatives: Sequence[str],
    words: str | None,
) -> Query | None:
    """The query of the command line; None where nothing says what to look for."""
    from clipsys.retrieval.search.grammar import parse_part, parse_query
    from clipsys.retrieval.search.query import Part, Query

    parts: list[Part] = list(parse_query(query).parts) if query is not None else []
    parts += [Part(image=path) for path in images]
    parts += [Part(item=item) for item in items]
    parts += [parse_part(text, -1) for text in negatives]
    return Query(tuple(parts), words) if parts or words is not None else None


# ---- a file of queries -------------------------------------------------------------------------


def _lines(path: Path) -> list[tuple[int, str | None]]:
    """Lines of a file that are not blank, with their numbers; None for one that is no UTF-8 text.

    Raises:
        QueryError: the file cannot be read, is no text, or has no line.
    """
    from clipsys.errors import QueryError
    from clipsys.files.regular import read_named

    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else read_named(path.expanduser())
    except OSError as error:
        raise QueryError(f"{path}: the queries cannot be read ({error.strerror})") from error
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        data = data.decode("utf-16", "replace").encode()
    lines = data.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    filled = [(n, line.strip()) for n, line in enumerate(lines.split(b"\n"), 1) if line.strip()]
    if not filled:
        raise QueryError(f"{path}: there are no queries; write one a line")
    read = [(number, _text_of(line)) for number, line in filled]
    num_bad = sum(line is None for _, line in read)
    if b"\0" in data and (read[0][1] is None or 2 * num_bad > len(read)):  # an image, say
        raise QueryError(f"{path}: the queries cannot be read (it is no text)")
    return read


def _text_of(line: bytes) -> str | None:
    try:
        return None if b"\0" in line else line.decode("utf-8").strip()
    except UnicodeDecodeError:
        return None


def _answer_lines(
    photos: Collection, path: Path, lines: Sequence[tuple[int, str | None]], asked: Options
) -> list[Answer]:
    """Answers in the order of the lines; names those that cannot be answered on stderr.

    Raises:
        QueryError: all fail for the same reason, which is so not theirs.
    """
    from clipsys.errors import QueryError
    from clipsys.retrieval.search.grammar import parse_query

    read: dict[int, Query] = {}
    found: dict[int, list[Hit] | str] = {}
    for number, line in lines:
        try:
            if line is None:
                raise QueryError("the line is not UTF-8 text")
            read[number] = parse_query(line)
        except QueryError as error:
            found[number] = str(error)
    found |= _search_all(photos, list(read.items()), asked)
    failures = [outcome for outcome in found.values() if isinstance(outcome, str)]
    if len(failures) == len(lines) > 1 and len(set(failures)) == 1:
        raise QueryError(failures[0])
    answers = []
    for number, line in lines:
        outcome = found[number]
        if isinstance(outcome, str):
            print(f"error: {printable(f'{path}:{number}: {outcome}')}", file=sys.stderr)
            answers.append(Answer(line, error=outcome))
        else:
            note = photos.doubt(read[number], outcome, asked)
            answers.append(Answer(line, outcome, note=note))
    return answers


def _search_all(
    photos: Collection, queries: Sequence[tuple[int, Query]], asked: Options
) -> dict[int, list[Hit] | str]:
    """Hits by line, or why there are none: a batch that fails is halved down to the culprit."""
    from clipsys.errors import ImageDecodeError, QueryError

    try:
        hits = photos.search_batch([query for _, query in queries], asked)
    except (QueryError, ImageDecodeError) as error:
        if len(queries) == 1:
            return {queries[0][0]: str(error)}
        middle = len(queries) // 2
        halves = (queries[:middle], queries[middle:])
        return {n: one for half in halves for n, one in _search_all(photos, half, asked).items()}
    return dict(zip((number for number, _ in queries), hits, strict=True))
