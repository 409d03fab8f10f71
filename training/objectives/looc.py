"""MoCo in several spaces, each of which keeps what one augmentation would erase: LooC."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, field_validator
from torch import nn

from clipsys.training.data.augmentation import AugmentationConfig, Family
from clipsys.training.losses import enqueued, looc
from clipsys.training.model.outputs import Inputs, Outputs, Rows, Sizes, State
from clipsys.training.model.towers import Towers
from clipsys.training.objectives.heads import (
    PROJECTION,
    ProjectionConfig,
    learned_scale,
    projection_heads,
    temperature_of,
)
from clipsys.training.objectives.protocol import Labels, Objective, Surroundings, View

#: Settings of ``augmentation`` that make a family change something.
_SETTINGS: dict[Family, tuple[str, ...]] = {
    "geometry": ("crop_scale", "crop_ratio", "flip"),
    "rotation": ("rotation_degrees",),
    "colour": ("brightness", "contrast", "saturation", "hue", "greyscale"),
    "blur": ("blur",),
    "erasing": ("erasing",),
}


class LooCConfig(ProjectionConfig):
    """LooC: MoCo with a head for each augmentation that the features must not forget; no texts.

    Views are drawn as ``augmentation`` says.
    """

    name: Literal["looc"] = Field("looc", description="which objective")
    temperature: PositiveFloat = Field(0.2, description="what cosines are divided by")
    head: Literal["mlp", "linear"] = Field(
        "mlp", description="what each head is: two layers or one"
    )
    augmentations: list[Family] = Field(
        ["colour"],
        min_length=1,
        description="families of augmentations that get a head of their own, which keeps what they "
        "change",
    )
    momentum: float = Field(
        0.999,
        ge=0,
        lt=1,
        description="how much of themselves the momentum towers keep at each step; about 0.99 for "
        "runs of a few thousand steps",
    )
    queue_size: PositiveInt = Field(
        16_384, description="earlier keys of each head that serve as negatives; the newest are kept"
    )

    @field_validator("augmentations")
    @classmethod
    def _each_once(cls, value: list[Family]) -> list[Family]:
        if len(set(value)) < len(value):
            raise ValueError("expected each family once")
        return value


class LooC(Objective[LooCConfig]):
    """Leave-one-out contrastive learning: separate spaces, each invariant to all but one family.

    Inputs:
        A query view and, for n families, n + 1 key views of each image: key 0 is drawn
        independently, key i has the draws of family i in common with the query. The query passes
        the trained tower, the keys the momentum tower; a step costs n more forward passes than one
        of `MoCo`.

    Recommendations:
        Where a later task needs what augmentation would make irrelevant (colours of products,
        orientation of scenes), and its strong augmentation is needed all the same. What is kept
        after training are the tower's features, which serve all heads ("LooC" in the paper);
        ``clipsys export --with-heads`` also writes the heads, whose concatenated projections are
        the paper's "LooC++".

    Relations:
        Without families it is `MoCo`. Leaving an augmentation out of MoCo keeps its information
        too, but gives up what the augmentation taught.

    References:
        Xiao et al. 2021, "What Should Not Be Contrastive in Contrastive Learning", section 3 and
        equation 2. Each head has a queue of its own, of the keys that are its positives.
    """

    config = LooCConfig

    def __init__(self, settings: LooCConfig) -> None:
        super().__init__(settings)
        self.momentum = settings.momentum
        #: Names of the heads: the invariant space first.
        self._spaces = [f"{PROJECTION}_{name}" for name in ("invariant", *settings.augmentations)]

    def views(self, augmentation: AugmentationConfig) -> tuple[View, ...]:
        """The query, key 0, and a key for each family, whose draws are those of the query."""
        keys = [View(augmentation, shares=frozenset({one})) for one in self.settings.augmentations]
        return View(augmentation), View(augmentation), *keys

    def heads(self, sizes: Sizes) -> nn.ModuleDict:
        """A projection for each space, and the temperature if it is learned."""
        heads = projection_heads(self.settings, sizes.width)
        del heads[PROJECTION]
        for space in self._spaces:
            heads[space] = projection_heads(self.settings, sizes.width)[PROJECTION]
        return heads

    def initial_state(self, sizes: Sizes, generator: torch.Generator) -> State:
        """Queues of random unit vectors, one for each space."""
        shape = (self.settings.queue_size, len(self._spaces), self.settings.head_width)
        queue_KHD = torch.randn(shape, generator=generator)
        return {"queue": nn.functional.normalize(queue_KHD, dim=-1)}

    def forward(self, towers: Towers, inputs: Inputs) -> Outputs:
        """What each head makes of the query."""
        query_BHD = self._project(towers, towers.image_features(inputs.views[0]))
        return Outputs({"query": query_BHD}, learned_scale(self.settings, towers))

    def targets(self, momentum_towers: Towers, inputs: Inputs) -> Rows:
        """What each head makes of each key, (B, heads, keys, D)."""
        features = momentum_towers.image_features(torch.cat(inputs.views[1:]))
        projected = self._project(momentum_towers, features).chunk(len(self._spaces))
        return {"keys": torch.stack(projected, dim=2)}

    def _project(self, towers: Towers, features_BX: torch.Tensor) -> torch.Tensor:
        """(B, heads, D), unit norm."""
        projected = [towers.head(space, features_BX) for space in self._spaces]
        return nn.functional.normalize(torch.stack(projected, dim=1), dim=-1)

    def loss(
        self, outputs: Outputs, targets: Rows, labels: Labels, state: State
    ) -> tuple[torch.Tensor, State]:
        """`looc`; each head's queue takes its positive keys after."""
        key_BHVD, queue_KHD = targets["keys"], state["queue"]
        temperature = temperature_of(self.settings, outputs.shared)
        value = looc(outputs.rows["query"], key_BHVD, queue_KHD, temperature)
        positive_BHD = torch.diagonal(key_BHVD, dim1=1, dim2=2).transpose(1, 2)
        return value, {"queue": enqueued(queue_KHD, positive_BHD)}

    def faults(self, recipe: Surroundings) -> Iterator[str]:
        """Families that the recipe's augmentation does not draw: their heads would have no task."""
        neutral = AugmentationConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
        for family in self.settings.augmentations:
            names = _SETTINGS[family]
            if all(getattr(recipe.augmentation, one) == getattr(neutral, one) for one in names):
                yield (
                    f"objective.augmentations has {family}, which augmentation does not change; "
                    f"set {' or '.join(f'augmentation.{one}' for one in names)}, or leave it out"
                )
