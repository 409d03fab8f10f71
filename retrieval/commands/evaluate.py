"""The verb ``clipsys evaluate``, on sources and on collections.

Heavy imports stand inside the functions: this module is loaded to print its help.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from clipsys.commands import options
from clipsys.processes.interruption import ending_in_order

_Number = TypeVar("_Number", int, float)


class Task(str, Enum):
    """What `evaluate` measures."""

    zeroshot = "zeroshot"
    retrieval = "retrieval"
    probe = "probe"
    robustness = "robustness"
    compare = "compare"
    neighbours = "neighbours"


class BasicTask(str, Enum):
    """What `robustness` and `compare` measure."""

    zeroshot = "zeroshot"
    retrieval = "retrieval"
    probe = "probe"


class QueryCaptions(str, Enum):
    """Which captions of an item are queries."""

    first = "first"
    all = "all"


class Duplicates(str, Enum):
    """What is correct besides the image that a caption was written for."""

    equal = "equal"
    own = "own"


class Probe(str, Enum):
    """Which classifier is trained on frozen features."""

    logistic = "logistic"
    mlp = "mlp"
    knn = "knn"


class Decode(str, Enum):
    """How images are decoded."""

    exact = "exact"
    fast = "fast"


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL", help="NAME/TAG, hf-hub:…, model folders, run folders."),
    ],
    task: Annotated[list[Task], typer.Option(help="What to measure; may be repeated.")],
    data: Annotated[
        str,
        typer.Option(help="A folder, a table, shards, Hugging Face's Parquet or a collection."),
    ],
    on: Annotated[
        BasicTask | None,
        typer.Option(help="robustness, compare: the task that is measured; default zeroshot."),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Part of the data; default test, else validation."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Only N images, spread over the whole data."),
    ] = None,
    label_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="Metadata key that is the label.")
    ] = None,
    captions: Annotated[
        QueryCaptions, typer.Option(help="retrieval: which captions are queries.")
    ] = QueryCaptions.all,
    match: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="retrieval: any item with the same metadata KEY is a hit; probe: such items stay "
            "on one side of a split.",
        ),
    ] = None,
    duplicates: Annotated[
        Duplicates,
        typer.Option(
            help="retrieval: equal images and images with an equal caption are hits too (equal), "
            "or only the image that a caption was written for (own)."
        ),
    ] = Duplicates.equal,
    template: options.Template = None,
    classnames: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="zeroshot: names of numbered classes, one a line; default classnames.txt "
            "beside the data.",
        ),
    ] = None,
    probe: Annotated[
        list[Probe] | None,
        typer.Option(help="probe: the classifier; may be repeated; default logistic."),
    ] = None,
    train_data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="probe: what it is trained on; default part of --data."),
    ] = None,
    train_split: Annotated[
        str | None, typer.Option(metavar="NAME", help="probe: split that it is trained on.")
    ] = None,
    shots: Annotated[
        str, typer.Option(metavar="N,N…", help="probe: images of each class, as 1,2,4,8,16.")
    ] = "",
    seeds: Annotated[int, typer.Option(min=1, help="probe: draws of few-shot images.")] = 5,
    label_noise: Annotated[
        str, typer.Option(metavar="S,S…", help="probe: shares of wrong training labels: 0.2,0.4.")
    ] = "",
    corruption: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="robustness: may be repeated; default all."),
    ] = None,
    severity: Annotated[
        list[int] | None,
        typer.Option(min=1, max=5, help="robustness: may be repeated; default 1 to 5."),
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="neighbours: draw the feature maps of this layer too, or auto."
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write report.html, report.md and plots there."),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="fp32, bf16, int8, or auto, which measures what is faster.")
    ] = "auto",
    decode: Annotated[
        Decode, typer.Option(help="fast: large JPEGs at a fraction of their size.")
    ] = Decode.exact,
    nproc: Annotated[int, typer.Option(min=1, help="Processes that encode images together.")] = 1,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Store embeddings for later evaluations.")
    ] = True,
    path_column: options.PathColumn = "",
    caption_column: options.CaptionColumn = None,
    label_column: options.LabelColumn = "",
    encoding: options.Encoding = "",
    as_json: options.Json = False,
) -> None:
    """Measure models on labelled or captioned images.

    Every figure has a 95 % bootstrap interval, the number of samples and the level of chance.
    Several models are compared with --task compare: paired intervals and tests, and the samples
    that changed.
    """
    tasks = list(dict.fromkeys(task))
    _check_models(tasks, models)
    _check_use(
        tasks,
        on,
        {
            "--match": (match, "retrieval probe"),
            "--captions": (captions is QueryCaptions.first, "retrieval"),
            "--duplicates": (duplicates is Duplicates.own, "retrieval"),
            "--template": (template, "zeroshot"),
            "--classnames": (classnames, "zeroshot"),
            "--probe": (probe, "probe"),
            "--train-data": (train_data, "probe"),
            "--train-split": (train_split, "probe"),
            "--shots": (shots, "probe"),
            "--label-noise": (label_noise, "probe"),
            "--corruption": (corruption, "robustness"),
            "--severity": (severity, "robustness"),
            "--layer": (layer, "neighbours"),
            "--on": (on, "robustness compare"),
        },
    )
    from clipsys.evaluation.corruptions import CORRUPTIONS, SEVERITIES
    from clipsys.evaluation.options import EvaluationOptions

    chosen = EvaluationOptions(
        captions=captions.value,
        match=match,
        duplicates=duplicates.value,
        templates=template,
        classnames=classnames,
        probes=[one.value for one in probe or [Probe.logistic]],
        shots=_numbers("--shots", shots, int),
        seeds=seeds,
        label_noise=_numbers("--label-noise", label_noise, float),
        on=(on or BasicTask.zeroshot).value,
        corruptions=corruption or tuple(CORRUPTIONS),
        severities=severity or SEVERITIES,
        decode=decode.value,
        num_processes=nproc,
    )
    columns = options.columns_of([data], path_column, caption_column, label_column, encoding)
    from clipsys.retrieval.commands.evaluation import Given, Measurements

    given = Given(data, columns, split, limit, label_key, train_data, train_split)
    if report is not None:
        from clipsys.evaluation.reports.writing import check_replaceable

        check_replaceable(report)  # before hours of encoding
    found = Measurements(chosen, given, precision=precision, cache=cache, layer=layer)
    with ending_in_order(lambda: "what is encoded is stored; run the same command again"):
        found.measure(models, [one.value for one in tasks], with_sheets=report is not None)
    if report is not None:  # before what is printed: `| head` may end this
        found.write_report(report)
    found.show(as_json=as_json)


def _check_models(tasks: Sequence[Task], models: Sequence[str]) -> None:
    if Task.compare in tasks and len(models) != 2:
        raise typer.BadParameter(
            f"--task compare takes two models, and {len(models)} are named; name both"
        )


def _check_use(
    tasks: Sequence[Task], on: BasicTask | None, given: Mapping[str, tuple[Any, str]]
) -> None:
    """Refuses an option that no task of the command uses."""
    used = {one.value for one in tasks}
    if used & {"robustness", "compare"}:
        used.add((on or BasicTask.zeroshot).value)
    for option, (value, wanted) in given.items():
        if value and not used & {*wanted.split()}:
            named = " or ".join(wanted.split())
            raise typer.BadParameter(f"{option} is for --task {named}; leave it out")


def _numbers(option: str, text: str, kind: Callable[[str], _Number]) -> list[_Number]:
    try:
        return [kind(one) for one in text.split(",") if one.strip()]
    except ValueError:
        raise typer.BadParameter(
            f"{option} is {text!r}; expected numbers, separated by commas"
        ) from None
