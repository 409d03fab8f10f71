"""How two sentences of a text stand to each other, as a pretext task for text towers."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from clipsys.training.data.augmentation import AugmentationConfig
from clipsys.training.model.outputs import Inputs, Outputs
from clipsys.training.model.towers import Towers
from clipsys.training.objectives.pretext import PretextConfig, PretextObjective
from clipsys.training.objectives.protocol import View


class SentenceOrderConfig(PretextConfig):
    """Sentence order: which of two sentences comes first, or whether one follows the other.

    No images and no labels: texts of several sentences.
    """

    name: Literal["sentence_order"] = Field("sentence_order", description="which objective")
    task: Literal["order", "next"] = Field(
        "order",
        description="order: two neighbouring sentences stand as in the text or the other way "
        "round (ALBERT); next: the second sentence follows the first or is another one of the text",
    )


class SentenceOrder(PretextObjective[SentenceOrderConfig]):
    """A yes-or-no question about the features of two sentences, u and v.

    Inputs:
        Texts; sentences end at a full stop, a question or an exclamation mark, or a line. Two
        neighbouring ones are drawn each time that a sample is seen. A text of fewer sentences
        than ``task`` needs (order 2, next 3) is skipped and counted, so ``data.max_bad_share`` may
        have to be raised. Each row's answer is drawn from the row's own random number, so
        micro-batches change nothing.

    Recommendations:
        ``order`` cannot be solved by the subject alone, as ALBERT found of BERT's next sentences;
        ``next`` takes its wrong sentence from the same text for that reason.

    Relations:
        BERT reads both sentences at once; here each passes the tower alone, and the head sees
        [u, v, |u - v|, u * v] as in InferSent, so that what is learnt stands in the features.
        `MaskedWords` asks for words.

    References:
        Lan et al. 2020, "ALBERT: A Lite BERT for Self-supervised Learning of Language
        Representations", section 3.1 (order); Devlin et al. 2019, "BERT: Pre-training of Deep
        Bidirectional Transformers for Language Understanding", section 3.1 (next); Conneau et al.
        2017, "Supervised Learning of Universal Sentence Representations from Natural Language
        Inference Data", section 3 (the head).
    """

    config = SentenceOrderConfig

    def __init__(self, settings: SentenceOrderConfig) -> None:
        super().__init__(settings)
        # Two neighbouring sentences, and for `next` another one.
        self.num_texts = 2 if settings.task == "order" else 3

    @property
    def takes_sentences(self) -> bool:
        """Always."""
        return True

    @property
    def num_scores(self) -> int:
        """No or yes."""
        return 2

    def head_width(self, width: int) -> int:
        """Of [u, v, |u - v|, u * v]."""
        return 4 * width

    def views(self, augmentation: AugmentationConfig) -> tuple[View, ...]:
        """None."""
        return ()

    def forward(self, towers: Towers, inputs: Inputs) -> Outputs:
        """Scores of no and yes, beside the answers, which the rows' random numbers draw."""
        assert inputs.seeds_B is not None
        answer_B = inputs.seeds_B % 2
        is_right_B1 = answer_B[:, None] == 1
        first_BL, second_BL = inputs.texts[:2]
        if self.settings.task == "order":
            one_BL = torch.where(is_right_B1, first_BL, second_BL)
            two_BL = torch.where(is_right_B1, second_BL, first_BL)
        else:
            one_BL, two_BL = first_BL, torch.where(is_right_B1, second_BL, inputs.texts[2])
        u_BD, v_BD = towers.text_features(torch.cat([one_BL, two_BL])).chunk(2)
        pair_BX = torch.cat([u_BD, v_BD, (u_BD - v_BD).abs(), u_BD * v_BD], dim=1)
        return self.answered(towers, pair_BX, answer_B[:, None])
