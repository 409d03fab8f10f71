"""What later frames will look like, from earlier ones: contrastive predictive coding."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import nn

from clipsys.training.data.augmentation import AugmentationConfig
from clipsys.training.losses import cpc
from clipsys.training.model.outputs import Inputs, Outputs, Rows, Sizes, State
from clipsys.training.model.towers import Towers
from clipsys.training.objectives.frame_views import frame_features, frame_views
from clipsys.training.objectives.protocol import (
    Labels,
    Objective,
    ObjectiveConfig,
    View,
)

_CONTEXT, _PREDICTION = "context", "prediction"


class CPCConfig(ObjectiveConfig):
    """CPC: features of later frames from a summary of earlier ones; no texts.

    Needs ``data.frames``.
    """

    name: Literal["cpc"] = Field("cpc", description="which objective")
    frames: int = Field(5, ge=2, description="frames of a window, as data.frames.length")
    past: PositiveInt = Field(3, description="how many of them are seen; the others are predicted")
    context: Literal["gru", "mean"] = Field(
        "gru",
        description="what sums up the features of the past: a recurrent network or their mean",
    )
    context_width: PositiveInt | None = Field(
        None, description="width of context: gru; default that of the features"
    )

    @model_validator(mode="after")
    def _check(self) -> CPCConfig:
        if self.past >= self.frames:
            raise ValueError(
                f"past is {self.past} of {self.frames} frames, which leaves none to predict; "
                "lower it, or raise frames"
            )
        if self.context_width is not None and self.context != "gru":
            raise ValueError("context_width does nothing while context is mean; leave it out")
        return self


class CPC(Objective[CPCConfig]):
    """InfoNCE between predicted and true features of each later frame, over the batch's rows.

    Inputs:
        A view of each frame of a window, with the same crop and colours. The tower sees each frame
        by itself; the context sees the features of the first ``past`` ones.

    Recommendations:
        Many sequences, so that a batch seldom holds two windows of one: windows that overlap are
        negatives of each other. Batches of 64 and more.

    Relations:
        `FrameOrder` asks for the order of the same windows. `InfoNCE` has a text where this has a
        prediction.

    References:
        van den Oord et al. 2018, "Representation Learning with Contrastive Predictive Coding",
        equations 3 and 4: a gated recurrent context and one matrix for each step. Predictions are
        made from one context, that of the last seen frame.
    """

    config = CPCConfig
    needs_negatives = True

    @property
    def num_frames(self) -> int:
        """As the recipe says."""
        return self.settings.frames

    def views(self, augmentation: AugmentationConfig) -> tuple[View, ...]:
        """One of each frame."""
        return frame_views(augmentation, self.settings.frames)

    def heads(self, sizes: Sizes) -> nn.ModuleDict:
        """The context, and a matrix for each predicted step, one above the other."""
        settings, width = self.settings, sizes.width
        heads: dict[str, nn.Module] = {}
        context_width = width
        if settings.context == "gru":
            context_width = settings.context_width or width
            heads[_CONTEXT] = Recurrent(width, context_width)
        num_steps = settings.frames - settings.past
        heads[_PREDICTION] = nn.Linear(context_width, num_steps * width, bias=False)
        return nn.ModuleDict(heads)

    def forward(self, towers: Towers, inputs: Inputs) -> Outputs:
        """Predicted and true features of the later frames."""
        features_BTD = frame_features(towers, inputs)
        past_BTD, future_BKD = features_BTD.tensor_split([self.settings.past], dim=1)
        if self.settings.context == "gru":
            context_BH = towers.head(_CONTEXT, past_BTD)
        else:
            context_BH = past_BTD.mean(dim=1)
        predicted_BKD = towers.head(_PREDICTION, context_BH).view(future_BKD.shape)
        return Outputs({"predicted": predicted_BKD, "future": future_BKD}, {})

    def loss(
        self, outputs: Outputs, targets: Rows, labels: Labels, state: State
    ) -> tuple[torch.Tensor, State]:
        """`cpc` of both."""
        return cpc(outputs.rows["predicted"], outputs.rows["future"]), state


class Recurrent(nn.Module):
    """A gated recurrent unit (Cho et al. 2014) over (B, T, D); gives its last state (B, H).

    Of two linear layers, which autocast and ZeRO know how to treat.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.from_input = nn.Linear(width, 3 * hidden)
        self.from_state = nn.Linear(hidden, 3 * hidden)

    def forward(self, features_BTD: torch.Tensor) -> torch.Tensor:
        """The state after the last feature."""
        state_BH = features_BTD.new_zeros(len(features_BTD), self.hidden)
        for gates_BX in self.from_input(features_BTD).unbind(1):
            reset_BH, update_BH, new_BH = gates_BX.chunk(3, dim=1)
            of_reset_BH, of_update_BH, of_new_BH = self.from_state(state_BH).chunk(3, dim=1)
            kept_BH = torch.sigmoid(update_BH + of_update_BH)
            drop_BH = torch.sigmoid(reset_BH + of_reset_BH)
            candidate_BH = torch.tanh(new_BH + drop_BH * of_new_BH)
            state_BH = (1 - kept_BH) * candidate_BH + kept_BH * state_BH
        return state_BH
