"""Views that predict each other's assignment to learned prototypes: SwAV."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby
from typing import Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import nn

from clipsys.training.data.augmentation import AugmentationConfig
from clipsys.training.distributed.collectives import rank, world_size
from clipsys.training.losses import enqueued, swav
from clipsys.training.model.outputs import Inputs, Outputs, Rows, Sizes, State
from clipsys.training.model.towers import Towers
from clipsys.training.objectives.heads import HeadConfig, project, projection_heads
from clipsys.training.objectives.protocol import Labels, Objective, Surroundings, View

_PROTOTYPES = "prototypes"
#: Views that have codes: the two whose crops are as ``augmentation`` says.
_NUM_CODES = 2


class SwAVConfig(HeadConfig):
    """SwAV: views of an image agree on how it is shared out among learned prototypes; no texts.

    Two global views are drawn as ``augmentation`` says; smaller local crops can be added.
    """

    name: Literal["swav"] = Field("swav", description="which objective")
    temperature: PositiveFloat = Field(
        0.1, description="what cosines with prototypes are divided by"
    )
    num_prototypes: int = Field(
        3_000,
        ge=2,
        description="learned unit vectors; about as many as samples and queue hold at once, or "
        "fewer",
    )
    epsilon: PositiveFloat = Field(
        0.05, description="the smaller, the more does a code give to the nearest prototype alone"
    )
    iterations: PositiveInt = Field(3, description="of the Sinkhorn algorithm")
    frozen_prototype_steps: NonNegativeInt = Field(
        313, description="steps for which prototypes stay as they were drawn; about an epoch"
    )
    queue_size: NonNegativeInt = Field(
        0,
        description="earlier samples that prototypes are shared out among beside the batch, for "
        "batches of a few hundred; 3,840 in the paper",
    )
    queue_start_step: NonNegativeInt = Field(
        0, description="from which step on the queue is used; the paper waits 15 epochs"
    )
    num_local: NonNegativeInt = Field(
        0,
        description="local views of each image, which predict codes and have none; 6 in the paper",
    )
    local_size: PositiveInt | None = Field(
        None,
        description="side of a local view in pixels, for towers that take any; default the model's",
    )
    local_crop_scale: tuple[float, float] = Field(
        (0.05, 0.14), description="share of the area that a local view keeps"
    )

    @model_validator(mode="after")
    def _check(self) -> SwAVConfig:
        smallest, largest = self.local_crop_scale
        if not 0 < smallest <= largest <= 1:
            raise ValueError("local_crop_scale: expected two shares of the area, the smaller first")
        for needed, idle in (
            ("queue_size", ("queue_start_step",)),
            ("num_local", ("local_size", "local_crop_scale")),
        ):
            for name in idle:
                is_set = getattr(self, name) != type(self).model_fields[name].default
                if is_set and not getattr(self, needed):
                    raise ValueError(f"{name} does nothing while {needed} is 0; leave it out")
        return self


class SwAV(Objective[SwAVConfig]):
    """Cross-entropy of each view's scores with the codes of the other views.

    Inputs:
        Two global views and any number of local views of each image, each from its own seed. All
        views of one size pass the tower together.

    Recommendations:
        Local crops of half the size cost a quarter each and are what SwAV gains most from (70.1 to
        75.3 % on ImageNet in the paper), if the tower takes other sizes than its own, as most of
        timm's convolutional towers do. Where prototypes outnumber the batch, a queue. A loss that
        stays at log(num_prototypes) has collapsed: freeze prototypes for longer, lower the rate or
        epsilon, or take fewer prototypes.

    Relations:
        `SimCLR` and `MoCo` compare features with features and need negatives; here the equal
        sharing among prototypes keeps features from becoming equal. Codes are those of the whole
        batch of all processes, also in micro-batches; accumulated gradients of small batches would
        be those of other codes.

    References:
        Caron et al. 2020, "Unsupervised Learning of Visual Features by Contrasting Cluster
        Assignments", equations 2, 3 and 6. Prototypes are normalised where they are used and not
        after each step, which ZeRO's masters would undo. The queue holds features, which the
        present prototypes score, and takes the global views once a step, in rank order.
    """

    config = SwAVConfig

    def views(self, augmentation: AugmentationConfig) -> tuple[View, ...]:
        """Two global views, then the local ones."""
        settings = self.settings
        local = augmentation.model_copy(update={"crop_scale": settings.local_crop_scale})
        size = None if settings.local_size is None else (settings.local_size, settings.local_size)
        return *(View(augmentation),) * _NUM_CODES, *(View(local, size),) * settings.num_local

    def heads(self, sizes: Sizes) -> nn.ModuleDict:
        """The projection and the prototypes."""
        heads = projection_heads(self.settings, sizes.width)
        width = self.settings.projected_width(sizes.width)
        heads[_PROTOTYPES] = _Prototypes(self.settings.num_prototypes, width)
        return heads

    def initial_state(self, sizes: Sizes, generator: torch.Generator) -> State:
        """The number of steps so far, and a queue that is not used before it is full."""
        state = {"step": torch.zeros((), dtype=torch.int64)}
        if self.settings.queue_size:
            width = self.settings.projected_width(sizes.width)
            state["queue"] = torch.zeros(self.settings.queue_size, _NUM_CODES, width)
        return state

    def forward(self, towers: Towers, inputs: Inputs) -> Outputs:
        """Projections of all views, and the prototypes."""
        rows: list[torch.Tensor] = []
        for _, views in groupby(inputs.views, key=lambda view: view.shape[-2:]):
            together = list(views)
            rows += project(self.settings, towers, torch.cat(together)).chunk(len(together))
        prototypes_KD = towers.heads[_PROTOTYPES]()
        return Outputs({"features": torch.stack(rows, dim=1)}, {_PROTOTYPES: prototypes_KD})

    def loss(
        self, outputs: Outputs, targets: Rows, labels: Labels, state: State
    ) -> tuple[torch.Tensor, State]:
        """`swav` of the scores of all views; the queue takes the global views after."""
        settings, step = self.settings, int(state["step"])
        features_BVD, prototypes_KD = outputs.rows["features"], outputs.shared[_PROTOTYPES]
        if step < settings.frozen_prototype_steps:
            # A gradient of 0 rather than none, which the engine's exchange would wait for.
            prototypes_KD = prototypes_KD.detach() + 0 * prototypes_KD
        following = {"step": state["step"] + 1}
        queued_QCK = None
        if settings.queue_size:
            queue_QCD = state["queue"]
            following["queue"] = enqueued(queue_QCD, features_BVD[:, :_NUM_CODES])
            if step >= settings.queue_start_step:
                own_QCD = queue_QCD.tensor_split(world_size())[rank()]
                queued_QCK = own_QCD @ prototypes_KD.detach().T
        value = swav(
            features_BVD @ prototypes_KD.T,
            settings.temperature,
            settings.epsilon,
            settings.iterations,
            num_codes=_NUM_CODES,
            queued_QCK=queued_QCK,
        )
        return value, following

    def faults(self, recipe: Surroundings) -> Iterator[str]:
        """A batch of one, and a queue that is used before it is full."""
        batch, settings = recipe.data.batch_size, self.settings
        if batch < 2:
            yield (
                "data.batch_size is 1, which leaves objective.name swav no samples to share out "
                "prototypes among; raise it"
            )
        if settings.queue_start_step * batch < settings.queue_size:
            yield (
                f"objective.queue_start_step is {settings.queue_start_step}, before batches of "
                f"{batch} have filled objective.queue_size {settings.queue_size}; use "
                f"{math.ceil(settings.queue_size / batch)} or more"
            )


class _Prototypes(nn.Module):
    """Learned vectors (K, D), of unit norm where they are used."""

    def __init__(self, number: int, width: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(nn.functional.normalize(torch.randn(number, width), dim=-1))

    def no_weight_decay(self) -> set[str]:
        """Their norm means nothing."""
        return {"vectors"}

    def forward(self) -> torch.Tensor:
        """(K, D) float32, unit norm."""
        return nn.functional.normalize(self.vectors.float(), dim=-1)
