"""The section ``objective.mining`` of a recipe."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from clipsys.config import Settings


class MiningConfig(Settings):
    """How hard negatives are mined."""

    start_epoch: NonNegativeInt = Field(
        1,
        description="epochs that are trained without mined negatives; a model that has learnt "
        "nothing finds none worth having",
    )
    refresh_epochs: PositiveInt = Field(1, description="epochs that a list is used for")
    depth: PositiveInt = Field(100, description="nearest texts of each image that are looked at")
    skip: NonNegativeInt = Field(
        0, description="how many of the nearest are left out, as likely to fit the image too"
    )
    candidates: PositiveInt = Field(
        10, description="hard negatives that are listed of each sample, to be drawn from"
    )
    max_relative_similarity: float | None = Field(
        0.95,
        gt=0,
        description="texts nearer to an image than this share of its own text's similarity are "
        "left out as likely to fit it; null: none are",
    )
    max_similarity: float | None = Field(
        None, ge=-1, le=1, description="texts of a cosine above this are left out; null: none are"
    )

    @model_validator(mode="after")
    def _check(self) -> MiningConfig:
        if self.skip >= self.depth:
            raise ValueError(
                f"skip is {self.skip}, which leaves none of the {self.depth} nearest; raise depth "
                "or lower skip"
            )
        if self.candidates > self.depth - self.skip:
            raise ValueError(
                f"candidates is {self.candidates}, more than the {self.depth - self.skip} of depth "
                f"{self.depth} after skip {self.skip}; lower it or raise depth"
            )
        return self
