"""The losses over a memory bank of all training samples, and its update.

Shapes: B rows of this rank, N = W·B rows of all W ranks, M entries of the bank, D width, m noise
samples a row, T rows of a tile.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn import functional as F  # noqa: N812

from clipsys.errors import ConfigError
from clipsys.training.distributed.collectives import gather_rows
from clipsys.training.losses.contrastive import auto_tile_size
from clipsys.training.losses.tiled import differentiable, inverse_temperature, row_softmax
from clipsys.training.losses.tiles import LogitTiles, Pairing


class _QueryGradients(NamedTuple):
    """Gradients towards queries (B, D) and scale (); the bank gets none."""

    query_BD: torch.Tensor
    scale: torch.Tensor


def bank_softmax(
    features_BD: torch.Tensor,
    bank_MD: torch.Tensor,
    samples_B: torch.Tensor,
    temperature: float | torch.Tensor = 0.07,
) -> torch.Tensor:
    """Cross-entropy of each sample's own entry against all entries of the bank.

    Inputs:
        ``features_BD`` (B, D) of this rank, unit norm, with gradients; ``bank_MD`` (M, D), unit
        norm, equal on every rank, without gradients; ``samples_B`` (B,) integers: which entry is
        whose. ``temperature`` may be a tensor, which then gets a gradient.

    Recommendations:
        For banks of up to some hundred thousand entries; beyond, `bank_nce`, which takes O(m)
        instead of O(M) for a row. Memory is O(tile · M): logits exist a tile at a time.

    Relations:
        `bank_nce` estimates this. `moco` has a queue of recent keys in place of the bank. Nothing
        is gathered: each rank's mean is its share.

    References:
        Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination",
        equations 2 and 3.

    Returns:
        This rank's share, a scalar, float32 (float64 for float64 features).

    Raises:
        ConfigError: the shapes do not fit, or a sample has no entry.
    """
    _check("bank_softmax", features_BD, bank_MD, samples_B)
    dtype, scale = _dtype_and_scale(features_BD, temperature)
    bank_MD = bank_MD.detach().to(dtype)
    compute = partial(_all_entries, bank_MD=bank_MD, samples_B=samples_B)
    return differentiable(compute, features_BD.to(dtype), scale)


def _all_entries(
    query_BD: torch.Tensor,
    scale: torch.Tensor,
    needs_gradients: bool,
    *,
    bank_MD: torch.Tensor,
    samples_B: torch.Tensor,
) -> tuple[torch.Tensor, _QueryGradients | None]:
    own_BD = bank_MD[samples_B]
    mean = 1 / len(query_BD)
    total = scale.new_zeros((), dtype=torch.float64)
    gradient_BD = torch.zeros_like(query_BD)
    tile_size = auto_tile_size(len(bank_MD), query_BD.device)
    tiles = LogitTiles(query_BD, bank_MD, scale, tile_size, Pairing())
    for rows in tiles.rows():
        weight_TU, largest_T1, sum_T1 = row_softmax(tiles, rows)
        total += (sum_T1.log() + largest_T1).sum(dtype=torch.float64)
        for columns in tiles.columns() if needs_gradients else ():
            if not tiles.has_whole_rows:
                weight_TU = tiles.logits(rows, columns).sub_(largest_T1).exp_()
            gradient_BD[rows].addmm_(weight_TU.mul_(mean / sum_T1), bank_MD[columns])
    matched = (query_BD * own_BD).sum(dtype=torch.float64)
    value = ((total - matched * scale) * mean).to(query_BD.dtype)
    if not needs_gradients:
        return value, None
    return value, _scaled(query_BD, gradient_BD.sub_(own_BD, alpha=mean), scale)


def bank_nce(
    features_BD: torch.Tensor,
    bank_MD: torch.Tensor,
    samples_B: torch.Tensor,
    noise_Bm: torch.Tensor,
    log_normaliser: float | torch.Tensor,
    temperature: float | torch.Tensor = 0.07,
) -> torch.Tensor:
    """Noise-contrastive estimate of `bank_softmax`: each entry is data or noise.

    With P(i) = exp(v_i · f / temperature) / Z and noise that is uniform over the M entries, an
    entry i is data with the probability h(i) = P(i) / (P(i) + m / M). The loss of a sample is
    -log h of its own entry, minus the sum of log(1 - h) over its m noise samples.

    Inputs:
        As for `bank_softmax`. ``noise_Bm`` (B, m) integers: entries drawn uniformly, a sample's own
        one not excluded. ``log_normaliser``: log Z, a constant of the run, which
        `bank_log_normaliser` estimates from the first batch. It is a logarithm, since Z itself
        passes the range of float32 at low temperatures.

    Recommendations:
        m of 4,096 in the paper: kNN accuracy on CIFAR-10 rises from 42.5 (m = 1) to 80.2 there,
        against 80.8 for the full softmax (table 2). The temperature must stay as it was when Z
        was estimated.

    Relations:
        `bank_softmax` is what it estimates. InfoNCE compares entries with each other and needs no
        Z.

    References:
        Wu et al. 2018, equations 4 (P), 5 to 7 (h, the loss, Z); Gutmann and Hyvärinen 2010,
        "Noise-Contrastive Estimation".

    Returns:
        This rank's share, a scalar, float32 (float64 for float64 features).

    Raises:
        ConfigError: the shapes do not fit, or a sample has no entry.
    """
    _check("bank_nce", features_BD, bank_MD, samples_B)
    _check_noise("bank_nce", noise_Bm, len(features_BD))
    dtype, scale = _dtype_and_scale(features_BD, temperature)
    # logit h(i) = v_i · f / temperature - offset
    log_z = torch.as_tensor(log_normaliser, dtype=torch.float64, device=features_BD.device)
    offset = log_z.reshape(()) + math.log(noise_Bm.shape[1] / len(bank_MD))
    compute = partial(
        _data_or_noise,
        bank_MD=bank_MD.detach(),
        samples_B=samples_B,
        noise_Bm=noise_Bm,
        offset=offset.to(dtype),
    )
    return differentiable(compute, features_BD.to(dtype), scale)


def _data_or_noise(
    query_BD: torch.Tensor,
    scale: torch.Tensor,
    needs_gradients: bool,
    *,
    bank_MD: torch.Tensor,
    samples_B: torch.Tensor,
    noise_Bm: torch.Tensor,
    offset: torch.Tensor,
) -> tuple[torch.Tensor, _QueryGradients | None]:
    own_BD = bank_MD[samples_B].to(query_BD.dtype)
    own_logit_B = (query_BD * own_BD).sum(dim=1) * scale - offset
    total = F.softplus(-own_logit_B).sum(dtype=torch.float64)
    mean = 1 / len(query_BD)
    gradient_BD = own_BD * (-mean * torch.sigmoid(-own_logit_B))[:, None]
    for rows in _noise_rows(noise_Bm, bank_MD):
        entry_TmD = bank_MD[noise_Bm[rows]].to(query_BD.dtype)
        logit_Tm = torch.einsum("td,tmd->tm", query_BD[rows], entry_TmD) * scale - offset
        total += F.softplus(logit_Tm).sum(dtype=torch.float64)
        if needs_gradients:
            weight_Tm = torch.sigmoid(logit_Tm).mul_(mean)
            gradient_BD[rows] += torch.einsum("tm,tmd->td", weight_Tm, entry_TmD)
    value = (total * mean).to(query_BD.dtype)
    return value, _scaled(query_BD, gradient_BD, scale) if needs_gradients else None


@torch.no_grad()
def bank_log_normaliser(
    features_BD: torch.Tensor,
    bank_MD: torch.Tensor,
    noise_Bm: torch.Tensor,
    temperature: float | torch.Tensor = 0.07,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Log of Z for `bank_nce`: M times the mean of exp(v · f / temperature) over the noise.

    Equal on every rank; that of the paper's equation 7, averaged over the rows of all ranks.

    Returns:
        A float64 scalar without gradient.

    Raises:
        ConfigError: the shapes do not fit.
    """
    _check_noise("bank_log_normaliser", noise_Bm, len(features_BD))
    dtype, scale = _dtype_and_scale(features_BD, temperature)
    query_BD = features_BD.to(dtype)
    logits_B = torch.cat(
        [
            torch.einsum("td,tmd->tm", query_BD[rows], bank_MD[noise_Bm[rows]].to(dtype))
            .mul(scale)
            .double()
            .logsumexp(dim=1)
            for rows in _noise_rows(noise_Bm, bank_MD)
        ]
    )
    logits_N = gather_rows(logits_B, group)
    # Every rank holds the same sums in the same order: the same bits everywhere.
    return logits_N.logsumexp(dim=0) + math.log(len(bank_MD) / (len(logits_N) * noise_Bm.shape[1]))


