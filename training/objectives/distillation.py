"""Images with texts, and a stronger model that shows what to make of them: CLIP-KD."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import nn
from torch.nn import functional as F  # noqa: N812

from clipsys.config import PathText
from clipsys.training.losses import DistillationWeights, Pairs, distilled_pairs
from clipsys.training.model.outputs import Inputs, Outputs, Rows, Sizes, State
from clipsys.training.model.teacher import TEACHER_IMAGE, TEACHER_TEXT
from clipsys.training.model.towers import Towers
from clipsys.training.objectives.pairs import PairConfig, PairObjective
from clipsys.training.objectives.protocol import Labels, StoredViews, Surroundings

_IMAGE_HEAD, _TEXT_HEAD = "image_to_teacher", "text_to_teacher"
_SCALE = "teacher_scale"


class DistillationConfig(PairConfig):
    """Distillation (CLIP-KD): InfoNCE, and the vectors of a stronger model as targets.

    The teacher is a whole model of images and texts; it sees what the student sees, in its own size
    and tokens.
    """

    name: Literal["distillation"] = Field("distillation", description="which objective")
    teacher: PathText = Field(
        description="the stronger model: NAME/TAG of open_clip, hf-hub:ORG/REPO, a model folder or "
        "a run folder"
    )
    teacher_views: int | None = Field(
        None,
        ge=2,
        description="augmented views of each image, and all captions, whose vectors the teacher "
        "computes once, before the first step; each use of a sample shows one of these views. "
        "Default: it is asked at each step, for ever new views",
    )
    teacher_features: PathText | None = Field(
        None,
        description="where those vectors are stored, one folder for all ranks; default the user's "
        "cache folder. They are found again by teacher, data and augmentation",
    )
    contrastive_weight: NonNegativeFloat = Field(
        1.0, description="weight of InfoNCE between the student's images and texts"
    )
    feature_weight: NonNegativeFloat = Field(
        2000.0, description="weight of the squared distance from the teacher's vectors (FD)"
    )
    relational_weight: NonNegativeFloat = Field(
        1.0,
        description="weight of the divergence from the teacher's distributions over the batch "
        "(CRD)",
    )
    interactive_weight: NonNegativeFloat = Field(
        1.0,
        description="weight of InfoNCE between one tower of the student and the other of the "
        "teacher (ICL)",
    )


class Distillation(PairObjective[DistillationConfig]):
    """`InfoNCE` with the feature, relational and interactive terms of CLIP-KD.

    Inputs:
        One view and one text of each sample, which the teacher sees too: the same crop and colours
        in the teacher's own size and normalisation, and the same caption in its own tokens. Where
        the widths of the two models differ, a linear head on each of the student's towers maps its
        vectors into the teacher's space, for the feature and interactive terms; heads are not part
        of the exported model.

    Recommendations:
        Where a model is too large to serve, or was trained on far more than there is here. The
        feature term does most. ``data.load_size`` should be the teacher's image size where that is
        larger than the student's. A step costs the teacher's forward pass besides, unless its
        vectors are stored: with ``teacher_views`` they are computed once, each with the seed of
        its view, so that the student sees exactly that view (as in DataCompDR). The default
        weights are the paper's; the feature term is a mean over the teacher's width, so that for a
        width far below 512 its weight may be lowered in proportion.

    Relations:
        With the three weights at 0 it is `InfoNCE`. `MoCo`'s momentum towers are a teacher that
        the student makes itself.

    References:
        Yang et al. 2024, "CLIP-KD: An Empirical Study of CLIP Model Distillation": feature
        distillation, contrastive relational distillation and interactive contrastive learning,
        with the weights of the released code. Vasu et al. 2024, "MobileCLIP: Fast Image-Text
        Models through Multi-Modal Reinforced Training", and Faghri et al. 2023, "Reinforce Data,
        Multiply Impact": vectors of a teacher stored with the parameters of the augmentation.
    """

    config = DistillationConfig

    def __init__(self, settings: DistillationConfig) -> None:
        super().__init__(settings)
        self._weights = DistillationWeights(
            settings.contrastive_weight,
            settings.feature_weight,
            settings.relational_weight,
            settings.interactive_weight,
        )
        # The distance of features has no temperature.
        self.trains_temperature = any(self._weights._replace(feature=0.0))

    @property
    def teacher(self) -> str | None:
        """As the recipe says."""
        return self.settings.teacher

    @property
    def stored_teacher(self) -> StoredViews | None:
        """As the recipe says."""
        if self.settings.teacher_views is None:
            return None
        return StoredViews(self.settings.teacher_views, self.settings.teacher_features)

    def heads(self, sizes: Sizes) -> nn.ModuleDict:
        """Linear maps into the teacher's space, where it has another width."""
        assert sizes.teacher is not None
        needs_width = self._weights.feature or self._weights.interactive
        if sizes.width == sizes.teacher.width or not needs_width:
            return nn.ModuleDict()
        return nn.ModuleDict(
            {
                name: nn.Linear(sizes.width, sizes.teacher.width)
                for name in (_IMAGE_HEAD, _TEXT_HEAD)
            }
        )

    def initial_state(self, sizes: Sizes, generator: torch.Generator) -> State:
        """The teacher's temperature, which is a constant."""
        assert sizes.teacher is not None
        return {_SCALE: torch.tensor([sizes.teacher.scale])}

    def forward(self, towers: Towers, inputs: Inputs) -> Outputs:
        """Unit vectors of both towers, and the same in the teacher's space."""
        image_BD = towers.image_features(inputs.views[0])
        text_BD = towers.text_features(inputs.texts[0])
        rows = {"image": F.normalize(image_BD, dim=-1), "text": F.normalize(text_BD, dim=-1)}
        if _IMAGE_HEAD in towers.heads:
            rows["projected_image"] = F.normalize(towers.head(_IMAGE_HEAD, image_BD), dim=-1)
            rows["projected_text"] = F.normalize(towers.head(_TEXT_HEAD, text_BD), dim=-1)
        return Outputs(rows, {"logit_scale": towers.logit_scale()})

    def loss(
        self, outputs: Outputs, targets: Rows, labels: Labels, state: State
    ) -> tuple[torch.Tensor, State]:
        """`distilled_pairs` of the student's and the teacher's vectors."""
        value = distilled_pairs(
            Pairs(outputs.rows["image"], outputs.rows["text"]),
            Pairs(targets[TEACHER_IMAGE], targets[TEACHER_TEXT]),
            outputs.shared["logit_scale"],
            state[_SCALE],
            self._weights,
            _projected(outputs),
            labels.groups_B,
            ignore_groups=self.settings.duplicates == "ignore",
            tile_size=self.tile_size,
        )
        return value, state

    def figures(
        self, outputs: Outputs, targets: Rows, labels: Labels, state: State
    ) -> dict[str, torch.Tensor]:
        """Mean cosines with the teacher's vectors, where they can be compared."""
        compared = _projected(outputs) or Pairs(outputs.rows["image"], outputs.rows["text"])
        if compared.image.shape != targets[TEACHER_IMAGE].shape:
            return {}
        return {
            "teacher_image_cosine": (compared.image * targets[TEACHER_IMAGE]).sum(dim=1).mean(),
            "teacher_text_cosine": (compared.text * targets[TEACHER_TEXT]).sum(dim=1).mean(),
        }

    def faults(self, recipe: Surroundings) -> Iterator[str]:
        """Weights with which nothing is learned from the teacher."""
        yield from super().faults(recipe)
        if self.settings.teacher_features is not None and self.settings.teacher_views is None:
            yield (
                "objective.teacher_features does nothing without objective.teacher_views, the "
                "number of views that are stored there"
            )
        if recipe.model.stored_towers:
            yield (
                "objective.name distillation shows images to a teacher, and locked towers are "
                "trained over stored features of their own; unlock a block"
            )
        if not any(self._weights._replace(contrastive=0.0)):
            yield (
                "objective.feature_weight, relational_weight and interactive_weight are all 0, so "
                "that the teacher does nothing; raise one, or use objective.name infonce"
            )


def _projected(outputs: Outputs) -> Pairs | None:
    rows = outputs.rows
    return (
        Pairs(rows["projected_image"], rows["projected_text"])
        if "projected_image" in rows
        else None
    )
