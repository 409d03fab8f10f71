"""Runs the fused cross-entropy in Triton's interpreter, on the CPU; started by its test.

    TRITON_INTERPRET=1 python -m tests.training.interpreted_cross_entropy CASES OUT

A process of its own: Triton decides whether to interpret when a kernel is decorated.
"""

from __future__ import annotations

import sys

import torch

from clipsys.training.losses.fused import FusedCrossEntropy, row_statistics


def main() -> None:
    results = {}
    for name, case in torch.load(sys.argv[1], weights_only=False).items():
        inputs = (case["query"], case["key"], case["scale"])
        ids = (case["query_ids"], case["key_ids"])
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        loss = FusedCrossEntropy.apply(*leaves, *ids, case["tiling"])
        # Not a gradient of one, which would hide a forgotten factor.
        gradients = torch.autograd.grad(3 * loss, leaves)
        results[name] = (
            loss.detach(),
            gradients,
            row_statistics(*inputs, *ids, tiling=case["tiling"]),
        )
    torch.save(results, sys.argv[2])


if __name__ == "__main__":
    main()
