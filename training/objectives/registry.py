"""Objectives by name: our own from a table, those of other packages by an entry point.

Another package registers one with::

    [project.entry-points."clipsys.objectives"]
    my_objective = "my_package.my_module:MyObjective"

Nothing is imported but the one that a recipe names.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from clipsys.config import Settings, Variants
from clipsys.errors import ConfigError
from clipsys.training.objectives.protocol import Objective, ObjectiveConfig

GROUP = "clipsys.objectives"
DEFAULT = "infonce"

#: name -> module:class
BUILT_IN = {
    "infonce": "clipsys.training.objectives.infonce:InfoNCE",
    "sigmoid": "clipsys.training.objectives.sigmoid:Sigmoid",
    "simclr": "clipsys.training.objectives.simclr:SimCLR",
    "hard_infonce": "clipsys.training.objectives.reweighted:HardInfoNCE",
    "hard_simclr": "clipsys.training.objectives.reweighted:HardSimCLR",
    "negclip": "clipsys.training.objectives.extra_texts:NegCLIP",
    "mined_infonce": "clipsys.training.objectives.extra_texts:MinedInfoNCE",
    "distillation": "clipsys.training.objectives.distillation:Distillation",
    "infonce_queue": "clipsys.training.objectives.infonce_queue:InfoNCEQueue",
    "slip": "clipsys.training.objectives.slip:SLIP",
    "moco": "clipsys.training.objectives.moco:MoCo",
    "moco_v3": "clipsys.training.objectives.moco_v3:MoCoV3",
    "memory_bank": "clipsys.training.objectives.memory_bank:MemoryBank",
    "supcon": "clipsys.training.objectives.supcon:SupCon",
    "masked_words": "clipsys.training.objectives.masked_words:MaskedWords",
    "sentence_order": "clipsys.training.objectives.sentence_order:SentenceOrder",
    "scl": "clipsys.training.objectives.scl:SCL",
    "classification": "clipsys.training.objectives.classification:Classification",
    "barlow_twins": "clipsys.training.objectives.barlow_twins:BarlowTwins",
    "vicreg": "clipsys.training.objectives.vicreg:VICReg",
    "triplet": "clipsys.training.objectives.triplet:Triplet",
    "margin": "clipsys.training.objectives.margin:Margin",
    "n_pair": "clipsys.training.objectives.n_pair:NPair",
    "nce": "clipsys.training.objectives.nce:NCE",
    "swav": "clipsys.training.objectives.swav:SwAV",
    "looc": "clipsys.training.objectives.looc:LooC",
    "rotation": "clipsys.training.objectives.rotation:Rotation",
    "jigsaw": "clipsys.training.objectives.jigsaw:Jigsaw",
    "colour": "clipsys.training.objectives.colour:Colour",
    "frame_order": "clipsys.training.objectives.frame_order:FrameOrder",
    "cpc": "clipsys.training.objectives.cpc:CPC",
}


def objective_names() -> list[str]:
    """Every objective that a recipe can name here."""
    return [*BUILT_IN, *(one.name for one in _registered() if one.name not in BUILT_IN)]


def _registered() -> list[EntryPoint]:
    return list(entry_points(group=GROUP))


def objective_class(name: str) -> type[Objective[Any]]:
    """The class of an objective.

    Raises:
        ConfigError: there is none of that name, or the package that registered it is broken.
    """
    found: Any
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        found = getattr(importlib.import_module(module), attribute)
        return found  # type: ignore[no-any-return]
    point = next((one for one in _registered() if one.name == name), None)
    if point is None:
        near = get_close_matches(name, objective_names(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"expected one of {', '.join(objective_names())}{hint}")
    try:
        found = point.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{point.value} cannot be imported ({error})") from error
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise ConfigError(
            f"{point.value} is not a subclass of clipsys.training.objectives.Objective"
        )
    return found


def make_objective(settings: ObjectiveConfig) -> Objective[Any]:
    """The objective of a recipe's section."""
    return objective_class(settings.name)(settings)


def settings_of(document: object) -> type[Settings] | None:
    """The class of a section's settings; None where the section names no objective."""
    if not isinstance(document, Mapping):
        return None
    try:
        return objective_class(str(with_current_names(document).get("name", DEFAULT))).config
    except ConfigError:
        return None


def _parse(value: object) -> object:
    """A section of a recipe as the settings of the objective that it names."""
    if not isinstance(value, Mapping):
        return value
    document = with_current_names(value)
    name = document.setdefault("name", DEFAULT)
    try:
        return objective_class(str(name)).config.model_validate(document)
    except ConfigError as error:
        message = PydanticCustomError("objective_name", "{text}", {"text": str(error)})
        detail = InitErrorDetails(type=message, loc=("name",), input=name)
        raise ValidationError.from_exception_data("objective", [detail]) from None


def with_current_names(document: Mapping[str, Any]) -> dict[str, Any]:
    """A section as it is written now; recipes and runs of 0.1 say ``loss`` for ``name``."""
    renamed = dict(document)
    if "loss" in renamed and renamed.get("name", renamed["loss"]) == renamed["loss"]:
        renamed["name"] = renamed.pop("loss")
    return renamed


#: The type of a recipe's ``objective`` section.
ObjectiveSection = Annotated[
    SerializeAsAny[ObjectiveConfig], BeforeValidator(_parse), Variants(settings_of)
]
