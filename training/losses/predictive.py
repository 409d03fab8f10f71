"""Contrastive predictive coding's loss over all ranks, exact in value and gradient.

Shapes: B rows of this rank, N = W·B rows of all W ranks, K predicted steps, D width.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist

from clipsys.errors import ConfigError
from clipsys.training.distributed.collectives import gather_rows, rank
from clipsys.training.losses.contrastive import auto_tile_size
from clipsys.training.losses.tiled import differentiable, one_way
from clipsys.training.losses.tiles import Pairing


def cpc(
    predicted_BKD: torch.Tensor,
    future_BKD: torch.Tensor,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Cross-entropy of each row's own future against the futures of all rows, the mean over steps.

    For step k the scores are the products of a row's prediction with what comes k steps later in
    each of the N rows of all ranks.

    Inputs:
        ``predicted_BKD`` and ``future_BKD`` (B, K, D) of this rank, not normalised, both with
        gradients; B is the same on every rank.

    Recommendations:
        Memory is O(tile · N), however large the batch. Rows from one sequence are negatives of each
        other: many sequences make a better batch than long ones.

    Relations:
        `info_nce` in one direction, at temperature 1, once a step.

    References:
        van den Oord et al. 2018, "Representation Learning with Contrastive Predictive Coding",
        equations 3 and 4; ``predicted`` is W_k c_t, ``future`` is z_{t+k}.

    Returns:
        This rank's share, a scalar, float32 (float64 for float64 features).

    Raises:
        ConfigError: the shapes do not fit.
    """
    if (
        predicted_BKD.ndim != 3
        or predicted_BKD.shape != future_BKD.shape
        or (0 in predicted_BKD.shape[:2])
    ):
        raise ConfigError(
            f"cpc: predictions {tuple(predicted_BKD.shape)} and futures {tuple(future_BKD.shape)}; "
            "expected the same (B, K, D) with B and K of 1 or more"
        )
    dtype = torch.promote_types(predicted_BKD.dtype, torch.float32)
    predicted_BKD = predicted_BKD.to(dtype)
    future_NKD = gather_rows(future_BKD.to(dtype), group)
    compute = partial(
        one_way,
        pairing=Pairing(rank(group) * len(predicted_BKD)),
        tile_size=auto_tile_size(len(future_NKD), predicted_BKD.device),
    )
    one = predicted_BKD.new_ones(())
    steps = [
        differentiable(compute, predicted_BD, future_ND, one)
        for predicted_BD, future_ND in zip(
            predicted_BKD.unbind(1), future_NKD.unbind(1), strict=True
        )
    ]
    return torch.stack(steps).mean()
