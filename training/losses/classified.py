"""Cross-entropy of a classifier together with the supervised contrastive loss of its features.

Shapes: B samples of this rank, C classes, D width.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn import functional as F  # noqa: N812

from clipsys.errors import ConfigError
from clipsys.training.losses.supervised import supcon


def scl(
    logits_BC: torch.Tensor,
    features_BD: torch.Tensor,
    classes_B: torch.Tensor,
    weight: float = 0.9,
    temperature: float | torch.Tensor = 0.3,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """(1 - weight) · cross-entropy + weight · SupCon of the normalised features.

    Inputs:
        ``logits_BC`` (B, C) and ``features_BD`` (B, D) of this rank, of any norm, with gradients;
        ``classes_B`` (B,) int64 from 0 to below C. B is the same on every rank. ``temperature``
        may be a tensor, which then gets a gradient.

    Recommendations:
        The paper searches ``weight`` in 0.1, 0.3, 0.5, 0.7, 0.9, 1.0 and ``temperature`` in 0.1,
        0.3, 0.5, 0.7, and finds 0.9 and 0.3 best most often. A batch should hold several samples
        of most classes: an anchor without a positive adds nothing to the second term.

    Relations:
        The second term is `supcon` with ``form="out"`` and one view; its positives are those of
        all ranks. With a weight of 0 this is cross-entropy, to the last bit.

    References:
        Gunel et al. 2021, "Supervised Contrastive Learning for Pre-trained Language Model
        Fine-tuning", equations 1 to 3.

    Returns:
        This rank's share, a scalar, float32 (float64 for float64 features).

    Raises:
        ConfigError: the shapes do not fit, or ``weight`` is not from 0 to 1.
    """
    if not 0 <= weight <= 1:
        raise ConfigError(f"scl: weight is {weight}; expected a number from 0 to 1")
    if logits_BC.ndim != 2 or features_BD.ndim != 2 or len(logits_BC) != len(features_BD):
        raise ConfigError(
            f"scl: logits {tuple(logits_BC.shape)} and features {tuple(features_BD.shape)}; "
            "expected (B, C) and (B, D)"
        )
    if classes_B.shape != logits_BC.shape[:1] or len(classes_B) == 0:
        raise ConfigError(
            f"scl: classes {tuple(classes_B.shape)} for {len(logits_BC)} samples; expected (B,) "
            "with B of 1 or more"
        )
    dtype = torch.promote_types(features_BD.dtype, torch.float32)
    entropy = F.cross_entropy(logits_BC.to(dtype), classes_B)
    if weight == 0:
        return entropy
    unit_BD = F.normalize(features_BD.to(dtype), dim=1)
    contrast = supcon(unit_BD[:, None], classes_B, temperature, "out", group)
    return (1 - weight) * entropy + weight * contrast
