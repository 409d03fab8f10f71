"""Contrastive losses over all ranks, exact in value and gradient.

Each rank brings its own B rows and returns its share of the loss: averaging over ranks, as DDP and
DeepSpeed do, gives the loss and the gradient of one process on the full batch.

Shapes: B rows of this rank, N = W·B rows of all W ranks, D width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from clipsys.errors import ConfigError
from clipsys.training.distributed.collectives import gather_rows, rank, world_size
from clipsys.training.losses.tiled import differentiable, one_way, sigmoid, two_way
from clipsys.training.losses.tiles import Pairing

#: Logits held at once when no tile size is given. On a CPU 8 MiB of float32 stay in the cache; a
#: GPU wants larger products.
_TILE_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26, "mps": 1 << 24}
_SMALLEST_TILE = 16


def auto_tile_size(num_rows: int, device: torch.device) -> int:
    """Rows of logits held at once where no ``tile_size`` is given.

    Args:
        num_rows: N, the pairs of all ranks.
        device: what the loss is computed on.
    """
    elements = _TILE_ELEMENTS.get(device.type, 1 << 24)
    return max(_SMALLEST_TILE, elements // max(1, num_rows))


def info_nce(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    logit_scale: torch.Tensor,
    tile_size: int | None = None,
    groups: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    *,
    ignore_groups: bool = False,
) -> torch.Tensor:
    """Symmetric InfoNCE with negatives from every rank.

    Cross-entropy from images to texts and from texts to images, averaged (Radford et al. 2021,
    figure 3; van den Oord et al. 2018, equation 4). With ``groups``, samples of equal id are
    positives of each other wherever they are: targets are spread evenly over the positives, as in
    SupCon's L_out (Khosla et al. 2020, equation 2).

    Args:
        image_features: (B, D) of this rank, unit norm. B is the same on every rank.
        text_features: (B, D) of this rank, unit norm.
        logit_scale: one element, already exponentiated (the inverse temperature).
        tile_size: rows of logits held at once: memory is O(tile_size · N + N · D). None chooses by
            the device (`auto_tile_size`).
        groups: (B,) integer ids of this rank's samples; None makes each pair its own group.
        group: the process group; None is the default one.
        ignore_groups: others of a sample's group are not its positives, but left out of its
            negatives.

    Returns:
        This rank's share, a scalar, float32 (float64 for float64 features). Logits are computed in
        that precision whatever the features' dtype is: bf16 logits at scale 100 were measured to
        put 1-2 % of error on the gradient.

    Raises:
        ConfigError: shapes do not fit, or ``tile_size`` is not positive.
    """
    check_pairs("info_nce", image_features, text_features, groups, tile_size)
    dtype = torch.promote_types(image_features.dtype, torch.float32)
    image_BD, text_BD = image_features.to(dtype), text_features.to(dtype)
    scale = logit_scale.to(dtype).reshape(())
    pairing = pairing_of(groups, len(image_BD), group, ignore=ignore_groups)
    num_rows = len(image_BD) * world_size(group)
    rows = tile_size or auto_tile_size(num_rows, image_BD.device)
    if world_size(group) == 1:
        return both_ways(image_BD, text_BD, image_BD, text_BD, scale, pairing, rows)
    # Both towers in one collective: each one makes the ranks wait for the slowest.
    both_N2D = gather_rows(torch.cat([image_BD, text_BD], dim=1), group)
    image_ND, text_ND = both_N2D.chunk(2, dim=1)
    return both_ways(image_BD, text_BD, image_ND, text_ND, scale, pairing, rows)


def both_ways(
    image_BD: torch.Tensor,
    text_BD: torch.Tensor,
    image_ND: torch.Tensor,
    text_ND: torch.Tensor,
    scale: torch.Tensor,
    pairing: Pairing,
    tile_size: int,
) -> torch.Tensor:
    """Symmetric InfoNCE of this rank's rows with the rows of all ranks, in one precision."""
    if len(image_ND) == len(image_BD):
        return differentiable(
            partial(two_way, pairing=pairing, tile_size=tile_size), image_BD, text_BD, scale
        )
    image_to_text = cross_entropy(image_BD, text_ND, scale, pairing, tile_size)
    text_to_image = cross_entropy(text_BD, image_ND, scale, pairing, tile_size)
    return (image_to_text + text_to_image) / 2


