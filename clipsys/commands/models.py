"""The verb `models`; heavy imports wait until it runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipsys.commands import options
from clipsys.printing import json_text

if TYPE_CHECKING:
    from clipsys.models.catalogue import Budget, PretrainedModel

#: Bytes of each unit that a size may have; without one it is in MB.
_UNITS = {
    **{"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12},
    **{"kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30, "tib": 2.0**40},
}


def models(
    pattern: Annotated[
        str, typer.Argument(help="Text that NAME/TAG contains (siglip, openai); default: all.")
    ] = "",
    memory: Annotated[
        str, typer.Option(help="Memory that the model may take: 4GB, 500MB.", show_default=False)
    ] = "",
    images_per_s: Annotated[
        float | None,
        typer.Option(min=0.001, help="Images that it must encode in a second on this CPU."),
    ] = None,
    language: Annotated[
        str,
        typer.Option(
            help='Language of the queries: a code (de), or "multilingual".', show_default=False
        ),
    ] = "",
    max_mb: Annotated[
        float | None,
        typer.Option(min=1, help="List no model whose float32 weights are larger, in MB."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw accuracy over GFLOP an image into this PNG.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """List open_clip's pretrained models: those that fit first, the most accurate first."""
    from clipsys.errors import ModelError
    from clipsys.models import catalogue

    budget = catalogue.Budget(_megabytes(memory) if memory else None, images_per_s)
    catalogue.check_language(language)
    names = catalogue.pretrained_names(pattern)
    found = [
        model
        for model in catalogue.pretrained_models(names, language=language)
        if catalogue.speaks(model, language)
        and (max_mb is None or (model.size_mb is not None and model.size_mb <= max_mb))
    ]
    if not found:
        fitting = f" of {max_mb:g} MB or less" if max_mb is not None else ""
        spoken = f" for the language {language}" if language else ""
        raise ModelError(f"open_clip has no pretrained model {pattern!r}{fitting}{spoken}")
    rate = catalogue.measured_gflop_per_s()
    if rate is None and images_per_s is not None:
        raise ModelError(
            "--images-per-s needs a measurement of this machine, which CLIPSYS_PROBE=off prevents"
        )
    found = catalogue.ranked(catalogue.with_speed(found, rate) if rate else found, budget)
    if plot is not None:
        from clipsys.models.catalogue_plot import write_plot

        write_plot(found, plot)
    if as_json:
        print(json_text([vars(model) for model in found]))
        return
    _print_table(found, language)
    _print_notes(found, budget, rate, language)


def _megabytes(text: str) -> float:
    """A size such as 4GB in MB.

    Raises:
        ConfigError: it is none.
    """
    from clipsys.errors import ConfigError

    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    size_mb = float(match[1]) * _UNITS.get(match[2] or "mb", 0.0) / 1e6 if match else 0.0
    if size_mb <= 0:
        raise ConfigError(
            f"--memory {text!r} is no size above 0; expected a number and a unit: 4GB, 500MB, "
            "1.5GiB"
        )
    return size_mb


def _print_table(models: list[PretrainedModel], language: str) -> None:
    with_recall = any(model.language_recall is not None for model in models)
    header = ["", "NAME/TAG", "top-1", "mean38", "million", "GFLOP", "MB", "img/s", "dim", "pixels"]
    rows = [header + ([f"{language} R@1"] if with_recall else [])]
    for model in models:
        sign = "*" if model.best else " " if model.fits else "-"
        row = [
            sign,
            model.name,
            _shown(model.imagenet_top1, ".3f"),
            _shown(model.mean_38, ".3f"),
            _shown(None if model.parameters is None else model.parameters / 1e6, ".0f"),
            _shown(model.image_gflop, ".1f"),
            _shown(model.memory_mb, ".0f"),
            _shown(model.images_per_s, ".3g"),
            str(model.dim),
            str(model.image_size),
        ]
        rows.append(row + ([_shown(model.language_recall, ".3f")] if with_recall else []))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if number < 2 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _print_notes(
    models: list[PretrainedModel], budget: Budget, rate: float | None, language: str
) -> None:
    """Says on stderr what the columns mean, so that a pipe gets the table alone."""
    import sys

    from clipsys.models.catalogue import MULTILINGUAL, TOGETHER

    notes = [
        "* the Pareto front: none of those that fit reaches as much with fewer GFLOP",
        "top-1, mean38: zero-shot accuracy on ImageNet, and its mean over 38 data sets, as "
        "published by open_clip; - is not published",
        "GFLOP: for one image, a multiplication and its addition as two",
        f"MB: weights in float32 and the activations of {TOGETHER} images",
    ]
    if rate is not None:
        notes.append(
            f"img/s: an estimate for this CPU, from {rate:,.0f} GFLOP/s measured on the products "
            "of ViT-B-32; what is not a product slows models down"
        )
    if budget.memory_mb is not None or budget.images_per_s is not None:
        fitting = sum(model.fits for model in models)
        notes.insert(0, f"{fitting} of {len(models)} fit; - does not fit")
    if language and language != MULTILINGUAL:
        notes.append(
            f"{language} R@1: published recall@1 from text to image in this language on "
            "Crossmodal-3600; - is a text tower of many languages that was not measured there"
        )
    elif language:
        notes.append("multilingual by the text tower's vocabulary; how well differs by language")
    print("\n".join(notes), file=sys.stderr)


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
