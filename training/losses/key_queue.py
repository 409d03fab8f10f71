"""MoCo's loss and its queue.

Shapes: B rows of this rank, N = W·B rows of all W ranks, K keys of the queue, D width.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn import functional as F  # noqa: N812

from clipsys.errors import ConfigError
from clipsys.training.distributed.collectives import gather_rows


def moco(
    query_BD: torch.Tensor,
    key_BD: torch.Tensor,
    queue_KD: torch.Tensor,
    temperature: float | torch.Tensor = 0.2,
) -> torch.Tensor:
    """Cross-entropy of each query's own key against a queue of negatives.

    Inputs:
        ``query_BD`` (B, D) of this rank, unit norm, with gradients; ``key_BD`` (B, D), the keys of
        the same images, and ``queue_KD`` (K, D), equal on every rank, both without gradients.
        ``temperature`` may be a tensor, which then gets a gradient.

    Recommendations:
        Memory is O(B · K) for the logits of this rank.

    Relations:
        `nt_xent` takes its negatives from the batch. Nothing is gathered here: a query meets its
        own key and the queue, so each rank's mean is its share.

    References:
        He et al. 2020, "Momentum Contrast for Unsupervised Visual Representation Learning",
        equation 1.

    Returns:
        This rank's share, a scalar, float32 (float64 for float64 features).

    Raises:
        ConfigError: the shapes do not fit.
    """
    if query_BD.ndim != 2 or query_BD.shape != key_BD.shape or len(query_BD) == 0:
        raise ConfigError(
            f"moco: queries {tuple(query_BD.shape)} and keys {tuple(key_BD.shape)}; expected the "
            "same (B, D) with B of 1 or more"
        )
    if queue_KD.ndim != 2 or queue_KD.shape[1] != query_BD.shape[1]:
        raise ConfigError(
            f"moco: the queue has shape {tuple(queue_KD.shape)}; expected (K, {query_BD.shape[1]})"
        )
    dtype = torch.promote_types(query_BD.dtype, torch.float32)
    query_BD = query_BD.to(dtype)
    positive_B1 = (query_BD * key_BD.detach().to(dtype)).sum(dim=1, keepdim=True)
    negative_BK = query_BD @ queue_KD.detach().to(dtype).T
    logits_BK = torch.cat([positive_B1, negative_BK], dim=1) / temperature
    # The queries' own keys stand in column 0.
    own_B = torch.zeros(len(query_BD), dtype=torch.int64, device=query_BD.device)
    return F.cross_entropy(logits_BK, own_B)


def enqueued(
    queue_KD: torch.Tensor, key_BD: torch.Tensor, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """The queue after the keys of all ranks have entered it, in rank order; the oldest leave.

    K need not be a multiple of N, nor larger than it: the newest K keys stay. The result is a new
    tensor, equal on every rank.
    """
    key_ND = gather_rows(key_BD.detach().to(queue_KD.dtype), group)
    return torch.cat([queue_KD, key_ND])[-len(queue_KD) :].clone()
