"""What pretext tasks share: a head that answers questions about an image which need no labels.

Shapes: B rows, T questions of each row, C possible answers to each, D width.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import nn
from torch.nn import functional as F  # noqa: N812

from clipsys.training.model.outputs import Outputs, Rows, Sizes, State
from clipsys.training.model.towers import Towers
from clipsys.training.objectives.heads import mlp
from clipsys.training.objectives.protocol import Labels, Objective, ObjectiveConfig

_HEAD = "answer"


class PretextConfig(ObjectiveConfig):
    """Settings of a pretext task."""

    head: Literal["mlp", "linear"] = Field(
        "mlp", description="what answers from the tower's features: two layers or one"
    )
    head_hidden: PositiveInt | None = Field(
        None, description="width of the hidden layer of head: mlp; default that of the features"
    )

    @model_validator(mode="after")
    def _check(self) -> PretextConfig:
        if self.head_hidden is not None and self.head != "mlp":
            raise ValueError(f"head_hidden does nothing while head is {self.head}; leave it out")
        return self


PretextConfigT = TypeVar("PretextConfigT", bound=PretextConfig)


class PretextObjective(Objective[PretextConfigT]):
    """Cross-entropy of the answers to T questions about each row; a rank's mean is its share."""

    @property
    def num_scores(self) -> int:
        """What the head gives for each row that passes it."""
        raise NotImplementedError

    def head_width(self, width: int) -> int:
        """Width of what the head sees, of features of ``width``."""
        return width

    def heads(self, sizes: Sizes) -> nn.ModuleDict:
        """What answers."""
        width = self.head_width(sizes.width)
        if self.settings.head == "linear":
            return nn.ModuleDict({_HEAD: nn.Linear(width, self.num_scores)})
        hidden = self.settings.head_hidden or width
        return nn.ModuleDict({_HEAD: mlp(width, hidden, self.num_scores)})

    def answered(
        self, towers: Towers, features_BD: torch.Tensor, answers_BT: torch.Tensor
    ) -> Outputs:
        """The head's scores for features, beside the true answers."""
        scores_BTC = towers.head(_HEAD, features_BD).view(*answers_BT.shape, -1)
        return Outputs({"scores": scores_BTC, "answers": answers_BT}, {})

    def loss(
        self, outputs: Outputs, targets: Rows, labels: Labels, state: State
    ) -> tuple[torch.Tensor, State]:
        """The mean over rows and questions."""
        scores_BTC, answers_BT = outputs.rows["scores"], outputs.rows["answers"]
        return F.cross_entropy(scores_BTC.flatten(0, 1), answers_BT.flatten()), state

    def figures(
        self, outputs: Outputs, targets: Rows, labels: Labels, state: State
    ) -> dict[str, torch.Tensor]:
        """``accuracy``: the share of right answers."""
        right_BT = outputs.rows["scores"].argmax(dim=2) == outputs.rows["answers"]
        return {"accuracy": right_BT.float().mean()}
