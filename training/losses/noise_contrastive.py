"""Losses of two views of each sample that tell them from noise: InfoNCE, NCE, logistic.

Shapes: B rows of this rank, N = W·B rows of all W ranks, D width.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.distributed as dist

from clipsys.errors import ConfigError
from clipsys.training.distributed.collectives import gather_rows, rank, world_size
from clipsys.training.losses.contrastive import auto_tile_size, sigmoid_loss
from clipsys.training.losses.tiled import differentiable, inverse_temperature, one_way
from clipsys.training.losses.tiles import Pairing


def info_nce_views(
    query_BD: torch.Tensor,
    key_BD: torch.Tensor,
    temperature: float | torch.Tensor = 0.1,
    group: dist.ProcessGroup | None = None,
    *,
    groups_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """InfoNCE in one direction: each query finds its own key among the keys of all ranks.

    Cross-entropy over the N keys of the scaled cosines. With groups, all keys of a query's group
    are its positives, over which the target is spread evenly.

    Inputs:
        ``query_BD`` and ``key_BD`` (B, D) of this rank, unit norm, row for row; ``groups_B`` (B,)
        integers or None. B is the same on every rank. ``temperature`` may be a tensor, which then
        gets a gradient.

    Recommendations:
        `nt_xent` has 2N - 2 negatives of each anchor where this has N - 1, for the same rows.

    Relations:
        `info_nce` is the mean of both directions. `nt_xent` adds the negatives within a view.
        `moco` takes its negatives from a queue.

    References:
        van den Oord et al. 2018, "Representation Learning with Contrastive Predictive Coding",
        equation 4.

    Returns:
        This rank's share, a scalar, float32 (float64 for float64 features): averaged over ranks, as
        DDP and DeepSpeed do with gradients, it is the loss of the whole batch.

    Raises:
        ConfigError: the shapes do not fit.
    """
    _check("info_nce_views", query_BD, key_BD, groups_B)
    dtype = torch.promote_types(query_BD.dtype, torch.float32)
    query_BD, key_ND = query_BD.to(dtype), gather_rows(key_BD.to(dtype), group)
    ids_N = None if groups_B is None else gather_rows(groups_B.to(torch.int64), group)
    compute = partial(
        one_way,
        pairing=Pairing(rank(group) * len(query_BD), ids_N),
        tile_size=auto_tile_size(len(key_ND), query_BD.device),
    )
    return differentiable(compute, query_BD, key_ND, inverse_temperature(temperature, query_BD))


def nce(
    anchor_BD: torch.Tensor,
    positive_BD: torch.Tensor,
    temperature: float | torch.Tensor = 0.1,
    log_normalizer: float | torch.Tensor = 0.0,
    num_outcomes: int | None = None,
    group: dist.ProcessGroup | None = None,
    *,
    groups_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """Noise-contrastive estimation: each key is told from k noise keys by a logistic classifier.

    The model's probability of a key is p(key | anchor) = e^{s/t} / Z, with s the cosine. The other
    rows of all ranks are the k = N - 1 noise keys of each anchor, drawn evenly from
    ``num_outcomes`` outcomes, so that p_n = 1 / num_outcomes. With Δ = s/t - log Z - log(k·p_n),
    the loss is the mean over anchors of -log σ(Δ of its key) - Σ over noise keys of log σ(-Δ).

    Inputs:
        ``anchor_BD`` and ``positive_BD`` (B, D) of this rank, unit norm, row for row;
        ``groups_B`` (B,) integers or None: keys of an anchor's group are no noise to it, but keys
        too. B is the same on every rank. ``temperature`` and ``log_normalizer`` may be tensors,
        which then get a gradient. ``num_outcomes`` is how many samples the noise comes from; None:
        the N - 1 other rows, so that k·p_n is 1.

    Recommendations:
        Learn ``log_normalizer``, from the log of ``num_outcomes``, which is right while all cosines
        are 0: each key then begins with odds of 1 to k. At 0, which Mnih and Teh fix it to, k noise
        keys of odds 1 to 1 outweigh the one key.

    Relations:
        It is `sigmoid_loss` (SigLIP) with a bias of -log Z - log(k·p_n); `logistic` is the same
        without one. `info_nce_views` needs no Z, since its softmax normalises over the batch.

    References:
        Gutmann and Hyvärinen 2010, "Noise-contrastive estimation: A new estimation principle for
        unnormalized statistical models", equations 3 to 5; Mnih and Teh 2012, "A Fast and Simple
        Algorithm for Training Neural Probabilistic Language Models", section 3 (k noise samples).

    Returns:
        This rank's share, as `info_nce_views`.

    Raises:
        ConfigError: the shapes do not fit, or the ranks have one row together, hence no noise.
    """
    _check("nce", anchor_BD, positive_BD, groups_B)
    num_noise = world_size(group) * len(anchor_BD) - 1
    if num_noise == 0:
        raise ConfigError("nce: one row over all ranks, which leaves no noise; use 2 or more")
    if num_outcomes is not None and num_outcomes < 1:
        raise ConfigError(f"nce: num_outcomes is {num_outcomes}; expected 1 or more")
    correction = math.log(num_noise / (num_outcomes or num_noise))
    dtype = torch.promote_types(anchor_BD.dtype, torch.float32)
    log_z = torch.as_tensor(log_normalizer, dtype=dtype, device=anchor_BD.device)
    scale = inverse_temperature(temperature, anchor_BD)
    return sigmoid_loss(
        anchor_BD, positive_BD, scale, -log_z - correction, groups=groups_B, group=group
    )


def logistic(
    anchor_BD: torch.Tensor,
    positive_BD: torch.Tensor,
    temperature: float | torch.Tensor = 0.1,
    group: dist.ProcessGroup | None = None,
    *,
    groups_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logistic loss of pairs: word2vec's negative sampling with all other rows as negatives.

    The mean over anchors of -log σ(s/t of its key) - Σ over all other keys of log σ(-s/t).

    Inputs:
        As `nce`.

    Recommendations:
        A cosine of 0 is the boundary, so that negatives are pushed to opposite directions: many
        dimensions and few negatives suit it. `nce` with a learned normaliser moves the boundary.

    Relations:
        `nce` without its normaliser and without its correction for noise: no estimate of a
        probability, as Goldberg and Levy show. `sigmoid_loss` with a bias of 0.

    References:
        Mikolov et al. 2013, "Distributed Representations of Words and Phrases and their
        Compositionality", equation 4; Goldberg and Levy 2014, "word2vec Explained".

    Returns:
        This rank's share, as `info_nce_views`.

    Raises:
        ConfigError: the shapes do not fit.
    """
    _check("logistic", anchor_BD, positive_BD, groups_B)
    scale = inverse_temperature(temperature, anchor_BD)
    bias = torch.zeros_like(scale)
    return sigmoid_loss(anchor_BD, positive_BD, scale, bias, groups=groups_B, group=group)


def _check(
    name: str, first_BD: torch.Tensor, second_BD: torch.Tensor, groups_B: torch.Tensor | None
) -> None:
    if first_BD.ndim != 2 or first_BD.shape != second_BD.shape or len(first_BD) == 0:
        raise ConfigError(
            f"{name}: views {tuple(first_BD.shape)} and {tuple(second_BD.shape)}; expected the "
            "same (B, D) with B of 1 or more"
        )
    if groups_B is not None and groups_B.shape != first_BD.shape[:1]:
        raise ConfigError(
            f"{name}: groups {tuple(groups_B.shape)} for {len(first_BD)} rows; expected "
            f"({len(first_BD)},)"
        )
