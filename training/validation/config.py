"""Section ``evaluation`` of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from clipsys.config import PathText, Settings


class EvaluationConfig(Settings):
    """What is measured during training, on ``data.validation``."""

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
    batch_size: PositiveInt = Field(128, description="images encoded at once, on each rank")
