"""A teacher's vectors of all samples: computed once, stored, and looked up by what a row shows.

Each view is stored under the seed that it was drawn from, so that the student sees the same crop
and colours in its own size (Faghri et al. 2023; Vasu et al. 2024, "MobileCLIP").
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812

from clipsys.errors import TrainingError
from clipsys.models.parts import ModelParts
from clipsys.training.data.samples import Batch
from clipsys.training.features.batches import FeatureTable
from clipsys.training.features.extraction import FeatureSource, stored_features, view_seed
from clipsys.training.features.trunks import tokenizer_fingerprint
from clipsys.training.model.layers import Tower
from clipsys.training.model.outputs import Rows
from clipsys.training.model.teacher import TEACHER_IMAGE, TEACHER_TEXT, Teacher


class StoredTeacher:
    """What a teacher says of the stored views and captions."""

    def __init__(self, table: FeatureTable, seed: int) -> None:
        """
        Args:
            table: the teacher's vectors.
            seed: of the views.
        """
        self._table = table
        self._seed = seed

    def generators(self, batch: Batch) -> list[torch.Generator]:
        """What the view of each row is drawn from."""
        assert batch.stored_B2 is not None
        return [
            torch.Generator().manual_seed(view_seed(self._seed, int(number), int(view)))
            for number, view in zip(batch.samples_B, batch.stored_B2[:, 0], strict=True)
        ]

    def rows(self, batch: Batch) -> Rows:
        """Unit vectors, float32, of the view and the caption of each row, on the CPU.

        Raises:
            TrainingError: a sample could not be used when the vectors were computed.
        """
        assert batch.stored_B2 is not None
        table, stored_B2 = self._table, batch.stored_B2.numpy()
        places = table.places(batch.samples_B.numpy())
        reasons = table.reasons[places]
        if (reasons != "").any():
            row = int(np.argmax(reasons != ""))
            raise TrainingError(
                f"{batch.places[row]}: the teacher's vectors of this sample are missing, because "
                f"it could not be used when they were computed ({reasons[row]}); remove the stored "
                "vectors (objective.teacher_features) to compute them again"
            )
        features = {
            TEACHER_IMAGE: torch.from_numpy(table.image_features(places, stored_B2[:, 0])),
            TEACHER_TEXT: table.text_inputs(table.starts[places] + stored_B2[:, 1]),
        }
        return {name: F.normalize(one.float(), dim=-1) for name, one in features.items()}


def store_teacher(source: FeatureSource, teacher: Teacher, *, precision: str) -> StoredTeacher:
    """A teacher's vectors of all samples, computed where they are not stored yet.

    Every rank calls it. The teacher is not needed afterwards.

    Args:
        source: the data, with the student's decoder.
        teacher: the teacher.
        precision: what it computes in.

    Raises:
        TrainingError: the ranks do not see the same folder, or there is no room in it.
    """
    source = replace(source, setting="objective.teacher_features")
    stores = stored_features(source, _Whole(teacher), teacher.parts, precision=precision)
    table = FeatureTable(
        *stores, source.numbers, views=source.settings.views, shard_set=source.shard_set
    )
    return StoredTeacher(table, source.seed)


class _Whole:
    """A teacher's towers with their heads."""

    stored: tuple[Tower, ...] = ("image", "text")

    def __init__(self, teacher: Teacher) -> None:
        self.device = teacher.device
        self._teacher = teacher

    def images(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        return self._teacher.images(image_BCHW)

    def texts(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        return self._teacher.texts(tokens_BL)

    def fingerprint(self, parts: ModelParts, tower: Tower) -> str:
        return f"{self._teacher.fingerprint} {tower} {tokenizer_fingerprint(parts)}"
