"""MoCo v3's loss: queries against the momentum keys of the whole batch.

Shapes: B rows of this rank, N = W·B rows of all W ranks, D width.
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


def moco_v3(
    query_BD: torch.Tensor,
    key_BD: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Cross-entropy of queries against the keys of all ranks, times twice the temperature.

    A query's positive is the key of its own image, its negatives are the keys of all other images
    of the batch. The symmetric loss of the paper is the sum of two such terms, with the views'
    parts exchanged.

    Inputs:
        ``query_BD`` (B, D) of this rank, unit norm, with gradients; ``key_BD`` (B, D), the momentum
        tower's keys of the same images, unit norm, through which no gradient passes. B is the same
        on every rank. ``temperature`` may be a tensor, which then gets the gradient of the
        cross-entropy; the factor in front of it is a constant.

    Recommendations:
        Memory is O(tile · N), however large the batch: logits exist a tile at a time. The factor
        keeps the gradient's size when the temperature changes, so rates need not change with it.

    Relations:
        `moco` takes its negatives from a queue. `nt_xent` has negatives among the queries too, and
        gradients through both sides.

    References:
        Chen et al. 2021, "An Empirical Study of Training Self-Supervised Vision Transformers",
        algorithm 1 (the function ``ctr``).

    Returns:
        This rank's share, a scalar, float32 (float64 for float64 features): averaged over ranks, as
        DDP and DeepSpeed do with gradients, it is the loss of the whole batch.

    Raises:
        ConfigError: the shapes do not fit.
    """
    if query_BD.ndim != 2 or query_BD.shape != key_BD.shape or len(query_BD) == 0:
        raise ConfigError(
            f"moco_v3: queries {tuple(query_BD.shape)} and keys {tuple(key_BD.shape)}; expected "
            "the same (B, D) with B of 1 or more"
        )
    dtype = torch.promote_types(query_BD.dtype, torch.float32)
    query_BD = query_BD.to(dtype)
    key_ND = gather_rows(key_BD.detach().to(dtype), group)
    temperature = torch.as_tensor(temperature, dtype=dtype, device=query_BD.device).reshape(())
    compute = partial(
        one_way,
        pairing=Pairing(rank(group) * len(query_BD)),
        tile_size=auto_tile_size(len(key_ND), query_BD.device),
    )
    entropy = differentiable(compute, query_BD, key_ND, 1 / temperature)
    return 2 * temperature.detach() * entropy
