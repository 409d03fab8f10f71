"""The sections ``features`` and ``unlock`` of a recipe."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

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


class UnlockConfig(Settings):
    """A second phase, in which blocks of the locked towers are trained too."""

    image_blocks: NonNegativeInt | None = Field(
        0, description="last blocks of the image tower that are trained; null: all of them"
    )
    text_blocks: NonNegativeInt | None = Field(0, description="the same of the text tower")
    epochs: PositiveInt = Field(description="epochs of the second phase")
    lr: PositiveFloat = Field(description="its peak learning rate; a tenth of optimizer.lr or less")
    warmup_steps: NonNegativeInt = Field(0, description="its warm-up")
    batch_size: PositiveInt | None = Field(
        None, description="its data.batch_size; default that of the first phase"
    )
    micro_batch_size: PositiveInt | None = Field(
        None, description="its data.micro_batch_size; default all of a rank's share at once"
    )
    layer_decay: PositiveFloat | None = Field(
        None, le=1, description="its optimizer.layer_decay; default that of the first phase"
    )

    @model_validator(mode="after")
    def _check(self) -> UnlockConfig:
        if self.image_blocks == 0 and self.text_blocks == 0:
            raise ValueError("image_blocks and text_blocks are both 0: nothing would be unlocked")
        return self
