"""InfoNCE with further texts that no image belongs to.

Shapes: B rows of this rank, N = W·B rows of all W ranks, T further texts of a row, C = N texts and
the further ones that are there, D width.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist

from clipsys.errors import ConfigError
from clipsys.training.distributed.collectives import gather_rows
from clipsys.training.losses.contrastive import (
    auto_tile_size,
    check_pairs,
    cross_entropy,
    pairing_of,
)
from clipsys.training.losses.tiled import differentiable, one_way
from clipsys.training.losses.tiles import Pairing


def neg_clip(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    negative_features: torch.Tensor,
    logit_scale: torch.Tensor,
    tile_size: int | None = None,
    groups: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    *,
    present: torch.Tensor | None = None,
    negative_groups: torch.Tensor | None = None,
    ignore_groups: bool = False,
) -> torch.Tensor:
    """Symmetric InfoNCE with further texts of all ranks as negatives of all images.

    Images choose among N texts and the further ones; texts choose among N images. The further texts
    have no image, so they choose nothing: their rows are left out of text to image.

    Inputs:
        As `info_nce`, and ``negative_features`` (B, T, D), unit norm: T further texts of each row.

    Recommendations:
        Texts that nearly fit their row's image: words swapped (NegCLIP), or texts of other images
        that the model takes for this one's (mining). They should not fit other images of the batch;
        name the group of each (``negative_groups``) where they might.

    Relations:
        Without further texts this is `info_nce`. `hard_info_nce` weights the negatives that the
        batch has already.

    References:
        Yuksekgonul et al. 2023, "When and Why Vision-Language Models Behave like Bags-of-Words, and
        What to Do About It?", section 4 and appendix: NegCLIP's negative captions widen the logits
        of images and have no row of their own.

    Args:
        image_features: (B, D) of this rank, unit norm. B is the same on every rank.
        text_features: (B, D) of this rank, unit norm.
        negative_features: (B, T, D) of this rank, unit norm; T is the same on every rank.
        logit_scale: one element, already exponentiated.
        tile_size: rows of logits held at once; None chooses by the device.
        groups: (B,) integer ids of this rank's samples.
        group: the process group; None is the default one.
        present: (B, T) bool, which of the further texts are there; None, on every rank: all.
        negative_groups: (B, T) integer ids: an image of an equal group does not meet that text.
        ignore_groups: others of a sample's group are left out, not positives.

    Returns:
        This rank's share, a scalar, float32 (float64 for float64 features).

    Raises:
        ConfigError: shapes do not fit.
    """
    check_pairs("neg_clip", image_features, text_features, groups, tile_size)
    _check(image_features, negative_features, groups, present, negative_groups)
    dtype = torch.promote_types(image_features.dtype, torch.float32)
    image_BD, text_BD = image_features.to(dtype), text_features.to(dtype)
    size, width = image_BD.shape
    negative_BX = negative_features.to(dtype).flatten(1)
    scale = logit_scale.to(dtype).reshape(())
    gathered = gather_rows(torch.cat([image_BD, text_BD, negative_BX], dim=1), group)
    image_ND, text_ND = gathered[:, :width], gathered[:, width : 2 * width]
    pairing = pairing_of(groups, size, group, ignore=ignore_groups)
    rows = tile_size or auto_tile_size(len(image_ND), image_BD.device)
    back = cross_entropy(text_BD, image_ND, scale, pairing, rows)

    key_CD, ids_E = gathered[:, 2 * width :].reshape(-1, width), None
    if negative_groups is not None:
        ids_E = gather_rows(negative_groups.to(torch.int64), group).reshape(-1)
    if present is not None:
        kept_E = gather_rows(present.to(torch.uint8), group).reshape(-1).bool()
        key_CD = key_CD[kept_E]
        ids_E = None if ids_E is None else ids_E[kept_E]
    key_CD = torch.cat([text_ND, key_CD])
    compute = partial(
        one_way,
        pairing=_widened(pairing, len(text_ND), len(key_CD), ids_E),
        tile_size=tile_size or auto_tile_size(len(key_CD), image_BD.device),
    )
    there = differentiable(compute, image_BD, key_CD, scale)
    return (there + back) / 2


def _widened(
    pairing: Pairing, num_paired: int, num_keys: int, ids_E: torch.Tensor | None
) -> Pairing:
    """The pairing of images with all texts, the further ones last."""
    if pairing.ids_C is None:
        return Pairing(pairing.start, num_paired=num_paired)
    if ids_E is None:  # an id that no sample has
        ids_E = (pairing.ids_C.min() - 1).expand(num_keys - num_paired)
    return Pairing(
        pairing.start, torch.cat([pairing.ids_C, ids_E]), pairing.ignore, num_paired=num_paired
    )


def _check(
    image_BD: torch.Tensor,
    negative_BTD: torch.Tensor,
    groups: torch.Tensor | None,
    present: torch.Tensor | None,
    negative_groups: torch.Tensor | None,
) -> None:
    shape = negative_BTD.shape
    if len(shape) != 3 or shape[0] != image_BD.shape[0] or shape[2] != image_BD.shape[1]:
        raise ConfigError(
            f"neg_clip: further texts {tuple(shape)} for images {tuple(image_BD.shape)}; expected "
            f"({image_BD.shape[0]}, T, {image_BD.shape[1]})"
        )
    for name, tensor in (("present", present), ("negative_groups", negative_groups)):
        if tensor is not None and tensor.shape != shape[:2]:
            raise ConfigError(
                f"neg_clip: {name} has shape {tuple(tensor.shape)}; expected {tuple(shape[:2])}"
            )
    if negative_groups is not None and groups is None:
        raise ConfigError("neg_clip: negative_groups means nothing without groups; give both")
