"""Batch normalisation of features with the statistics of all ranks."""

from __future__ import annotations

import torch
from torch import nn

from clipsys.training.distributed.collectives import sum_over_ranks, world_size


class GlobalBatchNorm(nn.BatchNorm1d):
    """Batch normalisation of (B, D) features over the rows of all ranks, exact in its gradient.

    `nn.SyncBatchNorm` is the same for GPUs alone. Statistics are taken in float32 at least. In
    training mode a row depends on what else passes at once: micro-batches would change the result,
    and recipes with them are refused.

    Source: Ioffe and Szegedy 2015, "Batch Normalization", algorithm 1.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(B, D) normalised, in the dtype of ``input``; every rank calls it."""
        with torch.autocast(input.device.type, enabled=False):
            features_BD = input.to(torch.promote_types(input.dtype, torch.float32))
            if not self.training:
                assert self.running_mean is not None and self.running_var is not None
                mean_D = self.running_mean.to(features_BD)
                variance_D = self.running_var.to(features_BD)
            else:
                num_rows = len(features_BD) * world_size()
                mean_D = sum_over_ranks(features_BD.sum(dim=0)) / num_rows
                variance_D = sum_over_ranks((features_BD - mean_D).square().sum(dim=0)) / num_rows
                self._remember(mean_D, variance_D, num_rows)
            result_BD = (features_BD - mean_D) / (variance_D + self.eps).sqrt()
            if self.affine:
                result_BD = result_BD * self.weight + self.bias
            return result_BD.to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean_D: torch.Tensor, variance_D: torch.Tensor, num_rows: int) -> None:
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        unbiased_D = variance_D * (num_rows / max(1, num_rows - 1))
        self.running_mean.lerp_(mean_D.to(self.running_mean), self.momentum)
        self.running_var.lerp_(unbiased_D.to(self.running_var), self.momentum)
        self.num_batches_tracked.add_(1)
