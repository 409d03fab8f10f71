"""Images with texts, and negatives from queues of earlier batches."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, PositiveInt

from clipsys.training.distributed.collectives import world_size
from clipsys.training.losses import PairKeys, PairQueue, enqueued, queued_info_nce
from clipsys.training.model.outputs import Inputs, Outputs, Rows, Sizes, State
from clipsys.training.model.towers import Towers
from clipsys.training.objectives.pairs import PairConfig, PairObjective
from clipsys.training.objectives.protocol import Labels


class InfoNCEQueueConfig(PairConfig):
    """InfoNCE with queues: texts and images of earlier batches are negatives too.

    Equal samples, in the batch or in the queue, are positives of each other or left out.
    """

    name: Literal["infonce_queue"] = Field("infonce_queue", description="which objective")
    queue_size: PositiveInt = Field(
        4096, description="earlier pairs that serve as negatives; the newest ones are kept"
    )
    momentum: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="how much of themselves momentum towers keep at each step, which then give the "
        "keys (0.995 in ALBEF); default no such towers",
    )


class InfoNCEQueue(PairObjective[InfoNCEQueueConfig]):
    """`InfoNCE` whose negatives are those of the batch and those of two queues.

    Inputs:
        One view and one text of each sample, and the model's own temperature, which is learned.
        With ``momentum``, both also pass the momentum towers, whose vectors are the keys.

    Recommendations:
        Where memory bounds the batch and ``data.micro_batch_size`` is too slow: a micro-batched
        batch has fresh negatives with exact gradients, a queue has old ones without. Without
        momentum towers the keys age as fast as the model learns: keep the queue to some batches.
        The queues fill from empty, so that no random vector is ever a negative.

    Relations:
        `InfoNCE` is the same without queues. `MoCo` is the same between two views of an image,
        without the negatives of the batch.

    References:
        Li et al. 2021, "Align before Fuse: Vision and Language Representation Learning with
        Momentum Distillation", section 3.2 (without its soft targets); He et al. 2020 (MoCo); Wang
        et al. 2020, "Cross-Batch Memory for Embedding Learning" (keys without momentum towers).
        The queues hold the ids of their samples: a queue longer than the data, or two captions of
        an image, make no false negatives.
    """

    config = InfoNCEQueueConfig

    def __init__(self, settings: InfoNCEQueueConfig) -> None:
        super().__init__(settings)
        self.momentum = settings.momentum

    def initial_state(self, sizes: Sizes, generator: torch.Generator) -> State:
        """Queues whose last ``num_filled`` entries are keys: none before the first step."""
        empty_KD = torch.zeros(self.settings.queue_size, sizes.width)
        return {
            "image_queue": empty_KD,
            "text_queue": empty_KD.clone(),
            "group_queue": torch.zeros(len(empty_KD), dtype=torch.int64),
            "num_filled": torch.zeros((), dtype=torch.int64),
        }

    def targets(self, momentum_towers: Towers, inputs: Inputs) -> Rows:
        """Keys: unit vectors of both momentum towers."""
        return {
            "image": momentum_towers.encode_image(inputs.views[0]),
            "text": momentum_towers.encode_tokens(inputs.texts[0]),
        }

    def loss(
        self, outputs: Outputs, targets: Rows, labels: Labels, state: State
    ) -> tuple[torch.Tensor, State]:
        """`queued_info_nce`; the queues take the keys of the batch afterwards."""
        image_BD, text_BD = outputs.rows["image"], outputs.rows["text"]
        keys = PairKeys(targets["image"], targets["text"]) if targets else None
        size = len(state["group_queue"])
        filled = slice(size - int(state["num_filled"]), size)
        value = queued_info_nce(
            image_BD,
            text_BD,
            outputs.shared["logit_scale"],
            PairQueue(
                state["image_queue"][filled],
                state["text_queue"][filled],
                state["group_queue"][filled],
            ),
            labels.groups_B,
            keys,
            ignore_groups=self.settings.duplicates == "ignore",
            tile_size=self.tile_size,
        )
        new = keys or PairKeys(image_BD, text_BD)
        queues = {
            "image_queue": enqueued(state["image_queue"], new.image_BD),
            "text_queue": enqueued(state["text_queue"], new.text_BD),
            "group_queue": enqueued(state["group_queue"], labels.groups_B),
        }
        num_rows = len(image_BD) * world_size()
        queues["num_filled"] = (state["num_filled"] + num_rows).clamp(max=size)
        return value, queues
