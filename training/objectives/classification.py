"""Cross-entropy of a linear classifier: what contrastive methods with labels are compared with."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F  # noqa: N812

from clipsys.training.model.outputs import Inputs, Outputs, Rows, Sizes, State
from clipsys.training.model.towers import Towers
from clipsys.training.objectives.protocol import Labels, Objective, ObjectiveConfig

_CLASSIFIER = "classifier"


class ClassificationConfig(ObjectiveConfig):
    """Cross-entropy over the classes of the labels, by a linear layer on the image's features.

    Labels are the ``.cls`` members, or what ``data.label_key`` names.
    """

    name: Literal["classification"] = Field("classification", description="which objective")
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of the target that is spread over all classes"
    )


class Classification(Objective[ClassificationConfig]):
    """Cross-entropy of a linear layer on the image tower's features.

    Inputs:
        One view of each image and a label of each sample. A sample without a label, or with one
        that ``data.classes`` does not list, is skipped and counted.

    Recommendations:
        Where the classes are fixed and known. The classifier is not part of the exported model
        unless `clipsys export --with-heads` is asked for it; the order of its outputs stands in the
        model's card as ``classes``.

    Relations:
        `SupCon` learns from the same labels without a classifier.

    References:
        Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision", section 7
        (label smoothing).
    """

    config = ClassificationConfig
    needs_classes = True

    def heads(self, sizes: Sizes) -> nn.ModuleDict:
        """The classifier."""
        return nn.ModuleDict({_CLASSIFIER: nn.Linear(sizes.width, sizes.num_classes)})

    def forward(self, towers: Towers, inputs: Inputs) -> Outputs:
        """Logits of the classes."""
        return Outputs({"logits": self.scores(towers, inputs)}, {})

    def scores(self, towers: Towers, inputs: Inputs) -> torch.Tensor:
        """(B, C) logits of the first view."""
        return towers.head(_CLASSIFIER, towers.image_features(inputs.views[0]))

    def loss(
        self, outputs: Outputs, targets: Rows, labels: Labels, state: State
    ) -> tuple[torch.Tensor, State]:
        """The mean over this rank's rows, which is its share."""
        assert labels.classes_B is not None
        smoothing = self.settings.label_smoothing
        return F.cross_entropy(
            outputs.rows["logits"], labels.classes_B, label_smoothing=smoothing
        ), state
