"""The verb ``clipsys evaluate``, on sources and on collections.

Heavy imports stand inside the functions: this module is loaded to print its help.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from clipsys.commands import options
from clipsys.printing import json_text, printable


class Task(str, Enum):
    """What `evaluate` measures."""

    zeroshot = "zeroshot"
    retrieval = "retrieval"
    probe = "probe"


class QueryCaptions(str, Enum):
    """Which captions of an item are queries."""

    first = "first"
    all = "all"


def evaluate(
    model: Annotated[str, typer.Argument(help="NAME/TAG, hf-hub:…, model folder or run folder.")],
    task: Annotated[Task, typer.Option(help="What to measure.")],
    data: Annotated[str, typer.Option(help="A folder, a table, shards or a collection.")],
    captions: Annotated[
        QueryCaptions, typer.Option(help="retrieval: which captions are queries.")
    ] = QueryCaptions.all,
    match: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", help="retrieval: any item with the same metadata KEY is a hit."
        ),
    ] = None,
    template: options.Template = None,
    classnames: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="zeroshot: names of numbered classes, one a line; default classnames.txt "
            "beside the data.",
        ),
    ] = None,
    path_column: options.PathColumn = "",
    caption_column: options.CaptionColumn = None,
    label_column: options.LabelColumn = "",
    encoding: options.Encoding = "",
    as_json: options.Json = False,
) -> None:
    """Measure a model on labelled or captioned images."""
    from clipsys.evaluation.measuring import measure
    from clipsys.retrieval.commands.records import collection_records

    for option, value, wanted in (
        ("--match", match, Task.retrieval),
        ("--captions", captions is QueryCaptions.first, Task.retrieval),
        ("--template", template, Task.zeroshot),
        ("--classnames", classnames, Task.zeroshot),
    ):
        if value and task is not wanted:
            raise typer.BadParameter(f"{option} is for --task {wanted.value}; leave it out")
    columns = options.columns_of([data], path_column, caption_column, label_column, encoding)
    result = measure(
        model,
        task.value,
        data,
        captions=captions.value,
        match=match,
        templates=template,
        classnames=classnames,
        columns=columns,
        records=collection_records(data),
    )
    if as_json:
        print(json_text(result))
        return
    print(printable(f"{result['task']} of {result['model']} on {result['data']}"))
    for name, value in result["metrics"].items():
        print(f"  {name:36} {value:>10,.4g}")
