"""Compares a faster way through a tower with the tower itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

#: Largest difference of an output feature that counts as the same, relative to the largest feature.
TOLERANCE = 1e-4


def outputs_are_equal(
    model: Any, usual: Callable[[], torch.Tensor], faster: Callable[[], torch.Tensor]
) -> bool:
    """Compares both in evaluation mode, and restores the model's own mode.

    A model on which either fails is not one that ``faster`` was written for: not equal.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected, actual = usual().float(), faster().float()
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
        return False  # not built like open_clip's own towers
    finally:
        model.train(was_training)
    if actual.shape != expected.shape:
        return False
    return bool((actual - expected).abs().max() <= TOLERANCE * expected.abs().max())
