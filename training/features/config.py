"""The section ``features`` of a recipe."""

from __future__ import annotations

from pydantic import Field, PositiveInt

from clipsys.config import PathText, Settings


class FeaturesConfig(Settings):
    """Features of locked towers, computed once and stored."""

    views: PositiveInt = Field(
        1,
        description="augmented views of each image; each use of a sample takes one of them. With "
        "1 the image is stored as it is, without augmentation",
    )
    folder: PathText | None = Field(
        None,
        description="where features are stored, one folder for all ranks; default the user's cache "
        "folder. They are found again by their towers, data and augmentation",
    )
    batch_size: PositiveInt = Field(64, description="images or texts that pass a tower at once")
