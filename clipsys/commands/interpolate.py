"""The verb `interpolate`; heavy imports wait until it runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipsys.commands import options
from clipsys.printing import json_text, printable

if TYPE_CHECKING:
    from clipsys.corpora.columns import Columns
    from clipsys.evaluation.interpolation import MeasuredSet, Share
    from clipsys.evaluation.options import EvaluationOptions
    from clipsys.models.parts import ModelParts


class Task(str, Enum):
    """What the set that a model was tuned for is measured by."""

    zeroshot = "zeroshot"
    retrieval = "retrieval"


def interpolate(
    base: Annotated[
        str, typer.Argument(help="The model that was fine-tuned: NAME/TAG, hf-hub:… or a folder.")
    ],
    tuned: Annotated[str, typer.Argument(help="What became of it: a model folder or a run.")],
    out: Annotated[Path, typer.Argument(help="The model folder to write.")],
    alpha: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of the tuned model; 0.5 without --data."),
    ] = None,
    alphas: Annotated[
        str, typer.Option(metavar="A,A…", help="Shares to measure; default 0,0.1,…,1.")
    ] = "",
    data: Annotated[str, typer.Option(help="Held-out data of what the model was tuned for.")] = "",
    task: Annotated[
        Task | None,
        typer.Option(help="How --data is measured; default retrieval if it has captions."),
    ] = None,
    canary: Annotated[
        list[str] | None,
        typer.Option(metavar="DATA", help="What is not to be forgotten; may be repeated."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only N images of each set.")
    ] = None,
    label_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="--data: metadata key that is the label.")
    ] = None,
    match: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="--data: any item with the same metadata KEY is a hit."),
    ] = None,
    template: options.Template = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="PNG", help="Draw the canaries over --data, share by share."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it is a model folder.")
    ] = False,
    precision: Annotated[
        str, typer.Option(help="Of measuring: fp32, bf16, or auto, which takes what is faster.")
    ] = "auto",
    path_column: options.PathColumn = "",
    caption_column: options.CaptionColumn = None,
    label_column: options.LabelColumn = "",
    encoding: options.Encoding = "",
    as_json: options.Json = False,
) -> None:
    """Write a model between a model and what it became by fine-tuning (WiSE-FT).

    With --data the share of the tuned model is chosen: each one is measured as `clipsys evaluate`
    measures, on --data and on every --canary, and the best is written: the one with the highest
    harmonic mean over the sets of the figure relative to the best of all shares.
    """
    for option, value in {
        **{"--alphas": alphas, "--task": task, "--canary": canary, "--plot": plot},
        **{"--limit": limit, "--label-key": label_key, "--match": match, "--template": template},
    }.items():
        if value and not data:
            raise typer.BadParameter(f"{option} is for measuring, which --data asks for")
    if alpha is not None and data:
        raise typer.BadParameter("give --alpha, or --data to choose it; not both")
    from clipsys.background.captions import copy_captions
    from clipsys.evaluation import interpolation
    from clipsys.evaluation.options import EvaluationOptions
    from clipsys.models.interpolation import check_interpolable
    from clipsys.models.interpolation import interpolate as between
    from clipsys.models.loading import load_model
    from clipsys.models.model_folders import check_replaceable, save_model

    measured = interpolation.parse_alphas(alphas) if alphas else interpolation.DEFAULT_ALPHAS
    check_replaceable(out, overwrite=overwrite)  # before minutes of measuring
    ends = load_model(base), load_model(tuned)
    check_interpolable(*ends)
    shares: list[Share] = []
    sets: list[MeasuredSet] = []
    if data:
        places = [data, *(canary or [])]
        columns = options.columns_of(places, path_column, caption_column, label_column, encoding)
        sets = _open_sets(places, columns, task, limit, label_key)
        chosen = EvaluationOptions(match=match, templates=template)
        shares = _measure(ends, measured, sets, chosen, precision)
        best = interpolation.best_share(shares)
        alpha = best.alpha
        if plot is not None:
            interpolation.write_plot(plot, shares, sets, best)
    share = 0.5 if alpha is None else alpha
    said = interpolation.provenance(*ends, share, shares, sets)
    mark = save_model(between(*ends, share), out, provenance=said, overwrite=overwrite)
    copy_captions(Path(out), tuned, base)
    if as_json:
        print(json_text({"model": str(out), "fingerprint": mark, **said["interpolated"]}))
        return
    _print_table(shares, sets, share)
    print(out)
    print(f"alpha {share:g}, fingerprint {mark[:16]}", file=sys.stderr)


def _open_sets(
    places: Sequence[str],
    columns: Columns,
    task: Task | None,
    limit: int | None,
    label_key: str | None,
) -> list[MeasuredSet]:
    """The set that was tuned for, then the canaries."""
    from clipsys.evaluation.data import open_data
    from clipsys.evaluation.interpolation import measured_set

    data, *canaries = places
    opened = open_data(data, columns=columns, limit=limit, label_key=label_key)
    first = measured_set(opened, None if task is None else task.value)
    others = (open_data(place, columns=columns, limit=limit) for place in canaries)
    return [first, *(measured_set(one, None) for one in others)]


def _measure(
    ends: tuple[ModelParts, ModelParts],
    alphas: Sequence[float],
    sets: Sequence[MeasuredSet],
    chosen: EvaluationOptions,
    precision: str,
) -> list[Share]:
    from clipsys.evaluation.interpolation import measure_shares
    from clipsys.progress import progress

    with progress("Measuring", len(alphas), unit="shares") as advance:
        return measure_shares(
            *(*ends, alphas, sets, chosen), precision=precision, done=lambda: advance(1)
        )


def _print_table(shares: Sequence[Share], sets: Sequence[MeasuredSet], chosen: float) -> None:
    if not shares:
        return
    names = ["data", *(f"canary {number}" for number in range(1, len(sets)))]
    for name, one in zip(names, sets, strict=True):
        print(printable(f"{name}: {one.data.name}, {one.figure}"))
    rows = [["", "alpha", *names, "merit"]]
    for share in shares:
        sign = "*" if share.alpha == chosen else ""
        figures = [f"{value:.4f}" for value in share.figures]
        rows.append([sign, f"{share.alpha:g}", *figures, f"{share.merit:.4f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells))