def cross_entropy(
    query_BD: torch.Tensor,
    key_ND: torch.Tensor,
    scale: torch.Tensor,
    pairing: Pairing,
    tile_size: int,
) -> torch.Tensor:
    """`one_way`, by the fused kernels where they were measured to be faster (CUDA only)."""

    def tiled(query: torch.Tensor, key: torch.Tensor, scale: torch.Tensor, *_: Any) -> torch.Tensor:
        # Which key is whose does not matter for the time that this is measured by.
        any_pairing = Pairing(0, pairing.ids_C)
        compute = partial(one_way, pairing=any_pairing, tile_size=tile_size)
        return differentiable(compute, query, key, scale.reshape(()))

    # The kernels leave no pair out.
    if query_BD.is_cuda and not pairing.ignore and pairing.masked is None:
        from clipsys.training.losses.fused import FusedCrossEntropy, faster_tiling

        if tiling := faster_tiling(query_BD, key_ND, tiled):
            ids_N = pairing.ids_C
            if ids_N is None:
                ids_N = torch.arange(len(key_ND), device=key_ND.device)
            own_B = ids_N[pairing.own(len(query_BD))]
            fused: torch.Tensor = FusedCrossEntropy.apply(
                query_BD, key_ND, scale, own_B, ids_N, tiling
            )
            return fused
    compute = partial(one_way, pairing=pairing, tile_size=tile_size)
    return differentiable(compute, query_BD, key_ND, scale)


def sigmoid_loss(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    tile_size: int | None = None,
    groups: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    *,
    ignore_groups: bool = False,
) -> torch.Tensor:
    """Pairwise sigmoid loss (Zhai et al. 2023, equation 1) over the pairs of all ranks.

    Each image decides for each text whether they belong together: the sum of -log σ(z · (scale ·
    cosine + bias)) over all N² pairs divided by N, z being 1 for a pair and -1 otherwise. Arguments
    are those of `info_nce`, and samples of one group have z = 1 with each other (or are left out).

    Args:
        image_features: (B, D) of this rank, unit norm. B is the same on every rank.
        text_features: (B, D) of this rank, unit norm.
        logit_scale: one element, already exponentiated.
        logit_bias: one element, added to the logits.
        tile_size: rows of logits held at once; None chooses by the device.
        groups: (B,) integer ids of this rank's samples.
        group: the process group; None is the default one.
        ignore_groups: others of a sample's group are left out.

    Returns:
        This rank's share, a scalar, float32 (float64 for float64 features).

    Raises:
        ConfigError: shapes do not fit, or ``tile_size`` is not positive.
    """
    check_pairs("sigmoid_loss", image_features, text_features, groups, tile_size)
    dtype = torch.promote_types(image_features.dtype, torch.float32)
    image_BD = image_features.to(dtype)
    text_ND = gather_rows(text_features.to(dtype), group)
    pairing = pairing_of(groups, len(image_BD), group, ignore=ignore_groups)
    rows = tile_size or auto_tile_size(len(text_ND), image_BD.device)
    return differentiable(
        partial(sigmoid, pairing=pairing, tile_size=rows),
        image_BD,
        text_ND,
        logit_scale.to(dtype).reshape(()),
        logit_bias.to(dtype).reshape(()),
    )


def pairing_of(
    groups: torch.Tensor | None,
    local_size: int,
    group: dist.ProcessGroup | None,
    *,
    ignore: bool,
) -> Pairing:
    """Which texts of all ranks belong to this rank's images."""
    start = rank(group) * local_size
    if groups is None:
        return Pairing(start)
    return Pairing(start, gather_rows(groups.to(torch.int64), group), ignore)


def check_pairs(
    name: str,
    image_BD: torch.Tensor,
    text_BD: torch.Tensor,
    groups: torch.Tensor | None,
    tile_size: int | None,
) -> None:
    """Checks what the losses of pairs are given.

    Raises:
        ConfigError: shapes do not fit, or ``tile_size`` is not positive.
    """
    if image_BD.ndim != 2 or image_BD.shape != text_BD.shape or len(image_BD) == 0:
        raise ConfigError(
            f"{name}: image features {tuple(image_BD.shape)} and text features "
            f"{tuple(text_BD.shape)}; expected the same (B, D) with B of 1 or more"
        )
    if groups is not None and groups.shape != image_BD.shape[:1]:
        raise ConfigError(
            f"{name}: groups has shape {tuple(groups.shape)}; expected ({len(image_BD)},)"
        )
    if tile_size is not None and tile_size < 1:
        raise ConfigError(f"{name}: tile_size is {tile_size}; expected 1 or more")
