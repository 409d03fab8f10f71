"""Cross-entropy with the supervised contrastive loss on texts: SCL for language models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import nn

from clipsys.training.data.augmentation import AugmentationConfig
from clipsys.training.losses import scl
from clipsys.training.model.outputs import Inputs, Outputs, Rows, Sizes, State
from clipsys.training.model.towers import Towers
from clipsys.training.objectives.heads import (
    TemperatureConfig,
    learned_scale,
    temperature_heads,
    temperature_of,
)
from clipsys.training.objectives.protocol import Labels, Objective, Surroundings, View

_CLASSIFIER = "classifier"


class SCLConfig(TemperatureConfig):
    """SCL: a classifier of texts, whose features of one class are drawn together; no images.

    Labels are the ``.cls`` members, or what ``data.label_key`` names.
    """

    name: Literal["scl"] = Field("scl", description="which objective")
    weight: float = Field(
        0.9,
        ge=0,
        lt=1,
        description="of the contrastive loss; cross-entropy has the rest. 0 is cross-entropy alone",
    )
    temperature: PositiveFloat = Field(0.3, description="what cosines are divided by")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="share of the features that the classifier does not see"
    )

    @model_validator(mode="after")
    def _check_weight(self) -> SCLConfig:
        is_set = self.temperature != type(self).model_fields["temperature"].default
        if self.weight == 0 and (is_set or self.learn_temperature):
            name = "learn_temperature" if self.learn_temperature else "temperature"
            raise ValueError(f"{name} does nothing while weight is 0; leave it out")
        return self


class SCL(Objective[SCLConfig]):
    """A linear classifier on the text tower's pooled output, with SupCon of that output.

    Inputs:
        One text of each sample and a label of each. A sample without a label, or with one that
        ``data.classes`` does not list, is skipped and counted. Images are neither decoded nor
        needed, and the image tower is not trained.

    Recommendations:
        Fine-tuning a pretrained text tower on few or noisy labels: ``model.pretrained``, or an
        encoder of Hugging Face (``model.architecture.text_cfg.hf_model_name``). Batches of 16, a
        learning rate near 1e-5 and many epochs of few samples, as in the paper. The classifier is
        not part of the exported model unless `clipsys export --with-heads` is asked for it.

    Relations:
        `Classification` is the cross-entropy alone, for images. `SupCon` is the contrastive loss
        alone.

    References:
        Gunel et al. 2021, "Supervised Contrastive Learning for Pre-trained Language Model
        Fine-tuning", equation 1.
    """

    config = SCLConfig
    num_texts = 1
    needs_classes = True

    def views(self, augmentation: AugmentationConfig) -> tuple[View, ...]:
        """None."""
        return ()

    def heads(self, sizes: Sizes) -> nn.ModuleDict:
        """The classifier, and the temperature if it is learned."""
        linear = nn.Linear(sizes.width, sizes.num_classes)
        dropout = self.settings.dropout
        classifier = nn.Sequential(nn.Dropout(dropout), linear) if dropout else linear
        return nn.ModuleDict({_CLASSIFIER: classifier, **temperature_heads(self.settings)})

    def forward(self, towers: Towers, inputs: Inputs) -> Outputs:
        """Logits of the classes, and the features that they are made of."""
        features_BD = towers.text_features(inputs.texts[0])
        rows = {"logits": towers.head(_CLASSIFIER, features_BD)}
        if self.settings.weight:
            rows["features"] = features_BD
        return Outputs(rows, learned_scale(self.settings, towers))

    def scores(self, towers: Towers, inputs: Inputs) -> torch.Tensor:
        """(B, C) logits of the text."""
        return towers.head(_CLASSIFIER, towers.text_features(inputs.texts[0]))

    def loss(
        self, outputs: Outputs, targets: Rows, labels: Labels, state: State
    ) -> tuple[torch.Tensor, State]:
        """`scl` of the classes."""
        assert labels.classes_B is not None
        logits_BC = outputs.rows["logits"]
        value = scl(
            logits_BC,
            outputs.rows.get("features", logits_BC),
            labels.classes_B,
            self.settings.weight,
            temperature_of(self.settings, outputs.shared),
        )
        return value, state

    def faults(self, recipe: Surroundings) -> Iterator[str]:
        """A batch in which nothing can be contrasted."""
        if self.settings.weight and recipe.data.batch_size < 2:
            yield (
                "data.batch_size is 1, which leaves objective.name scl nothing to contrast; raise "
                "it, or set objective.weight to 0"
            )