@torch.no_grad()
def bank_updated(
    bank_MD: torch.Tensor,
    features_BD: torch.Tensor,
    samples_B: torch.Tensor,
    momentum: float = 0.5,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """The bank after the features of all ranks: v <- norm(momentum · v + (1 - momentum) · f).

    Wu et al. 2018, section 3 ("proximal regularization" aside), as in their code. Of a sample that
    occurs several times in the batch the last row counts, in rank order: one outcome, whatever the
    device and the number of ranks.

    Returns:
        A new tensor, equal on every rank.

    Raises:
        ConfigError: the shapes do not fit, or a sample has no entry.
    """
    _check("bank_updated", features_BD, bank_MD, samples_B)
    feature_ND = gather_rows(features_BD.detach().to(bank_MD.dtype), group)
    sample_N = gather_rows(samples_B.to(torch.int64), group)
    # Writing repeated rows at once has no defined outcome: each entry is written once.
    entry_E, inverse_N = torch.unique(sample_N, return_inverse=True)
    position_N = torch.arange(len(sample_N), device=sample_N.device)
    last_E = torch.zeros_like(entry_E).scatter_reduce_(0, inverse_N, position_N, "amax")
    moved_ED = momentum * bank_MD[entry_E] + (1 - momentum) * feature_ND[last_E]
    bank_MD = bank_MD.clone()
    bank_MD[entry_E] = F.normalize(moved_ED, dim=-1)
    return bank_MD


def _noise_rows(noise_Bm: torch.Tensor, bank_MD: torch.Tensor) -> list[slice]:
    """Rows whose noise entries are read at once."""
    size = auto_tile_size(noise_Bm.shape[1] * bank_MD.shape[1], noise_Bm.device)
    return [slice(start, start + size) for start in range(0, len(noise_Bm), size)]


def _scaled(
    query_BD: torch.Tensor, gradient_BD: torch.Tensor, scale: torch.Tensor
) -> _QueryGradients:
    """From gradients towards cosines to gradients towards queries and scale."""
    of_scale = (query_BD * gradient_BD).sum(dtype=torch.float64).to(scale.dtype)
    return _QueryGradients(gradient_BD * scale, of_scale)


def _dtype_and_scale(
    features_BD: torch.Tensor, temperature: float | torch.Tensor
) -> tuple[torch.dtype, torch.Tensor]:
    dtype = torch.promote_types(features_BD.dtype, torch.float32)
    return dtype, inverse_temperature(temperature, features_BD)


def _check(
    name: str, features_BD: torch.Tensor, bank_MD: torch.Tensor, samples_B: torch.Tensor
) -> None:
    if features_BD.ndim != 2 or len(features_BD) == 0 or bank_MD.ndim != 2 or (
        features_BD.shape[1] != bank_MD.shape[1]
    ):  # fmt: skip
        raise ConfigError(
            f"{name}: features {tuple(features_BD.shape)} and a bank of {tuple(bank_MD.shape)}; "
            "expected (B, D) with B of 1 or more, and (M, D)"
        )
    if samples_B.shape != features_BD.shape[:1]:
        raise ConfigError(
            f"{name}: samples {tuple(samples_B.shape)}; expected ({len(features_BD)},)"
        )
    first, last = int(samples_B.min()), int(samples_B.max())
    if first < 0 or last >= len(bank_MD):
        raise ConfigError(
            f"{name}: sample {first if first < 0 else last} has no entry in a bank of "
            f"{len(bank_MD)}; the bank needs an entry for each training sample"
        )


def _check_noise(name: str, noise_Bm: torch.Tensor, num_rows: int) -> None:
    if noise_Bm.ndim != 2 or len(noise_Bm) != num_rows or noise_Bm.shape[1] == 0:
        raise ConfigError(
            f"{name}: noise {tuple(noise_Bm.shape)} for {num_rows} rows; expected ({num_rows}, m) "
            "with m of 1 or more"
        )
