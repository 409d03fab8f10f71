"""Images with texts and further texts that no image belongs to: NegCLIP, and mined negatives.

Two objectives, since where the texts come from has no setting in common.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeVar

import torch
from pydantic import Field, PositiveInt

from clipsys.training.losses import neg_clip
from clipsys.training.mining.config import MiningConfig
from clipsys.training.model.outputs import Inputs, Outputs, Rows, State
from clipsys.training.model.towers import Towers
from clipsys.training.objectives.pairs import PairConfig, PairObjective
from clipsys.training.objectives.protocol import Labels, Surroundings


class _FurtherTextsConfig(PairConfig):
    """Settings of an objective over pairs and further texts."""

    num_negatives: PositiveInt = Field(
        1, description="further texts of each sample that are drawn each time it is used"
    )


ConfigT = TypeVar("ConfigT", bound=_FurtherTextsConfig)


class _FurtherTexts(PairObjective[ConfigT]):
    """InfoNCE in which images choose among further texts too."""

    def __init__(self, settings: ConfigT) -> None:
        super().__init__(settings)
        self.num_texts = 1 + settings.num_negatives

    def forward(self, towers: Towers, inputs: Inputs) -> Outputs:
        """Unit vectors of both towers; all texts pass theirs together."""
        image_BD = towers.encode_image(inputs.views[0])
        text_BD, *further = towers.encode_tokens(torch.cat(inputs.texts)).chunk(self.num_texts)
        rows = {"image": image_BD, "text": text_BD, "negatives": torch.stack(further, dim=1)}
        return Outputs(rows, {"logit_scale": towers.logit_scale()})

    def loss(
        self, outputs: Outputs, targets: Rows, labels: Labels, state: State
    ) -> tuple[torch.Tensor, State]:
        """`neg_clip` of both towers' vectors."""
        present_BT = labels.present_BT
        value = neg_clip(
            outputs.rows["image"],
            outputs.rows["text"],
            outputs.rows["negatives"],
            outputs.shared["logit_scale"],
            self.tile_size,
            labels.groups_B,
            present=None if present_BT is None else present_BT[:, 1:],
            negative_groups=labels.further_groups_BT,
            ignore_groups=self.settings.duplicates == "ignore",
        )
        return value, state


class NegCLIPConfig(_FurtherTextsConfig):
    """InfoNCE (CLIP) with wrong captions from the metadata as negatives of the images.

    A caption with two words swapped, or a noun replaced, is harder than those of other images.
    """

    name: Literal["negclip"] = Field("negclip", description="which objective")
    negatives_key: str = Field(
        "negatives",
        description="metadata key that holds the wrong captions; dots lead into objects and lists "
        "of objects; samples without one have none",
    )


class NegCLIP(_FurtherTexts[NegCLIPConfig]):
    """InfoNCE whose images choose among all captions and all wrong captions of the batch.

    Inputs:
        One view and one text of each sample, and up to ``num_negatives`` wrong captions of it. One
        that is equal to a caption of its sample is left out.

    Recommendations:
        Fine-tuning a trained model at a low rate, as the paper does; from scratch there is little
        to tell apart yet. Wrong captions teach order and relations, which zero-shot retrieval
        hardly measures: validate on such pairs.

    Relations:
        `MinedInfoNCE` takes captions of other images that the model confuses.

    References:
        Yuksekgonul et al. 2023, "When and Why Vision-Language Models Behave like Bags-of-Words, and
        What to Do About It?", section 4.
    """

    config = NegCLIPConfig

    @property
    def negatives_key(self) -> str:
        """As the recipe says."""
        return self.settings.negatives_key


class MinedInfoNCEConfig(_FurtherTextsConfig):
    """InfoNCE (CLIP) with captions of other images that the model takes for an image's own.

    Once in a while all images and texts are encoded, and the nearest texts of each image are found.
    """

    name: Literal["mined_infonce"] = Field("mined_infonce", description="which objective")
    mining: MiningConfig = Field(
        MiningConfig(), description="how the captions of other images are found"
    )


class MinedInfoNCE(_FurtherTexts[MinedInfoNCEConfig]):
    """InfoNCE whose images choose among the batch's captions and mined ones.

    Inputs:
        One view and one text of each sample, and up to ``num_negatives`` captions of other samples
        that were near its image when they were mined. Where one is the caption of an image of the
        batch, or of its group, that image does not meet it a second time.

    Recommendations:
        Many hard negatives are false: name the samples that belong together (``positives``), and
        keep ``mining.max_relative_similarity`` below 1. Small batches gain most; a batch of
        thousands has hard negatives of its own. Refresh about as often as the list grows stale:
        each time costs a forward pass over the data.

    Relations:
        `HardInfoNCE` weights the negatives that the batch happens to have. `NegCLIP` reads wrong
        captions from the metadata.

    References:
        Xiong et al. 2021, "Approximate Nearest Neighbor Negative Contrastive Learning for Dense
        Text Retrieval" (ANCE): negatives from an index of the model that is refreshed; Moreira et
        al. 2024, "NV-Retriever", section 4: the bound relative to the positive's score.
    """

    config = MinedInfoNCEConfig

    @property
    def mining(self) -> MiningConfig:
        """As the recipe says."""
        return self.settings.mining

    def faults(self, recipe: Surroundings) -> Iterator[str]:
        """Lists that have fewer texts than are drawn."""
        yield from super().faults(recipe)
        mining, count = self.settings.mining, self.settings.num_negatives
        if count > mining.candidates:
            yield (
                f"objective.num_negatives is {count}, more than the {mining.candidates} that are "
                "listed of each sample; raise objective.mining.candidates"
            )
