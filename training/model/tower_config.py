"""Settings of pretrained towers: where each comes from, what is trained of it, and its head."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, model_validator

from clipsys.config import PathText, Settings

#: What the names of towers begin with.
TIMM, HUGGING_FACE, OPEN_CLIP = "timm:", "hf:", "open_clip:"


class TowerConfig(Settings):
    """A pretrained tower, what is trained of it, and its head."""

    name: PathText = Field(
        description="timm:NAME (images), hf:NAME_OR_FOLDER (texts), open_clip:NAME/TAG, or a "
        "model folder, whose own head is used unless another one is set"
    )
    unlocked_blocks: NonNegativeInt | None = Field(
        0, description="train the last blocks too; 0: the head alone; null: the whole tower"
    )
    head: Literal["linear", "mlp"] | None = Field(
        None,
        description="a new head: one matrix, or two with a GELU between them; default linear for "
        "timm and Hugging Face, none for a tower of open_clip, which has one",
    )
    locked_head: bool = Field(False, description="do not train the tower's own head either (LiT)")
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the values that are left out before the head's last"
        " matrix, in training",
    )

    @model_validator(mode="after")
    def _check(self) -> TowerConfig:
        if self.locked_head and (self.head or self.unlocked_blocks != 0):
            raise ValueError(
                "locked_head is for a locked tower with its own head; leave out head and "
                "unlocked_blocks"
            )
        if self.locked_head and self.name.startswith((TIMM, HUGGING_FACE)):
            raise ValueError(f"locked_head: {self.name} has no head of its own; leave it out")
        return self


class ImageTowerConfig(TowerConfig):
    """A pretrained image tower."""

    weights: PathText | None = Field(
        None,
        description="file with the weights of a timm model (.safetensors, .pth, .bin), where its "
        "hub is not to be asked; random: none",
    )

    @model_validator(mode="after")
    def _check_kind(self) -> ImageTowerConfig:
        if self.name.startswith(HUGGING_FACE):
            raise ValueError(
                f"name is {self.name}, a text encoder; use timm:NAME, open_clip:NAME/TAG or a "
                "model folder"
            )
        if self.weights and not self.name.startswith(TIMM):
            raise ValueError("weights is for a tower of timm (name timm:NAME); leave it out")
        if self.weights == "random" and self.unlocked_blocks is not None:
            raise ValueError(
                "weights is random, so that all blocks must be trained; set unlocked_blocks to null"
            )
        return self


class TextTowerConfig(TowerConfig):
    """A pretrained text tower."""

    pooling: Literal["mean", "cls", "max"] | None = Field(
        None,
        description="how the vectors of a Hugging Face encoder's tokens become one; default what "
        "its sentence-transformers folder says, else mean",
    )

    @model_validator(mode="after")
    def _check_kind(self) -> TextTowerConfig:
        if self.name.startswith(TIMM):
            raise ValueError(
                f"name is {self.name}, an image model; use hf:NAME_OR_FOLDER, open_clip:NAME/TAG "
                "or a model folder"
            )
        return self
