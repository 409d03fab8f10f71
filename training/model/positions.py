"""Position embeddings for another image size or context length than that of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

#: Learned positions of an image's patches: those of a vision transformer, of a ResNet's attention
#: pool, of a trunk of timm.
_IMAGE_POSITIONS = (
    "visual.positional_embedding",
    "visual.attnpool.positional_embedding",
    "visual.trunk.pos_embed",
)
_TEXT_POSITIONS = ("positional_embedding", "text.positional_embedding")


def interpolate_positions(
    state: dict[str, torch.Tensor], source: nn.Module, target: nn.Module
) -> Iterator[str]:
    """Fits the positions in a state dict, in place, and says of each what was done.

    Patches are resampled as a picture is (bicubic, with antialiasing: Dosovitskiy et al. 2021,
    section 3.2), tokens linearly, both as open_clip does. A tower whose positions are of another
    kind is left as it is.

    Args:
        state: the weights of ``source``.
        source: the model that the weights are of.
        target: the model that they are meant for.
    """
    from timm.layers import resample_abs_pos_embed

    own = target.state_dict()
    changed = [name for name in state if name in own and state[name].shape != own[name].shape]
    for name in changed:
        old = state[name]
        if name in _IMAGE_POSITIONS:
            before, after = _grid(source), _grid(target)
            prefix = old.shape[-2] - before[0] * before[1]
            old_1LW = old.reshape(1, *old.shape[-2:])
            new_1LW = resample_abs_pos_embed(old_1LW, list(after), list(before), prefix)
            state[name] = new_1LW.reshape(*old.shape[:-2], *new_1LW.shape[1:])
            yield (
                f"position embeddings of {before[0]} x {before[1]} patches are interpolated to "
                f"{after[0]} x {after[1]}"
            )
        elif name in _TEXT_POSITIONS:
            # CoCa's text tower appends a class token, whose position is the last one.
            suffix = int(
                hasattr(target, "text") and getattr(target.text, "cls_emb", None) is not None
            )
            length = own[name].shape[0] - suffix
            kept = old.shape[0] - suffix
            state[name] = torch.cat([_stretched(old[:kept], length), old[kept:]])
            yield f"position embeddings of {kept} tokens are interpolated to {length}"


def _stretched(positions_LW: torch.Tensor, length: int) -> torch.Tensor:
    stretched_1WL = F.interpolate(
        positions_LW.T[None], size=length, mode="linear", align_corners=False
    )
    return stretched_1WL[0].T


def _grid(model: Any) -> tuple[int, int]:
    """Rows and columns of patches that the image tower has positions for."""
    visual = model.visual
    if hasattr(visual, "trunk"):
        rows, columns = visual.trunk.patch_embed.grid_size
    elif hasattr(visual, "grid_size"):
        rows, columns = visual.grid_size
    else:  # a ResNet, whose last stage has a stride of 32
        rows = columns = visual.image_size // 32
    return int(rows), int(columns)
