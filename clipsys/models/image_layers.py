"""The layers of an image tower: where its feature maps are, and how its tokens lie in the image.

Two kinds of towers are known. Each block of a vision transformer (open_clip's, timm's) gives a
token per patch, and some before them that belong to no place (the class token, registers). Each
stage of a convolutional tower (open_clip's ModifiedResNet, timm's) gives a map.

B images, C channels, H x W places, L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from clipsys.errors import ModelError


@dataclass(frozen=True)
class ImageLayers:
    """The layers of one image tower, in the order in which an image passes them.

    Attributes:
        modules: name of each layer, as `torch.nn.Module.get_submodule` of the tower takes it.
        tokens: whether the last of them give tokens (a vision transformer).
        grid: rows and columns of the patches, of a vision transformer.
        num_prefix: tokens that stand before those of the patches.
        channels_last: whether maps are (B, H, W, C).
    """

    modules: tuple[str, ...]
    tokens: bool
    grid: tuple[int, int] = (0, 0)
    num_prefix: int = 0
    channels_last: bool = False

    def as_map(self, output: torch.Tensor) -> torch.Tensor | None:
        """What a layer gave, as (B, C, H, W); None if it holds no place of the image."""
        if output.dim() == 3 and self.tokens:
            rows, columns = self.grid
            places = output[:, self.num_prefix :]
            if places.shape[1] != rows * columns:
                return None
            return places.transpose(1, 2).reshape(len(output), -1, rows, columns)
        if output.dim() != 4:
            return None
        return output.permute(0, 3, 1, 2) if self.channels_last else output


def image_layers(tower: Any, name: str) -> ImageLayers:
    """The layers of an image tower.

    Args:
        tower: open_clip's ``visual``.
        name: what messages call the model.

    Raises:
        ModelError: it is built like none of the towers that are known here.
    """
    trunk = getattr(tower, "trunk", None)
    if trunk is not None:
        layers = _timm_layers(trunk)
    elif hasattr(tower, "transformer") and hasattr(tower, "grid_size"):
        blocks = len(tower.transformer.resblocks)
        names = [f"transformer.resblocks.{number}" for number in range(blocks)]
        rows, columns = tower.grid_size
        layers = ImageLayers(("conv1", *names), True, (int(rows), int(columns)), 1)
    elif all(hasattr(tower, f"layer{number}") for number in (1, 2, 3, 4)):
        layers = ImageLayers(("layer1", "layer2", "layer3", "layer4"), False)
    else:
        layers = None
    if layers is None:
        raise ModelError(
            f"model {name}: its image tower is a {class_name(tower)}, whose layers are not known "
            "here; known are vision transformers and convolutional networks of open_clip and timm"
        )
    return layers


def class_name(tower: Any) -> str:
    """The class of an image tower, of timm's trunk where it wraps one."""
    return type(getattr(tower, "trunk", tower)).__name__


def _timm_layers(trunk: Any) -> ImageLayers | None:
    grid = getattr(getattr(trunk, "patch_embed", None), "grid_size", None)
    if grid is not None and hasattr(trunk, "blocks") and hasattr(trunk, "num_prefix_tokens"):
        names = [f"trunk.blocks.{number}" for number in range(len(trunk.blocks))]
        rows, columns = grid
        return ImageLayers(tuple(names), True, (int(rows), int(columns)), trunk.num_prefix_tokens)
    stages = [
        f"trunk.{stage['module']}"
        for stage in getattr(trunk, "feature_info", None) or ()
        if _has_module(trunk, str(stage["module"]))
    ]
    if not stages:
        return None
    last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
    return ImageLayers(tuple(stages), False, channels_last=bool(last))


def _has_module(trunk: Any, name: str) -> bool:
    try:
        trunk.get_submodule(name)
    except AttributeError:
        return False
    return True
