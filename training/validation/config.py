"""Section ``evaluation`` of a recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from clipsys.config import PathText, Settings

#: A name stands between the slashes of a figure's name.
_CANARY_NAME = re.compile(r"[\w-][\w.-]*")


class CanaryConfig(Settings):
    """A set that is not trained on; shards alone stand for their ``data``."""

    data: PathText | list[PathText] = Field(
        description="shards with captions (retrieval), with labels (.cls: zero-shot), or with both"
    )
    templates: str | list[str] | None = Field(
        None, description="prompts, as evaluation.templates names them"
    )
    classnames: PathText | None = Field(
        None, description="file of class names, as evaluation.classnames names it"
    )
    caption_key: str | None = Field(None, description="metadata key that holds the captions")

    @model_validator(mode="before")
    @classmethod
    def _from_shards(cls, value: Any) -> Any:
        return {"data": value} if isinstance(value, str | list) else value


class EvaluationConfig(Settings):
    """What is measured during training, on ``data.validation`` and on what is not trained on."""

    every_epochs: NonNegativeInt = Field(1, description="0: only at the end")
    captions: Literal["first", "all"] = Field("all", description="which captions are queries")
    match: str | None = Field(
        None, description="metadata key: an image with the query's value is a hit"
    )
    zeroshot: PathText | list[PathText] | None = Field(
        None, description="labelled shards (.cls) for zero-shot classification"
    )
    classnames: PathText | None = Field(
        None,
        description="where labels are numbers: file with one class name a line, the first for "
        "class 0; default classnames.txt beside the shards",
    )
    duplicates: Literal["equal", "own"] = Field(
        "equal",
        description="whether equal images and images with an equal caption are hits too, or only "
        "the image that a caption was written for",
    )
    templates: str | list[str] | None = Field(
        None,
        description="prompts with {} for the class, or the name of a set (simple, clip, siglip, "
        "plain); default zeroshot_classification_templates.txt beside the shards, else simple",
    )
    knn: str | None = Field(
        None,
        description="label that the nearest neighbours of each image predict: a metadata key, or "
        "cls for the .cls member; images that match do not vote for each other",
    )
    classifier: bool = Field(
        False,
        description="accuracy, precision, recall and F1 of the classifier that the objective "
        "trains, on the labels of data.validation",
    )
    canary: dict[str, CanaryConfig] = Field(
        {},
        description="sets that are not trained on, by a name of yours, measured before the first "
        "step and with every evaluation, to see what is forgotten: shards, or a mapping of data, "
        "templates, classnames and caption_key",
    )
    canary_drop: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="a warning is given when a canary's figure has lost this share of what it was "
        "above chance before the first step",
    )
    batch_size: PositiveInt = Field(128, description="images encoded at once, on each rank")

    @field_validator("canary", mode="before")
    @classmethod
    def _check_names(cls, value: Any) -> Any:
        for name in value if isinstance(value, Mapping) else ():
            if not _CANARY_NAME.fullmatch(str(name)):
                raise ValueError(
                    f"{name!r} is not a name for a set: letters, digits, dots and hyphens"
                )
        return value
