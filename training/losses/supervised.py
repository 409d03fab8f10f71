"""The supervised contrastive losses over all ranks, exact in value and gradient.

Shapes: B samples of this rank with V views each, R = V·B rows of this rank, C = W·R rows of all W
ranks, D width, T rows of a tile.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist

from clipsys.errors import ConfigError
from clipsys.training.distributed.collectives import gather_rows, rank, world_size
from clipsys.training.losses.contrastive import auto_tile_size
from clipsys.training.losses.tiled import (
    Gradients,
    differentiable,
    inverse_temperature,
    scaled_gradients,
)
from clipsys.training.losses.tiles import LogitTiles, Pairing

Form = Literal["out", "in"]


def supcon(
    features_BVD: torch.Tensor,
    labels_B: torch.Tensor,
    temperature: float | torch.Tensor = 0.07,
    form: Form = "out",
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Supervised contrastive loss: all rows of an equal label are positives of each other.

    Every row of all ranks is an anchor once. Its positives P are the other rows of its label, the
    other views of its own sample among them; it is compared with all rows but itself. With s for
    cosines and t for the temperature, ``out`` is the mean over anchors of
    -1/|P| Σ_p log(e^{s_p/t} / Σ_a e^{s_a/t}), and ``in`` takes the mean inside of the logarithm:
    -log(1/|P| Σ_p e^{s_p/t} / Σ_a e^{s_a/t}).

    Inputs:
        ``features_BVD`` (B, V, D) of this rank, unit norm, V of 1 or more; ``labels_B`` (B,)
        integers. B is the same on every rank. ``temperature`` may be a tensor, which then gets a
        gradient.

    Recommendations:
        ``out``: the paper measures it 11 points above ``in`` on ImageNet (table 1 there), since
        ``in`` lets a row be content with its nearest positive. Memory is O(tile · C): logits exist
        a tile at a time.

    Relations:
        With a label for each sample and two views it is `nt_xent`. `info_nce` with groups is
        ``out`` between two modalities. Anchors without a positive are left out of the mean, as in
        pytorch-metric-learning; SupContrast's code counts them as zeros, so its loss falls with
        the number of classes that occur once. Its factor of temperature / base_temperature is 1 at
        its defaults and left out here. solo-learn's "SupCon" is ``in``.

    References:
        Khosla et al. 2020, "Supervised Contrastive Learning", equations 2 (out) and 3 (in).

    Returns:
        This rank's share, a scalar, float32 (float64 for float64 features): averaged over ranks, as
        DDP and DeepSpeed do with gradients, it is the loss of the whole batch. 0 where no anchor
        has a positive.

    Raises:
        ConfigError: the shapes do not fit, or ``form`` is unknown.
    """
    _check(features_BVD, labels_B, form)
    dtype = torch.promote_types(features_BVD.dtype, torch.float32)
    feature_RD = features_BVD.to(dtype).flatten(0, 1)
    label_R = labels_B.repeat_interleave(features_BVD.shape[1])
    feature_CD, label_C = gather_rows(feature_RD, group), gather_rows(label_R, group)
    _, inverse_C, counts = torch.unique(label_C, return_inverse=True, return_counts=True)
    positives_C = counts[inverse_C] - 1
    num_anchors = int((positives_C > 0).sum())
    if num_anchors == 0:
        return feature_RD.sum() * 0
    start = rank(group) * len(feature_RD)
    own = slice(start, start + len(feature_RD))
    anchors = _Anchors(
        inverse_C[own],
        inverse_C,
        positives_C[own].to(dtype),
        # The mean over ranks of the shares is the mean over anchors.
        (positives_C[own] > 0).to(dtype) * (world_size(group) / num_anchors),
        start,
    )
    scale = inverse_temperature(temperature, feature_RD)
    tile_size = auto_tile_size(len(feature_CD), feature_RD.device)
    compute = partial(_entropy, anchors=anchors, form=form, tile_size=tile_size)
    return differentiable(compute, feature_RD, feature_CD, scale)


