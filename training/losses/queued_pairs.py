"""InfoNCE between images and texts with more negatives from queues of earlier batches.

Shapes: B rows of this rank, N = W·B rows of all W ranks, K entries of each queue, D width.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

from clipsys.errors import ConfigError
from clipsys.training.distributed.collectives import gather_rows, rank
from clipsys.training.losses.contrastive import auto_tile_size
from clipsys.training.losses.tiled import differentiable, one_way
from clipsys.training.losses.tiles import Pairing


class PairQueue(NamedTuple):
    """Keys of earlier pairs, equal on every rank; K may be 0.

    Attributes:
        image_KD: unit norm.
        text_KD: unit norm.
        groups_K: int64 ids of their samples.
    """

    image_KD: torch.Tensor
    text_KD: torch.Tensor
    groups_K: torch.Tensor


class PairKeys(NamedTuple):
    """What momentum towers say of this rank's rows, unit norm, without gradients."""

    image_BD: torch.Tensor
    text_BD: torch.Tensor


def queued_info_nce(
    image_BD: torch.Tensor,
    text_BD: torch.Tensor,
    logit_scale: torch.Tensor,
    queue: PairQueue,
    groups_B: torch.Tensor,
    keys: PairKeys | None = None,
    group: dist.ProcessGroup | None = None,
    *,
    ignore_groups: bool = False,
    tile_size: int | None = None,
) -> torch.Tensor:
    """Symmetric InfoNCE whose keys are those of the batch and those of the queue.

    Images look for their texts among the texts of all ranks and of the queue, and texts for their
    images likewise; both cross-entropies are averaged. Samples of equal id are never negatives of
    each other, in the batch as in the queue: they are positives, among which the target is spread
    evenly, or left out. So a queue may be longer than the data.

    Inputs:
        ``image_BD`` and ``text_BD`` (B, D) of this rank, unit norm, with gradients; B is the same
        on every rank. ``logit_scale``: one element, already exponentiated. ``groups_B`` (B,)
        integer ids. ``keys``: of momentum towers, for the same rows; without them the trained
        towers' own vectors are the keys, and gradients pass through those of the batch.
        ``ignore_groups``: others of a sample's group are left out, and are not positives.
        ``tile_size``: rows of logits held at once; None chooses by the device.

    Recommendations:
        Where memory bounds the batch. Keys of the trained towers age quickly: without momentum
        towers the queue should span few steps, or the rate be low. Memory is
        O(tile_size · (N + K)).

    Relations:
        `info_nce` is the same with an empty queue and without ``keys``. `moco` contrasts two views
        of an image, with the queue alone.

    References:
        Li et al. 2021, "Align before Fuse" (ALBEF), equation 2 and section 3.2 (queues of both
        modalities, momentum towers); Wang et al. 2020, "Cross-Batch Memory for Embedding
        Learning", algorithm 1 (queue of the trained network's own vectors).

    Returns:
        This rank's share, a scalar, float32 (float64 for float64 features): averaged over ranks, as
        DDP and DeepSpeed do with gradients, it is the loss of the whole batch.

    Raises:
        ConfigError: the shapes do not fit.
    """
    _check(image_BD, text_BD, queue, groups_B, keys)
    dtype = torch.promote_types(image_BD.dtype, torch.float32)
    image_BD, text_BD = image_BD.to(dtype), text_BD.to(dtype)
    scale = logit_scale.to(dtype).reshape(())
    own = (image_BD, text_BD) if keys is None else [key.detach().to(dtype) for key in keys]
    # Both in one collective: each one makes the ranks wait for the slowest.
    image_ND, text_ND = gather_rows(torch.cat(list(own), dim=1), group).chunk(2, dim=1)
    ids_N = gather_rows(groups_B.to(torch.int64), group)
    ids_C = torch.cat([ids_N, queue.groups_K.to(torch.int64)])
    pairing = Pairing(rank(group) * len(image_BD), ids_C, ignore_groups)
    rows = tile_size or auto_tile_size(len(ids_C), image_BD.device)
    compute = partial(one_way, pairing=pairing, tile_size=rows)

    def entropy(
        query_BD: torch.Tensor, key_ND: torch.Tensor, queue_KD: torch.Tensor
    ) -> torch.Tensor:
        key_CD = torch.cat([key_ND, queue_KD.detach().to(dtype)])
        return differentiable(compute, query_BD, key_CD, scale)

    image_to_text = entropy(image_BD, text_ND, queue.text_KD)
    text_to_image = entropy(text_BD, image_ND, queue.image_KD)
    return (image_to_text + text_to_image) / 2


def _check(
    image_BD: torch.Tensor,
    text_BD: torch.Tensor,
    queue: PairQueue,
    groups_B: torch.Tensor,
    keys: PairKeys | None,
) -> None:
    shapes = [tuple(one.shape) for one in (image_BD, text_BD, *(keys or ()))]
    if image_BD.ndim != 2 or len(set(shapes)) > 1 or len(image_BD) == 0:
        raise ConfigError(
            f"queued_info_nce: features and keys {', '.join(map(str, shapes))}; expected the same "
            "(B, D) with B of 1 or more"
        )
    length, width = len(queue.groups_K), image_BD.shape[1]
    for name, one in (("images", queue.image_KD), ("texts", queue.text_KD)):
        if tuple(one.shape) != (length, width):
            raise ConfigError(
                f"queued_info_nce: the queue's {name} have shape {tuple(one.shape)}; expected "
                f"({length}, {width}), as it has {length} group ids"
            )
    if groups_B.shape != image_BD.shape[:1]:
        raise ConfigError(
            f"queued_info_nce: groups has shape {tuple(groups_B.shape)}; expected "
            f"({len(image_BD)},)"
        )
