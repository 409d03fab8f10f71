"""The agreement of all ranks on a recipe and on the versions of the programs that carry it out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from clipsys import __version__
from clipsys.training.distributed.agreement import require_equal
from clipsys.training.distributed.collectives import broadcast_object
from clipsys.training.recipe import Recipe

#: Settings that may differ between machines.
_MACHINE_SETTINGS = ("nproc", "data.cache_dir")


def agree_on_recipe(recipe: Recipe) -> Recipe:
    """The recipe with the run folder as rank 0 sees it, after proof that all ranks run the same.

    Raises:
        TrainingError: a setting or a program's version differs between ranks.
    """
    versions = {
        name: version(name) for name in ("torch", "deepspeed", "open_clip_torch", "transformers")
        if find_spec(name.removesuffix("_torch"))
    }  # fmt: skip
    require_equal(
        {"clipsys": __version__, "the programs": versions},
        remedy="install the same versions on every machine",
    )
    settings = dict(_flatten(recipe.model_dump(mode="json")))
    for name in _MACHINE_SETTINGS:
        settings.pop(name, None)
    require_equal(
        {"the settings": sorted(settings)}, remedy="start every rank with the same recipe"
    )
    require_equal(settings, remedy="start every rank with the same recipe and overrides")
    folder = broadcast_object(str(recipe.run_folder.absolute()))
    return recipe.model_copy(update={"output": folder})


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
