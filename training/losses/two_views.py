"""SimCLR's loss over all ranks, exact in value and gradient.

Shapes: B rows of this rank, N = W·B rows of all W ranks, D width.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist

from clipsys.errors import ConfigError
from clipsys.training.distributed.collectives import gather_rows, rank, world_size
from clipsys.training.losses.contrastive import auto_tile_size
from clipsys.training.losses.tiled import differentiable, inverse_temperature, one_way
from clipsys.training.losses.tiles import Pairing


def nt_xent(
    first_BD: torch.Tensor,
    second_BD: torch.Tensor,
    temperature: float | torch.Tensor = 0.1,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Normalised temperature-scaled cross-entropy between two views (NT-Xent).

    Each of the 2N views of all ranks is an anchor once: its positive is the other view of its
    image, its negatives are the 2N - 2 views of all other images. The anchor itself is in neither;
    it is masked before the maximum of its row is taken, since at low temperatures its own
    similarity would drown all others.

    Inputs:
        ``first_BD`` and ``second_BD`` (B, D) of this rank, unit norm, row for row of the same
        image; B is the same on every rank. ``temperature`` may be a tensor, which then gets a
        gradient.

    Recommendations:
        Memory is O(tile · N), however large the batch: logits exist a tile at a time. Inputs that
        are not of unit norm give a finite loss of scaled products, which is seldom what is meant.

    Relations:
        `info_nce` with the terms within a view added. SupCon's L_out with the other view as the
        only positive is the same.

    References:
        Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations",
        equation 1 and algorithm 1.

    Returns:
        This rank's share, a scalar, float32 (float64 for float64 features): averaged over ranks, as
        DDP and DeepSpeed do with gradients, it is the loss of the whole batch.

    Raises:
        ConfigError: the shapes do not fit.
    """
    if first_BD.ndim != 2 or first_BD.shape != second_BD.shape or len(first_BD) == 0:
        raise ConfigError(
            f"nt_xent: views {tuple(first_BD.shape)} and {tuple(second_BD.shape)}; expected the "
            "same (B, D) with B of 1 or more"
        )
    dtype = torch.promote_types(first_BD.dtype, torch.float32)
    first_BD, second_BD = first_BD.to(dtype), second_BD.to(dtype)
    scale = inverse_temperature(temperature, first_BD)
    # Both views in one collective: each one makes the ranks wait for the slowest.
    both_N2D = gather_rows(torch.cat([first_BD, second_BD], dim=1), group)
    first_ND, second_ND = both_N2D.chunk(2, dim=1)
    num_rows = len(first_ND)
    start = rank(group) * len(first_BD)
    assert num_rows == world_size(group) * len(first_BD)
    # The other view stands first among an anchor's keys, its own view second.
    compute = partial(
        one_way,
        pairing=Pairing(start, masked=num_rows + start),
        tile_size=auto_tile_size(2 * num_rows, first_BD.device),
    )
    from_first = differentiable(compute, first_BD, torch.cat([second_ND, first_ND]), scale)
    from_second = differentiable(compute, second_BD, torch.cat([first_ND, second_ND]), scale)
    return (from_first + from_second) / 2
