"""Negatives of the batch weighted by their hardness: Robinson et al. 2021, for pairs and views.

Objectives of their own rather than settings of InfoNCE and SimCLR: theirs would do nothing by
default, and InfoNCE's fused kernels, its step figures and its reference do not hold for them.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, PositiveFloat, model_validator

from clipsys.config import Settings
from clipsys.training.losses import hard_info_nce, hard_nt_xent
from clipsys.training.model.outputs import Outputs, Rows, State
from clipsys.training.objectives.heads import temperature_of
from clipsys.training.objectives.pairs import PairConfig, PairObjective
from clipsys.training.objectives.protocol import Labels
from clipsys.training.objectives.simclr import SimCLR, SimCLRConfig


class _Weights(Settings):
    """How negatives are weighted."""

    hardness: float = Field(
        0.5, ge=0, description="how much more harder negatives count; multiplies the logits"
    )
    prior: float = Field(
        0.0, ge=0, lt=1, description="expected share of false negatives, which is taken off"
    )

    @model_validator(mode="after")
    def _check_weights(self) -> _Weights:
        if not self.hardness and not self.prior:
            raise ValueError(
                "hardness and prior are both 0, which weights nothing; use the plain objective "
                "(infonce, simclr)"
            )
        return self


class HardInfoNCEConfig(PairConfig, _Weights):
    """InfoNCE (CLIP) whose negatives in the batch count for more the harder they are."""

    name: Literal["hard_infonce"] = Field("hard_infonce", description="which objective")


class HardInfoNCE(PairObjective[HardInfoNCEConfig]):
    """InfoNCE with negatives weighted by their hardness, in both directions.

    Inputs:
        One view and one text of each sample, and the model's own temperature, which is learned.

    Recommendations:
        ``hardness`` acts on logits, which grow with the learned scale: begin at 0.1 to 0.5. Name
        the samples that belong together (``positives``) first: the hardest negatives of a batch
        are its false ones. ``prior`` of a few hundredths at most, since scales of CLIP are high.

    Relations:
        `InfoNCE` counts all negatives alike. `MinedInfoNCE` brings harder ones into the batch.

    References:
        Robinson et al. 2021, "Contrastive Learning with Hard Negative Samples", equations 2 to 4;
        for images with texts as in Radenovic et al. 2023, "Filtering, Distillation, and Hard
        Negatives for Vision-Language Pre-Training", equation 4.
    """

    config = HardInfoNCEConfig

    def loss(
        self, outputs: Outputs, targets: Rows, labels: Labels, state: State
    ) -> tuple[torch.Tensor, State]:
        """`hard_info_nce` of both towers' vectors."""
        value = hard_info_nce(
            outputs.rows["image"],
            outputs.rows["text"],
            outputs.shared["logit_scale"],
            self.tile_size,
            labels.groups_B,
            hardness=self.settings.hardness,
            prior=self.settings.prior,
            ignore_groups=self.settings.duplicates == "ignore",
        )
        return value, state


class HardSimCLRConfig(SimCLRConfig, _Weights):
    """SimCLR whose negatives in the batch count for more the harder they are; no texts."""

    name: Literal["hard_simclr"] = Field("hard_simclr", description="which objective")  # type: ignore[assignment]
    temperature: PositiveFloat = Field(0.5, description="what cosines are divided by")
    hardness: float = Field(
        1.0, ge=0, description="how much more harder negatives count; multiplies the logits"
    )
    prior: float = Field(
        0.1, ge=0, lt=1, description="expected share of false negatives, which is taken off"
    )


class HardSimCLR(SimCLR):
    """NT-Xent between two views with negatives weighted by their hardness.

    Inputs:
        Two views of each image, each from its own seed. Captions are not needed.

    Recommendations:
        The defaults are the authors' for images. ``prior`` about one over the number of classes.

    Relations:
        `SimCLR` counts all negatives alike.

    References:
        Robinson et al. 2021, "Contrastive Learning with Hard Negative Samples", equations 2 to 4.
    """

    config = HardSimCLRConfig
    settings: HardSimCLRConfig

    def loss(
        self, outputs: Outputs, targets: Rows, labels: Labels, state: State
    ) -> tuple[torch.Tensor, State]:
        """`hard_nt_xent` of both views."""
        value = hard_nt_xent(
            outputs.rows["first"],
            outputs.rows["second"],
            temperature_of(self.settings, outputs.shared),
            hardness=self.settings.hardness,
            prior=self.settings.prior,
        )
        return value, state
