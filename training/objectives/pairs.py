"""Images with texts: what InfoNCE and the sigmoid loss share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeVar

from pydantic import Field, PositiveInt

from clipsys.training.data.samples import Positives
from clipsys.training.model.outputs import Inputs, Outputs
from clipsys.training.model.towers import Towers
from clipsys.training.objectives.protocol import Objective, ObjectiveConfig, Surroundings


class PairConfig(ObjectiveConfig):
    """Settings of an objective over images and their texts."""

    positives: Positives = Field(
        "image",
        description="which samples are positives of each other: none but the pair, equal images, "
        "equal captions or equal labels",
    )
    duplicates: Literal["attract", "ignore"] = Field(
        "attract",
        description="what such samples are to each other: positives too, or left out of the "
        "negatives",
    )
    tile_size: PositiveInt | None = Field(
        None, description="rows of logits held at once; default what suits the device"
    )


PairConfigT = TypeVar("PairConfigT", bound=PairConfig)


class PairObjective(Objective[PairConfigT]):
    """Contrasts images with texts at the model's own temperature."""

    num_texts = 1
    trains_temperature = True

    @property
    def positives(self) -> Positives:
        """As the recipe says."""
        return self.settings.positives

    @property
    def tile_size(self) -> int | None:
        """As the recipe says."""
        return self.settings.tile_size

    def forward(self, towers: Towers, inputs: Inputs) -> Outputs:
        """Unit vectors of both towers."""
        rows = {
            "image": towers.encode_image(inputs.views[0]),
            "text": towers.encode_tokens(inputs.texts[0]),
        }
        return Outputs(rows, {"logit_scale": towers.logit_scale()})

    def faults(self, recipe: Surroundings) -> Iterator[str]:
        """Settings that would do nothing."""
        if self.settings.positives == "pair" and self.settings.duplicates == "ignore":
            yield (
                "objective.duplicates ignore does nothing while objective.positives is pair: "
                "no two samples are equal; use image, caption or label"
            )
        yield from super().faults(recipe)
