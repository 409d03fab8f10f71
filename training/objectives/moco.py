"""Queries against keys of a momentum tower and a queue of earlier keys: MoCo v2."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import nn

from clipsys.training.data.augmentation import AugmentationConfig
from clipsys.training.losses import enqueued, moco
from clipsys.training.model.outputs import Inputs, Outputs, Rows, Sizes, State
from clipsys.training.model.towers import Towers
from clipsys.training.objectives.heads import (
    ProjectionConfig,
    learned_scale,
    project,
    projection_heads,
    temperature_of,
)
from clipsys.training.objectives.protocol import Labels, Objective, View


class MoCoConfig(ProjectionConfig):
    """MoCo v2: a view of an image against another one seen by momentum towers, and a queue.

    Views are drawn as ``augmentation`` says. No texts.
    """

    name: Literal["moco"] = Field("moco", description="which objective")
    temperature: PositiveFloat = Field(0.2, description="what cosines are divided by")
    momentum: float = Field(
        0.999,
        ge=0,
        lt=1,
        description="how much of themselves the momentum towers keep at each step; about 0.99 for "
        "runs of a few thousand steps",
    )
    queue_size: PositiveInt = Field(
        65_536, description="earlier keys that serve as negatives; the newest ones are kept"
    )
    symmetric: bool = Field(
        False, description="each view is query once and key once; costs twice the passes"
    )


class MoCo(Objective[MoCoConfig]):
    """Cross-entropy of a query's key against a queue of keys of earlier batches.

    Inputs:
        Two views of each image: one passes the trained tower, the other one the momentum tower.
        Batch norm takes the statistics of what passes each rank at once, in both towers, and keys
        are not shuffled among ranks: take a tower without batch norm where that matters.

    Recommendations:
        Small batches, since negatives come from the queue. The queue should be several batches
        long and a fraction of the data; a loss that stays at log(queue_size + 1) says that the
        momentum is too low or the rate too high.

    Relations:
        `SimCLR` takes its negatives from the batch, through which gradients pass.

    References:
        He et al. 2020, "Momentum Contrast for Unsupervised Visual Representation Learning",
        algorithm 1; Chen et al. 2020, "Improved Baselines with Momentum Contrastive Learning".
        The queue is filled once a step, after both halves of a symmetric loss, in rank order.
    """

    config = MoCoConfig

    def __init__(self, settings: MoCoConfig) -> None:
        super().__init__(settings)
        self.momentum = settings.momentum

    def views(self, augmentation: AugmentationConfig) -> tuple[View, ...]:
        """Two, drawn alike."""
        return View(augmentation), View(augmentation)

    def heads(self, sizes: Sizes) -> nn.ModuleDict:
        """The projection, and the temperature if it is learned."""
        return projection_heads(self.settings, sizes.width)

    def initial_state(self, sizes: Sizes, generator: torch.Generator) -> State:
        """A queue of random unit vectors, as in the paper's code."""
        shape = (self.settings.queue_size, self.settings.projected_width(sizes.width))
        queue_KD = torch.randn(shape, generator=generator)
        return {"queue": nn.functional.normalize(queue_KD, dim=-1)}

    def forward(self, towers: Towers, inputs: Inputs) -> Outputs:
        """Queries: of the first view, or of both."""
        rows = self._project(towers, inputs.views if self.settings.symmetric else inputs.views[:1])
        return Outputs(rows, learned_scale(self.settings, towers))

    def targets(self, momentum_towers: Towers, inputs: Inputs) -> Rows:
        """Keys: of the second view, or of both with the second one first."""
        views = inputs.views[::-1]
        return self._project(momentum_towers, views if self.settings.symmetric else views[:1])

    def _project(self, towers: Towers, views: tuple[torch.Tensor, ...]) -> Rows:
        """Projections of views that pass a tower together, numbered."""
        projected = project(self.settings, towers, torch.cat(views)).chunk(len(views))
        return {f"half {number}": rows_BD for number, rows_BD in enumerate(projected)}

    def loss(
        self, outputs: Outputs, targets: Rows, labels: Labels, state: State
    ) -> tuple[torch.Tensor, State]:
        """The mean over halves of `moco`; both see the same queue, which takes the keys after."""
        temperature = temperature_of(self.settings, outputs.shared)
        queue_KD = state["queue"]
        halves = [
            moco(query_BD, targets[name], queue_KD, temperature)
            for name, query_BD in outputs.rows.items()
        ]
        for key_BD in targets.values():
            queue_KD = enqueued(queue_KD, key_BD)
        return torch.stack(halves).mean(), {"queue": queue_KD}
