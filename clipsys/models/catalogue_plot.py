"""Accuracy of pretrained models over their work, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clipsys.errors import DataError, ModelError

if TYPE_CHECKING:
    from clipsys.models.catalogue import PretrainedModel


def write_plot(models: Sequence[PretrainedModel], path: Path) -> None:
    """Draws ImageNet top-1 over GFLOP an image as a PNG, with those on the Pareto front numbered.

    Raises:
        ModelError: of none of the models both figures are known.
        DataError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    known = [
        (one.image_gflop, one.imagenet_top1, one)
        for one in models
        if one.image_gflop is not None and one.imagenet_top1 is not None
    ]
    if not known:
        raise ModelError(f"{path}: no accuracy is published of any of these models to draw")
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.add_subplot()
    for fits, colour, label in ((False, "lightgrey", "do not fit"), (True, "tab:blue", "fit")):
        group = [place for *place, one in known if one.fits is fits]
        if group:
            across, up = zip(*group, strict=True)
            axes.scatter(across, up, 18, colour, label=label)
    front = {(gflop, top1): one for gflop, top1, one in known if one.best}
    for number, (place, model) in enumerate(sorted(front.items()), 1):
        axes.scatter(*place, 36, "tab:red", label=f"{number}  {model.name}")
        axes.annotate(str(number), place, (0, 6), textcoords="offset points", ha="center")
    axes.set(xscale="log", xlabel="GFLOP for one image", ylabel="ImageNet zero-shot top-1")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8)
    try:
        figure.savefig(path, format="png", dpi=130)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from error
