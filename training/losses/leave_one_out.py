"""LooC's loss: MoCo in several spaces, each of which leaves one augmentation out of its invariance.

Shapes: B rows of this rank, H heads (spaces) and as many keys of each image, K keys of the queue,
D width.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F  # noqa: N812

from clipsys.errors import ConfigError


def looc(
    query_BHD: torch.Tensor,
    key_BHVD: torch.Tensor,
    queue_KHD: torch.Tensor,
    temperature: float | torch.Tensor = 0.2,
) -> torch.Tensor:
    """Leave-one-out contrastive loss: the mean over heads of a cross-entropy among keys.

    Key 0 of an image shares no augmentation with the query, key i shares the i-th. Head 0 is
    invariant to all: key 0 against the queue. In head i the positive is key i, and the negatives
    are the queue and all other keys of the same image, key 0 among them: they show the same thing
    under another i-th augmentation, and only a space that keeps it can tell them apart.

    Inputs:
        ``query_BHD`` (B, H, D) of this rank, unit norm, with gradients: what each head makes of the
        query. ``key_BHVD`` (B, H, H, D): what each head (second dimension) makes of each key
        (third). ``queue_KHD`` (K, H, D), equal on every rank: for head i, keys i of other images.
        Keys and queue are without gradients. ``temperature`` may be a tensor, which then gets one.

    Recommendations:
        Memory is O(B · H · K) for the logits of this rank, H times that of `moco`.

    Relations:
        With one head it is `moco`. Nothing is gathered here: a query meets its own image's keys and
        the queue, so each rank's mean is its share.

    References:
        Xiao et al. 2021, "What Should Not Be Contrastive in Contrastive Learning", equation 2.

    Returns:
        This rank's share, a scalar, float32 (float64 for float64 features).

    Raises:
        ConfigError: the shapes do not fit.
    """
    if query_BHD.ndim != 3 or 0 in query_BHD.shape[:2]:
        raise ConfigError(
            f"looc: queries {tuple(query_BHD.shape)}; expected (B, H, D) with B and H of 1 or more"
        )
    num_rows, num_heads, width = query_BHD.shape
    if tuple(key_BHVD.shape) != (num_rows, num_heads, num_heads, width):
        raise ConfigError(
            f"looc: keys {tuple(key_BHVD.shape)}; expected what each head makes of each key, "
            f"{(num_rows, num_heads, num_heads, width)}"
        )
    if queue_KHD.ndim != 3 or tuple(queue_KHD.shape[1:]) != (num_heads, width):
        raise ConfigError(
            f"looc: the queue has shape {tuple(queue_KHD.shape)}; expected "
            f"(K, {num_heads}, {width})"
        )
    dtype = torch.promote_types(query_BHD.dtype, torch.float32)
    with torch.autocast(query_BHD.device.type, enabled=False):
        query_BHD = query_BHD.to(dtype)
        own_BHV = torch.einsum("bhd,bhvd->bhv", query_BHD, key_BHVD.detach().to(dtype))
        other_BHK = torch.einsum("bhd,khd->bhk", query_BHD, queue_KHD.detach().to(dtype))
    logits_BHX = torch.cat([own_BHV, other_BHK], dim=2) / temperature
    # Head 0 is to map all keys of an image to one point: none of them is a negative there. Left out
    # after the division, which would give the temperature a gradient of 0 times infinity.
    is_left_out_HX = torch.zeros(logits_BHX.shape[1:], dtype=torch.bool, device=logits_BHX.device)
    is_left_out_HX[0, 1:num_heads] = True
    logits_BHX = logits_BHX.masked_fill(is_left_out_HX, -torch.inf)
    positive_BH = torch.arange(num_heads, device=logits_BHX.device).expand(num_rows, num_heads)
    return F.cross_entropy(logits_BHX.flatten(0, 1), positive_BH.flatten())
