"""Contrastive losses over all ranks, exact in value and gradient.

    tiles               which rows and columns of the logits are computed at once
    tiled               cross-entropy and sigmoid losses a tile at a time
    triton_kernels      the same in Triton kernels
    fused               the autograd function around those kernels
    contrastive         `info_nce` and `sigmoid_loss`

Use the names of this package; its modules are internal.
"""

from clipsys.training.losses.contrastive import auto_tile_size, info_nce, sigmoid_loss

__all__ = ["auto_tile_size", "info_nce", "sigmoid_loss"]
