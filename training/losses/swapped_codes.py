"""SwAV's loss over all ranks, exact in value and gradient.

Shapes: B samples of this rank with V views each, C of them with codes, K prototypes, Q earlier
samples of this rank's share of a queue, R = B + Q.
"""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch.nn import functional as F  # noqa: N812

from clipsys.errors import ConfigError
from clipsys.training.distributed.collectives import gather_rows

#: Logarithms of the sums of prototypes may differ by this much where factors are used: e^60 is far
#: from the largest float32.
_LARGEST_RANGE = 60.0


def swav(
    scores_BVK: torch.Tensor,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
    group: dist.ProcessGroup | None = None,
    *,
    num_codes: int = 2,
    queued_QCK: torch.Tensor | None = None,
) -> torch.Tensor:
    """Swapped prediction: each view predicts the codes of the other views of its sample.

    A code is how a view is shared out among the prototypes by `sinkhorn`, from its scores and those
    of all samples of all ranks. With q for the code of view c and z for the scores of view v, the
    loss is the mean over samples, over c and over v ≠ c of -Σ_k q_k log softmax(z / temperature)_k.
    Codes have no gradient.

    Inputs:
        ``scores_BVK`` (B, V, K) of this rank, V of 2 or more: cosines of features with prototypes.
        B is the same on every rank. The first ``num_codes`` views have codes; all predict.
        ``queued_QCK`` (Q, C, K): scores of earlier samples with the present prototypes, whose
        views share prototypes out too and are not in the loss. Each rank brings its share of them,
        which may differ in size.

    Recommendations:
        Codes of the two global crops only, which is the default. With fewer samples than
        prototypes, batch and queue together, there are not enough views to share out. A loss that
        stays at log K has collapsed: all scores are equal.

    Relations:
        `nt_xent` compares features with features. Ranks, like a queue, take part in the sums over
        samples; nothing but the logarithms of C · K sums passes between ranks, once an iteration.
        Codes of scores that are accumulated over several small batches would be other codes.

    References:
        Caron et al. 2020, "Unsupervised Learning of Visual Features by Contrasting Cluster
        Assignments", equations 2, 3 and 6, and its appendix on multi-crop.

    Returns:
        This rank's share, a scalar, float32 (float64 for float64 scores): averaged over ranks, as
        DDP and DeepSpeed do with gradients, it is the loss of the whole batch.

    Raises:
        ConfigError: the shapes do not fit.
    """
    _check(scores_BVK, num_codes, queued_QCK)
    scores_BVK = scores_BVK.to(torch.promote_types(scores_BVK.dtype, torch.float32))
    num_samples, num_views, _ = scores_BVK.shape
    coded_RCK = scores_BVK[:, :num_codes].detach()
    if queued_QCK is not None:
        coded_RCK = torch.cat([coded_RCK, queued_QCK.detach().to(coded_RCK.dtype)])
    code_BCK = sinkhorn(coded_RCK, epsilon, iterations, group)[:num_samples]
    codes = code_BCK.unbind(1)
    total = scores_BVK.new_zeros(())
    # View by view, with the sum of the other views' codes: fewer products, and no copies of views.
    for view, score_BK in enumerate(scores_BVK.unbind(1)):
        others = [code_BK for number, code_BK in enumerate(codes) if number != view]
        if others:
            log_share_BK = F.log_softmax(score_BK / temperature, dim=-1)
            target_BK = functools.reduce(torch.add, others)
            total = total - (target_BK * log_share_BK).sum()
    return total / (num_samples * num_codes * (num_views - 1))


