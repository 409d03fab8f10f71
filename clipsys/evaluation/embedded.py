"""The images of a data set with their vectors: what tasks measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clipsys.corpora.records import Record
from clipsys.errors import DataError

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class EmbeddedImages:
    """The usable images of a data set, in its order.

    Attributes:
        records: N; their ``read`` gives the image's bytes again.
        vectors_ND: (N, D) float32 of unit norm.
        contents: N hashes of the images' bytes; equal ones are the same picture.
    """

    records: Sequence[Record]
    vectors_ND: Floats
    contents: Sequence[str]

    def __len__(self) -> int:
        return len(self.records)

    def labels(self, data: str) -> list[str]:
        """The label of each image.

        Args:
            data: what messages call the data set.

        Raises:
            DataError: an image has none.
        """
        unlabelled = next((record.uri for record in self.records if record.label is None), None)
        if unlabelled:
            raise DataError(
                f"{data}: {unlabelled} has no label; expected one folder per class, a label "
                "column, .cls members, or a metadata key that every image has (--label-key)"
            )
        return [str(record.label) for record in self.records]

    def take(self, positions: npt.NDArray[np.int64]) -> EmbeddedImages:
        """Some of the images, in the order of their positions."""
        return EmbeddedImages(
            [self.records[position] for position in positions],
            self.vectors_ND[positions],
            [self.contents[position] for position in positions],
        )