class _Anchors(NamedTuple):
    """What is known of this rank's rows.

    Attributes:
        label_R: labels of the rows.
        label_C: labels of the rows of all ranks.
        positives_R: how many positives each has.
        weight_R: what each counts in this rank's share; 0 without positives.
        start: row r is row ``start + r`` of all ranks.
    """

    label_R: torch.Tensor
    label_C: torch.Tensor
    positives_R: torch.Tensor
    weight_R: torch.Tensor
    start: int


def _entropy(
    query_RD: torch.Tensor,
    key_CD: torch.Tensor,
    scale: torch.Tensor,
    needs_gradients: bool,
    *,
    anchors: _Anchors,
    form: Form,
    tile_size: int,
) -> tuple[torch.Tensor, Gradients | None]:
    """Weighted sum over anchors, with its gradients; the dense loss is the oracle of its test."""
    # Self is masked before the maximum of a row is taken: at low temperatures it would drown all.
    pairing = Pairing(anchors.start, masked=anchors.start)
    tiles = LogitTiles(query_RD, key_CD, scale, tile_size, pairing, whole_rows=True)
    total = scale.new_zeros((), dtype=torch.float64)
    query_gradient_RD = torch.zeros_like(query_RD)
    key_gradient_CD = torch.zeros_like(key_CD)
    every_key = slice(0, len(key_CD))
    for rows in tiles.rows():
        logits_TC = tiles.logits(rows, every_key)
        is_positive_TC = anchors.label_R[rows, None] == anchors.label_C[None, :]
        _exclude_self(is_positive_TC, rows, anchors.start)
        count_T1, weight_T1 = anchors.positives_R[rows, None], anchors.weight_R[rows, None]
        denominator_T1 = logits_TC.logsumexp(dim=1, keepdim=True)
        if form == "out":
            mean_T1 = logits_TC.masked_fill(~is_positive_TC, 0).sum(dim=1, keepdim=True)
            mean_T1 = mean_T1 / count_T1.clamp(min=1)
            target_TC = is_positive_TC / count_T1.clamp(min=1)
        else:
            positive_TC = logits_TC.masked_fill(~is_positive_TC, -torch.inf)
            # A row without positives has no finite logit; its weight is 0.
            positive_TC[count_T1[:, 0] == 0] = 0
            mean_T1 = positive_TC.logsumexp(dim=1, keepdim=True) - count_T1.clamp(min=1).log()
            target_TC = positive_TC.softmax(dim=1)
        total += (weight_T1 * (denominator_T1 - mean_T1)).sum(dtype=torch.float64)
        if needs_gradients:
            gradient_TC = logits_TC.sub_(denominator_T1).exp_().sub_(target_TC).mul_(weight_T1)
            query_gradient_RD[rows].addmm_(gradient_TC, key_CD)
            key_gradient_CD.addmm_(gradient_TC.T, query_RD[rows])
    value = total.to(query_RD.dtype)
    if not needs_gradients:
        return value, None
    return value, scaled_gradients(query_RD, query_gradient_RD, key_gradient_CD, scale)


def _exclude_self(mask_TC: torch.Tensor, rows: slice, start: int) -> None:
    columns = slice(start + rows.start, start + rows.stop)
    mask_TC[:, columns].fill_diagonal_(False)


def _check(features_BVD: torch.Tensor, labels_B: torch.Tensor, form: str) -> None:
    if features_BVD.ndim != 3 or 0 in features_BVD.shape:
        raise ConfigError(
            f"supcon: features {tuple(features_BVD.shape)}; expected (B, V, D): V views of each of "
            "B samples"
        )
    if labels_B.shape != features_BVD.shape[:1]:
        raise ConfigError(
            f"supcon: labels {tuple(labels_B.shape)} for {len(features_BVD)} samples; expected "
            f"({len(features_BVD)},)"
        )
    if form not in ("out", "in"):
        raise ConfigError(f"supcon: form is {form!r}; expected out or in")
