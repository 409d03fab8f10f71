"""Losses that decorrelate the features of two views: Barlow Twins and VICReg, over all ranks.

Neither compares an image with other images: what is minimised are statistics of the batch, which
are those of all ranks here. Every rank computes the same loss from the same sums.

Shapes: B rows of this rank, N = W·B rows of all W ranks, D width.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from clipsys.errors import ConfigError
from clipsys.training.distributed.collectives import sum_over_ranks, world_size

#: That of batch normalisation, with which the authors of Barlow Twins standardise.
_BARLOW_EPSILON = 1e-5
#: Added to the variance before its root is taken (VICReg, section 4.2).
_VICREG_EPSILON = 1e-4


def barlow_twins(
    first_BD: torch.Tensor,
    second_BD: torch.Tensor,
    off_diagonal: float = 0.0051,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Squared distance of the cross-correlation of two views from the identity.

    Σ (1 - c_ii)² + off_diagonal · Σ_{i≠j} c_ij², c being the correlation of feature i of the first
    view with feature j of the second over the rows of all ranks.

    Inputs:
        ``first_BD`` and ``second_BD`` (B, D) of this rank, row for row of the same image, as the
        projection gives them: they are standardised here and need no norm. B is the same on every
        rank, and N is 2 or more.

    Recommendations:
        Wide projections (the paper gains up to D = 16,384) and batches of any size: the paper
        measures 128 as well as 2,048. Memory is O(D²).

    Relations:
        `vicreg` keeps variances from vanishing instead of standardising. `nt_xent` compares rows
        where this compares features.

    References:
        Zbontar et al. 2021, "Barlow Twins: Self-Supervised Learning via Redundancy Reduction",
        equations 1 and 2. Mean and variance are those of all ranks and the sums between ranks are
        part of the graph: with each rank's own statistics the gradient was measured to be 66 % off
        on two ranks, and with sums outside of the graph it is divided by the number of ranks.

    Returns:
        This rank's share, a scalar, float32 (float64 for float64 features).

    Raises:
        ConfigError: the shapes do not fit, or there is a single row.
    """
    num_rows = _check("barlow_twins", first_BD, second_BD, group)
    with torch.autocast(first_BD.device.type, enabled=False):
        first_BD, second_BD = (
            _standardised(view_BD, num_rows, group) for view_BD in (first_BD, second_BD)
        )
        correlation_DD = sum_over_ranks(first_BD.T @ second_BD, group) / num_rows
        on_diagonal = (correlation_DD.diagonal() - 1).square().sum()
        return on_diagonal + off_diagonal * _off_diagonal(correlation_DD).square().sum()


def vicreg(
    first_BD: torch.Tensor,
    second_BD: torch.Tensor,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Distance of two views, with variances held at 1 or more and covariances at 0.

    invariance · mean squared difference + variance · mean over views of mean_i relu(1 - σ_i) +
    covariance · sum over views of Σ_{i≠j} C_ij² / D; σ and C over the rows of all ranks.

    Inputs:
        ``first_BD`` and ``second_BD`` (B, D) of this rank, row for row of the same image, as the
        projection gives them, neither normalised nor standardised. B is the same on every rank,
        and N is 2 or more.

    Recommendations:
        Where the two sides differ (encoders, modalities): nothing ties their statistics together.
        Wide projections; memory is O(D²).

    Relations:
        `barlow_twins` correlates one view with the other; here each view has a covariance of its
        own.

    References:
        Bardes et al. 2022, "VICReg: Variance-Invariance-Covariance Regularization for
        Self-Supervised Learning", equations 1 to 6, with the authors' halving of the variance term.

    Returns:
        This rank's share, a scalar, float32 (float64 for float64 features).

    Raises:
        ConfigError: the shapes do not fit, or there is a single row.
    """
    num_rows = _check("vicreg", first_BD, second_BD, group)
    width = first_BD.shape[1]
    with torch.autocast(first_BD.device.type, enabled=False):
        dtype = torch.promote_types(first_BD.dtype, torch.float32)
        # Ranks have as many rows each, so the mean of their means is that of all.
        loss = invariance * (first_BD.to(dtype) - second_BD.to(dtype)).square().mean()
        for view_BD in (first_BD, second_BD):
            centred_BD, squares_D = _centred(view_BD, num_rows, group)
            deviation_D = (squares_D / (num_rows - 1) + _VICREG_EPSILON).sqrt()
            loss = loss + variance / 2 * (1 - deviation_D).relu().mean()
            covariance_DD = sum_over_ranks(centred_BD.T @ centred_BD, group) / (num_rows - 1)
            loss = loss + covariance * _off_diagonal(covariance_DD).square().sum() / width
        return loss


def _standardised(
    view_BD: torch.Tensor, num_rows: int, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Features of mean 0 and variance 1 over the rows of all ranks; constant ones become 0."""
    centred_BD, squares_D = _centred(view_BD, num_rows, group)
    return centred_BD / (squares_D / num_rows + _BARLOW_EPSILON).sqrt()


def _centred(
    view_BD: torch.Tensor, num_rows: int, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features less their means over all ranks, and the sums of their squares, at least float32."""
    view_BD = view_BD.to(torch.promote_types(view_BD.dtype, torch.float32))
    centred_BD = view_BD - sum_over_ranks(view_BD.sum(dim=0), group) / num_rows
    return centred_BD, sum_over_ranks(centred_BD.square().sum(dim=0), group)


def _off_diagonal(square_DD: torch.Tensor) -> torch.Tensor:
    """(D² - D,) all but the diagonal, without a mask: each row begins one further on."""
    width = len(square_DD)
    return (
        square_DD.flatten()[1:].view(width - 1, width + 1)[:, :-1] if width > 1 else square_DD[:0]
    )


def _check(
    name: str, first_BD: torch.Tensor, second_BD: torch.Tensor, group: dist.ProcessGroup | None
) -> int:
    if first_BD.ndim != 2 or first_BD.shape != second_BD.shape or len(first_BD) == 0:
        raise ConfigError(
            f"{name}: views {tuple(first_BD.shape)} and {tuple(second_BD.shape)}; expected the "
            "same (B, D) with B of 1 or more"
        )
    num_rows = len(first_BD) * world_size(group)
    if num_rows < 2:
        raise ConfigError(f"{name}: one row has no statistics; expected 2 or more")
    return num_rows
