"""Each image against a bank of the features of all images: instance discrimination."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import nn

from clipsys.training.distributed.collectives import rank, world_size
from clipsys.training.losses import bank_log_normaliser, bank_nce, bank_softmax, bank_updated
from clipsys.training.model.outputs import Inputs, Outputs, Rows, Sizes, State
from clipsys.training.model.towers import Towers
from clipsys.training.objectives.heads import (
    ProjectionConfig,
    learned_scale,
    project,
    projection_heads,
    temperature_of,
)
from clipsys.training.objectives.protocol import Labels, Objective


class MemoryBankConfig(ProjectionConfig):
    """Memory bank: one view of each image against its own entry in a bank of all of them.

    Views are drawn as ``augmentation`` says. No texts.
    """

    name: Literal["memory_bank"] = Field("memory_bank", description="which objective")
    form: Literal["softmax", "nce"] = Field(
        "softmax",
        description="cross-entropy over all entries, or its noise-contrastive estimate, for data "
        "of a million images",
    )
    temperature: PositiveFloat = Field(0.07, description="what cosines are divided by")
    head: Literal["mlp", "linear", "none"] = Field(
        "linear", description="what projects the tower's features: two layers, one, or nothing"
    )
    momentum: float = Field(
        0.5, ge=0, lt=1, description="how much of itself an entry keeps when its image is seen"
    )
    num_noise: PositiveInt = Field(
        4096, description="entries that form: nce draws for each image, as noise"
    )

    @model_validator(mode="after")
    def _check_form(self) -> MemoryBankConfig:
        default = type(self).model_fields["num_noise"].default
        if self.form == "softmax" and self.num_noise != default:
            raise ValueError("num_noise does nothing while form is softmax; leave it out")
        if self.form == "nce" and self.learn_temperature:
            raise ValueError(
                "learn_temperature would change what the normaliser of form: nce was estimated "
                "for; set it to false, or form to softmax"
            )
        return self


class MemoryBank(Objective[MemoryBankConfig]):
    """Cross-entropy, or its noise-contrastive estimate, over an entry for each training image.

    Inputs:
        One view of each image. The bank has an entry for each training sample, all of them random
        before the first step; an entry moves when its image is in a batch.

    Recommendations:
        Small data sets and many epochs: an entry is as old as the last time its image was seen. The
        bank, num_samples times the projection's width in float32, is on each device twice while a
        step lasts: 1.3 million images at 128 take 1.3 GB. Captions that repeat an image in several
        samples make false negatives.

    Relations:
        `MoCo` replaced the bank by a queue of fresh keys. `SimCLR` compares within the batch.

    References:
        Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination".
        Noise is drawn from a step counter in the state, for the whole batch, so that it does not
        depend on the number of ranks; Z is estimated from the first batch and then fixed. The
        paper's proximal term is left out, as in its released code.
    """

    config = MemoryBankConfig

    def heads(self, sizes: Sizes) -> nn.ModuleDict:
        """The projection, and the temperature if it is learned."""
        return projection_heads(self.settings, sizes.width)

    def initial_state(self, sizes: Sizes, generator: torch.Generator) -> State:
        """A bank of random unit vectors; for the estimate a seed, a step, and no normaliser yet."""
        shape = (sizes.num_samples, self.settings.projected_width(sizes.width))
        bank_MD = torch.randn(shape, generator=generator)
        state = {"bank": nn.functional.normalize(bank_MD, dim=-1)}
        if self.settings.form == "nce":
            state["noise_seed"] = torch.randint(1 << 32, (), generator=generator)
            state["step"] = torch.zeros((), dtype=torch.int64)
            state["log_normaliser"] = torch.full((), torch.nan, dtype=torch.float64)
        return state

    def forward(self, towers: Towers, inputs: Inputs) -> Outputs:
        """Projections of the view."""
        projected_BD = project(self.settings, towers, inputs.views[0])
        return Outputs({"features": projected_BD}, learned_scale(self.settings, towers))

    def loss(
        self, outputs: Outputs, targets: Rows, labels: Labels, state: State
    ) -> tuple[torch.Tensor, State]:
        """`bank_softmax` or `bank_nce`; the bank takes the features afterwards."""
        features_BD, samples_B, bank_MD = outputs.rows["features"], labels.samples_B, state["bank"]
        temperature = temperature_of(self.settings, outputs.shared)
        updated = {"bank": bank_updated(bank_MD, features_BD, samples_B, self.settings.momentum)}
        if self.settings.form == "softmax":
            return bank_softmax(features_BD, bank_MD, samples_B, temperature), updated
        noise_Bm = self._noise(state, len(features_BD), bank_MD)
        log_normaliser = state["log_normaliser"]
        if bool(log_normaliser.isnan()):
            log_normaliser = bank_log_normaliser(features_BD, bank_MD, noise_Bm, temperature)
        value = bank_nce(features_BD, bank_MD, samples_B, noise_Bm, log_normaliser, temperature)
        updated["noise_seed"] = state["noise_seed"]
        updated["step"] = state["step"] + 1
        updated["log_normaliser"] = log_normaliser
        return value, updated

    def _noise(self, state: State, num_rows: int, bank_MD: torch.Tensor) -> torch.Tensor:
        """(B, m) entries for this rank's rows, of those drawn for the rows of all ranks."""
        generator = torch.Generator().manual_seed(int(state["noise_seed"] + state["step"]))
        shape = (world_size() * num_rows, self.settings.num_noise)
        noise_Nm = torch.randint(len(bank_MD), shape, generator=generator)
        start = rank() * num_rows
        return noise_Nm[start : start + num_rows].to(bank_MD.device)
