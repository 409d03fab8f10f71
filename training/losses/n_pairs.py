"""The N-pair loss over all ranks, exact in value and gradient.

Shapes: B rows of this rank, C = W·B rows of all W ranks, D width.
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


def n_pair(
    anchor_BD: torch.Tensor,
    positive_BD: torch.Tensor,
    l2: float = 0.0,
    group: dist.ProcessGroup | None = None,
    *,
    labels_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """N-pair loss: each anchor against its own positive and those of all other pairs.

    The mean over the anchors of all ranks of log(1 + Σ_j exp(a·p_j - a·p)), plus ``l2`` times the
    mean squared length of all rows. Products are not normalised: length is part of what is learned,
    and ``l2`` bounds it.

    With labels, an anchor's positive is that of the next row of its label, in rank order and from
    the last back to the first, so that a pair is of two samples wherever a label occurs twice; and
    other rows of its label are not among its negatives.

    Inputs:
        ``anchor_BD`` and ``positive_BD`` (B, D) of this rank, row for row; ``labels_B`` (B,)
        integers or None. B is the same on every rank.

    Recommendations:
        Sohn regularises lengths; without ``l2`` they grow, since that sharpens the softmax.

    Relations:
        It is `info_nce_views` at temperature 1 on rows that are not normalised.
        pytorch-metric-learning's NPairsLoss normalises unless it is given another distance, which
        is not the paper's loss, and its wrapper for several ranks is wrong: two ranks gave a
        gradient 53 % off.

    References:
        Sohn 2016, "Improved Deep Metric Learning with Multi-class N-pair Loss Objective",
        equation 7 and section 3.2.2 (regularisation).

    Returns:
        This rank's share, a scalar, float32 (float64 for float64 features): averaged over ranks, as
        DDP and DeepSpeed do with gradients, it is the loss of the whole batch.

    Raises:
        ConfigError: the shapes do not fit.
    """
    if anchor_BD.ndim != 2 or anchor_BD.shape != positive_BD.shape or len(anchor_BD) == 0:
        raise ConfigError(
            f"n_pair: anchors {tuple(anchor_BD.shape)} and positives {tuple(positive_BD.shape)}; "
            "expected the same (B, D) with B of 1 or more"
        )
    if labels_B is not None and labels_B.shape != anchor_BD.shape[:1]:
        raise ConfigError(
            f"n_pair: labels {tuple(labels_B.shape)} for {len(anchor_BD)} rows; expected "
            f"({len(anchor_BD)},)"
        )
    dtype = torch.promote_types(anchor_BD.dtype, torch.float32)
    anchor_BD, positive_BD = anchor_BD.to(dtype), positive_BD.to(dtype)
    positive_CD = gather_rows(positive_BD, group)
    pairing = Pairing(rank(group) * len(anchor_BD))
    if labels_B is not None:
        label_C = gather_rows(labels_B.to(torch.int64), group)
        positive_CD = positive_CD[next_of_label(label_C)]
        pairing = Pairing(pairing.start, label_C, ignore=True)
    compute = partial(
        one_way,
        pairing=pairing,
        tile_size=auto_tile_size(len(positive_CD), anchor_BD.device),
    )
    # In float64: without normalisation the products of an untrained model are all but equal, and
    # their rounding in float32 was 1e-5 of the gradient.
    scale = torch.ones((), dtype=torch.float64, device=anchor_BD.device)
    value = differentiable(compute, anchor_BD.double(), positive_CD.double(), scale).to(dtype)
    lengths = (anchor_BD.square().sum(dim=1).mean() + positive_BD.square().sum(dim=1).mean()) / 2
    return value + l2 * lengths


def next_of_label(label_C: torch.Tensor) -> torch.Tensor:
    """(C,) which row of its label follows each row; the first follows the last."""
    order_C = torch.argsort(label_C, stable=True)
    _, counts = torch.unique_consecutive(label_C[order_C], return_counts=True)
    ends = counts.cumsum(0)
    following_C = order_C.roll(-1)
    following_C[ends - 1] = order_C[ends - counts]
    return torch.empty_like(order_C).scatter_(0, order_C, following_C)
