"""Vectors of all samples by the model as it is: every rank encodes its share.

Shapes: B rows of this rank, N = W·B rows of all W ranks, D width.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from clipsys.images.preprocessing import Preprocessing
from clipsys.progress import progress_if
from clipsys.training.data.augmentation import normalisation, to_input
from clipsys.training.data.batches import NO_SAMPLE
from clipsys.training.data.samples import Batch
from clipsys.training.distributed.collectives import gather_objects, gather_rows, rank
from clipsys.training.engine.deepspeed_engine import Engine


class Encoded(NamedTuple):
    """All samples, on rank 0; the other ranks have no rows.

    Attributes:
        image_ND: float32, unit norm.
        text_ND: float32, unit norm; of the texts below.
        groups_N: int64.
        usable_N: bool; whether a sample could be encoded.
        texts: the caption of each sample that was encoded; empty where there is none.
    """

    image_ND: npt.NDArray[np.float32]
    text_ND: npt.NDArray[np.float32]
    groups_N: npt.NDArray[np.int64]
    usable_N: npt.NDArray[np.bool_]
    texts: list[str]


def encode_samples(
    engine: Engine,
    batches: Generator[Batch, None, None],
    preprocessing: Preprocessing,
    *,
    num_samples: int,
    width: int,
) -> Encoded:
    """Encodes all samples without augmentation. Every rank must call it.

    Args:
        engine: with the model as it is.
        batches: this rank's share (`SampleShare`): as many batches on every rank, of equal size,
            since the model's parts are gathered inside each pass.
        preprocessing: what the image tower sees.
        num_samples: N.
        width: D.
    """
    # Rank 0 alone keeps vectors: the others would need as much memory for nothing.
    size = num_samples if rank() == 0 else 0
    found = Encoded(
        np.zeros((size, width), np.float32),
        np.zeros((size, width), np.float32),
        np.zeros(size, np.int64),
        np.zeros(size, np.bool_),
        [""] * size,
    )
    mean, std = normalisation(preprocessing, engine.device)
    own: dict[int, str] = {}
    with (
        closing(batches),
        engine.evaluating() as model,
        progress_if(rank() == 0, "Encoding samples to mine", num_samples) as advance,
    ):
        for batch in batches:
            assert batch.image_BCHW is not None
            pixels_BCHW = batch.image_BCHW.to(engine.device)
            image_BCHW = to_input(pixels_BCHW, preprocessing.size, mean, std)
            if engine.config.channels_last:
                image_BCHW = image_BCHW.contiguous(memory_format=torch.channels_last)
            image_BD = model.encode_image(image_BCHW)
            text_BD = model.encode_tokens(batch.texts[0].to(engine.device))
            numbers_B = batch.samples_B.tolist()
            own |= dict(zip(numbers_B, batch.captions, strict=True))
            advance(_collect(found, batch, torch.cat([image_BD, text_BD], dim=1)))
    own.pop(NO_SAMPLE, None)
    for part in gather_objects(own):
        for number, text in part.items() if rank() == 0 else ():
            found.texts[number] = text
    return found


def _collect(found: Encoded, batch: Batch, both_BX: torch.Tensor) -> int:
    """Puts the vectors of all ranks where they belong; the number of samples."""
    ids_B2 = torch.stack([batch.samples_B, batch.groups_B], dim=1).to(both_BX.device)
    both_NX, ids_N2 = gather_rows(both_BX.float()), gather_rows(ids_B2)
    if rank():
        return 0
    numbers_N, groups_N = ids_N2.cpu().numpy().T
    used_N = numbers_N != NO_SAMPLE
    numbers_N, vectors_NX = numbers_N[used_N], both_NX.cpu().numpy()[used_N]
    found.image_ND[numbers_N], found.text_ND[numbers_N] = np.split(vectors_NX, 2, axis=1)
    found.groups_N[numbers_N], found.usable_N[numbers_N] = groups_N[used_N], True
    return len(numbers_N)
