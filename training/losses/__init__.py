"""Contrastive losses over all ranks, exact in value and gradient.

    tiles               which rows and columns of the logits are computed at once
    tiled               cross-entropy and sigmoid losses a tile at a time
    triton_kernels      the same in Triton kernels
    fused               the autograd function around those kernels
    contrastive         `info_nce` and `sigmoid_loss`, between images and texts
    two_views           `nt_xent`, between two views of each image
    key_queue           `moco`, against a queue, and the queue
    supervised          `supcon`, between all rows of a label
    classified          `scl`, cross-entropy of a classifier with `supcon`
    leave_one_out       `looc`, the same in several spaces
    predictive          `cpc`, between predicted and true features

Use the names of this package; its modules are internal.
"""

from clipsys.training.losses.classified import scl
from clipsys.training.losses.contrastive import auto_tile_size, info_nce, sigmoid_loss
from clipsys.training.losses.key_queue import enqueued, moco
from clipsys.training.losses.leave_one_out import looc
from clipsys.training.losses.predictive import cpc
from clipsys.training.losses.supervised import supcon
from clipsys.training.losses.two_views import nt_xent

__all__ = [
    "auto_tile_size",
    "cpc",
    "enqueued",
    "info_nce",
    "looc",
    "moco",
    "nt_xent",
    "scl",
    "sigmoid_loss",
    "supcon",
]
