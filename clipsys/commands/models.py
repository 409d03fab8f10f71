"""The verb `models`; heavy imports wait until it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from clipsys.commands import options
from clipsys.printing import json_text


def models(
    pattern: Annotated[
        str, typer.Argument(help="Text that NAME/TAG contains (siglip, openai); default: all.")
    ] = "",
    max_mb: Annotated[
        float | None, typer.Option(min=1, help="Largest size of the weights in float32, in MB.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """List open_clip's pretrained models, the smallest first."""
    from clipsys.errors import ModelError
    from clipsys.models.catalogue import PretrainedModel, pretrained_models, pretrained_names
    from clipsys.progress import progress

    names = pretrained_names(pattern)
    found: list[PretrainedModel] = []
    with progress("Counting parameters", len(names), unit="models") as advance:
        for model in pretrained_models(names):
            advance(1)
            if max_mb is None or (model.size_mb is not None and model.size_mb <= max_mb):
                found.append(model)
    if not found:
        fitting = f" of {max_mb:g} MB or less" if max_mb is not None else ""
        raise ModelError(f"open_clip has no pretrained model {pattern!r}{fitting}")
    found.sort(key=lambda model: (model.size_mb is None, model.size_mb or 0, model.name))
    if as_json:
        print(json_text([vars(model) for model in found]))
        return
    width = max(len(model.name) for model in found)
    print(f"{'NAME/TAG':{width}}  {'MB':>6}  {'million':>7}  {'dim':>4}  {'pixels':>6}")
    for model in found:
        size = f"{model.size_mb:.0f}" if model.size_mb is not None else "?"
        count = f"{model.parameters / 1e6:.0f}" if model.parameters is not None else "?"
        print(f"{model.name:{width}}  {size:>6}  {count:>7}  {model.dim:>4}  {model.image_size:>6}")
