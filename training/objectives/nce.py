"""Each view finds its own second view among the others: NCE, logistic, one-modality InfoNCE."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import nn

from clipsys.training.data.samples import Positives
from clipsys.training.distributed.collectives import world_size
from clipsys.training.losses import info_nce_views, logistic, nce
from clipsys.training.model.outputs import Inputs, Outputs, Rows, Sizes, State
from clipsys.training.model.towers import Towers
from clipsys.training.objectives.heads import (
    ProjectionConfig,
    projection_heads,
    temperature_of,
)
from clipsys.training.objectives.protocol import Labels
from clipsys.training.objectives.two_views import UnitViewObjective

_NORMALIZER = "normalizer"


class NCEConfig(ProjectionConfig):
    """Two views of an image: the second is told from the second views of other images.

    Views are drawn as ``augmentation`` says: strong crops and colours make the task. No texts.
    """

    name: Literal["nce"] = Field("nce", description="which objective")
    form: Literal["nce", "logistic", "infonce"] = Field(
        "nce",
        description="how it is told: by one logistic classifier that estimates a probability (NCE),"
        " by one that does not (word2vec's negative sampling), or by a softmax over the batch",
    )
    positives: Literal["pair", "label"] = Field(
        "pair",
        description="which second views are no noise: the image's own, or all of its label",
    )
    learn_normalizer: bool = Field(
        True, description="form nce: train the logarithm of the normaliser"
    )
    log_normalizer: float | None = Field(
        None,
        description="form nce: the logarithm of the normaliser, at first if it is trained; default "
        "that of num_outcomes, which is right while all cosines are 0",
    )
    num_outcomes: PositiveInt | None = Field(
        None,
        description="form nce: samples that the noise is drawn from, such as those of the training "
        "data; default the others of the batch",
    )

    @model_validator(mode="after")
    def _check_form(self) -> NCEConfig:
        for name in ("learn_normalizer", "log_normalizer", "num_outcomes"):
            is_default = getattr(self, name) == type(self).model_fields[name].default
            if self.form != "nce" and not is_default:
                raise ValueError(f"{name} does nothing while form is {self.form}; leave it out")
        return self


class NCE(UnitViewObjective[NCEConfig]):
    """Noise-contrastive losses between two views of each image, from the first to the second.

    Inputs:
        Two views of each image, each from its own seed; labels only with ``positives: label``.

    Recommendations:
        ``infonce`` unless there is a reason: it needs no normaliser. ``logistic`` wants opposite
        directions of all negatives, which no batch of many can have.

    Relations:
        `SimCLR` takes negatives from both views in both directions. `Sigmoid` is ``nce`` between
        images and texts, with its bias as the normaliser. The memory bank of Wu et al. 2018 is
        ``nce`` with noise from all samples.

    References:
        Gutmann and Hyvärinen 2010, "Noise-contrastive estimation: A new estimation principle for
        unnormalized statistical models", equations 3 to 5; Mikolov et al. 2013, "Distributed
        Representations of Words and Phrases and their Compositionality", equation 4; van den Oord
        et al. 2018, "Representation Learning with Contrastive Predictive Coding", equation 4.
    """

    config = NCEConfig
    needs_negatives = True

    @property
    def positives(self) -> Positives:
        """As the recipe says."""
        return self.settings.positives

    def heads(self, sizes: Sizes) -> nn.ModuleDict:
        """The projection, and what is learned of temperature and normaliser."""
        heads = projection_heads(self.settings, sizes.width)
        if self._learns_normalizer:
            heads[_NORMALIZER] = _Offset()
        return heads

    @property
    def _learns_normalizer(self) -> bool:
        return self.settings.form == "nce" and self.settings.learn_normalizer

    def forward(self, towers: Towers, inputs: Inputs) -> Outputs:
        """Unit-norm projections of both views, and what is learned beside them."""
        rows, shared = super().forward(towers, inputs)
        if self._learns_normalizer:
            shared["normalizer"] = towers.scalar(f"heads.{_NORMALIZER}.offset").reshape(())
        return Outputs(rows, shared)

    def loss(
        self, outputs: Outputs, targets: Rows, labels: Labels, state: State
    ) -> tuple[torch.Tensor, State]:
        """What ``form`` names, of both views."""
        settings = self.settings
        first_BD, second_BD = outputs.rows["first"], outputs.rows["second"]
        temperature = temperature_of(settings, outputs.shared)
        groups_B = labels.groups_B if settings.positives == "label" else None
        if settings.form == "infonce":
            return info_nce_views(first_BD, second_BD, temperature, groups_B=groups_B), state
        if settings.form == "logistic":
            return logistic(first_BD, second_BD, temperature, groups_B=groups_B), state
        log_z = settings.log_normalizer
        if log_z is None:
            log_z = math.log(settings.num_outcomes or world_size() * len(first_BD) - 1)
        value = nce(
            first_BD,
            second_BD,
            temperature,
            log_z + outputs.shared.get("normalizer", 0.0),
            settings.num_outcomes,
            groups_B=groups_B,
        )
        return value, state


class _Offset(nn.Module):
    """What is learned of a scalar, beside where it begins; shape (1,), as DeepSpeed needs it."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(1))