@torch.no_grad()
def sinkhorn(
    scores_RCK: torch.Tensor,
    epsilon: float = 0.05,
    iterations: int = 3,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """How rows are shared out among prototypes, so that each prototype gets as much (Cuturi 2013).

    The matrix exp(scores / epsilon) of all rows of all ranks is scaled to equal sums over rows for
    each prototype, then to a sum of 1 in each row, ``iterations`` times; each c on its own. By
    factors of rows and prototypes where these stay in range, else by logarithms: exp overflows on
    scores that are no cosines, and in 16 bits on cosines of 1. Constant factors are left out: the
    last scaling makes up for them.

    Args:
        scores_RCK: of this rank's rows; ranks may have different numbers of rows.
        epsilon: the smaller, the nearer is a row to being given to one prototype.
        iterations: 1 or more.
        group: the ranks.

    Returns:
        Shares (R, C, K) of this rank's rows; they add up to 1 over K.
    """
    scaled_RCK = scores_RCK / epsilon
    scaling = _scaling(scaled_RCK, iterations, group)
    if scaling is not None:
        return scaling
    log_share_RCK = scaled_RCK
    for _ in range(iterations):
        of_rank_1CK = log_share_RCK.logsumexp(dim=0, keepdim=True)
        log_share_RCK = log_share_RCK - gather_rows(of_rank_1CK, group).logsumexp(dim=0)
        log_share_RCK = log_share_RCK.log_softmax(dim=-1)
    return log_share_RCK.exp()


def _scaling(
    scaled_RCK: torch.Tensor, iterations: int, group: dist.ProcessGroup | None
) -> torch.Tensor | None:
    """`sinkhorn` by factors of rows and prototypes, a third of the time; None where they overflow.

    Each row is divided by its largest element before the matrix is made, so that no element of it
    is infinite. What is None on one rank is None on all: it depends on gathered sums.
    """
    largest_RC1 = scaled_RCK.amax(dim=-1, keepdim=True)
    share_RCK = (scaled_RCK - largest_RC1).exp_()
    parts = share_RCK.unbind(1)  # matrices, which need no copies where einsum makes some
    top_1C1 = largest_RC1.amax(dim=0, keepdim=True)
    row_RC, offset_C1 = (largest_RC1 - top_1C1).exp()[..., 0], top_1C1[0]
    column_CK = torch.ones_like(scaled_RCK[0])
    for _ in range(iterations):
        sums = [row_R @ part_RK for row_R, part_RK in zip(row_RC.unbind(1), parts, strict=True)]
        of_rank_1CK = (torch.stack(sums).log() + offset_C1)[None]
        total_CK = gather_rows(of_rank_1CK, group).logsumexp(dim=0)
        least_C1, most_C1 = total_CK.amin(dim=-1, keepdim=True), total_CK.amax(dim=-1, keepdim=True)
        if not bool((most_C1 - least_C1 < _LARGEST_RANGE).all()):
            return None
        column_CK = (least_C1 - total_CK).exp()
        sums = [part_RK @ column_K for part_RK, column_K in zip(parts, column_CK, strict=True)]
        row_RC, offset_C1 = torch.stack(sums, dim=1).reciprocal(), torch.zeros_like(offset_C1)
    return share_RCK.mul_(column_CK).mul_(row_RC[..., None])


def _check(scores_BVK: torch.Tensor, num_codes: int, queued_QCK: torch.Tensor | None) -> None:
    if scores_BVK.ndim != 3 or 0 in scores_BVK.shape or scores_BVK.shape[1] < 2:
        raise ConfigError(
            f"swav: scores {tuple(scores_BVK.shape)}; expected (B, V, K): B samples in V of 2 or "
            "more views, compared with K prototypes"
        )
    num_views, num_prototypes = scores_BVK.shape[1:]
    if not 1 <= num_codes <= num_views:
        raise ConfigError(f"swav: num_codes is {num_codes}; expected 1 to {num_views}, the views")
    if queued_QCK is not None and queued_QCK.shape[1:] != (num_codes, num_prototypes):
        raise ConfigError(
            f"swav: queued scores {tuple(queued_QCK.shape)}; expected (Q, {num_codes}, "
            f"{num_prototypes})"
        )
