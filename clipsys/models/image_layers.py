"""The layers of an image tower: where its feature maps are, and how its tokens lie in the image.

Two kinds of towers are known. Each block of a vision transformer (open_clip's, timm's) gives a
token per patch, and some before them that belong to no place (the class token, registers). Each
stage of a convolutional tower (open_clip's ModifiedResNet, timm's) gives a map.

B images, C channels, H x W places, L tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from clipsys.errors import ModelError

#: Places along the shorter side that a map needs to tell parts of an image apart: as many as the
#: last stage of a ResNet has for 224 pixels. A map of 2 x 2 shows nothing.
_MIN_PLACES = 7


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

    def last_with_places(self, maps: Mapping[str, torch.Tensor]) -> str:
        """The last layer with a map of 7 x 7 places or more; else the one with the largest map.

        Of the last block of a vision transformer nothing but the class token may be read, so it
        counts only where there is no other.

        Args:
            maps: map (B, C, H, W) of each layer, in their order; not empty.
        """
        names = [name for name, one in maps.items() if min(one.shape[-2:]) >= _MIN_PLACES]
        if self.tokens and len(names) > 1:
            names.pop()
        return names[-1] if names else max(maps, key=lambda name: min(maps[name].shape[-2:]))

    @contextlib.contextmanager
    def recorded(self, tower: Any) -> Iterator[dict[str, torch.Tensor]]:
        """What each layer gives, by its name, filled while the tower runs."""
        outputs: dict[str, torch.Tensor] = {}

        def recorder(name: str) -> Any:
            def record(_module: Any, _inputs: Any, output: Any) -> None:
                if isinstance(output, torch.Tensor):
                    outputs[name] = output

            return record

        handles = [
            tower.get_submodule(name).register_forward_hook(recorder(name)) for name in self.modules
        ]
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()

    def maps(self, outputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Those of the outputs that have places, as (B, C, H, W)."""
        found = {name: self.as_map(output) for name, output in outputs.items()}
        return {name: one for name, one in found.items() if one is not None}


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
