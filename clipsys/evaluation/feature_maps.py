"""What a layer of an image tower gives, as one picture: a contact sheet of feature maps.

The first tile is the image as the model sees it. The second shows all channels at once: the three
main directions in which the places of the image differ (principal components) as red, green and
blue, so that places of one colour are alike to the layer. The others are single channels, those
that vary most over the image first.

C channels, H x W places or pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont

from clipsys.errors import ConfigError, ModelError
from clipsys.images.decoding import decode_image, finish_opened
from clipsys.models.image_layers import class_name, image_layers

if TYPE_CHECKING:
    from clipsys.models.encoder import Encoder

Array = npt.NDArray[np.float32]

_TILE = 160
_GAP = 8
_TITLE = 16
_COLUMNS = 6


def feature_layers(encoder: Encoder) -> tuple[str, ...]:
    """Names of the layers that `feature_maps` can show, in the order in which an image passes.

    Raises:
        ModelError: the image tower is of a kind that is not known here.
    """
    return image_layers(encoder.model.visual, encoder.name).modules


def feature_maps(
    encoder: Encoder,
    image: Image.Image | str | Path,
    layer: str | None = None,
    channels: int = 16,
) -> Image.Image:
    """Draws the feature maps of one layer for one image.

    Args:
        encoder: its plain model computes, in float32.
        image: decoded, or by path.
        layer: one of `feature_layers`; None: the last one with 7 x 7 places or more.
        channels: how many single channels are shown, or all if the layer has fewer.

    Raises:
        ConfigError: there is no such layer, or the number of channels is negative.
        ImageDecodeError: the image cannot be decoded.
        ModelError: the image tower is of a kind that is not known here.
    """
    if channels < 0:
        raise ConfigError(f"channels is {channels}; expected 0 or more")
    names = feature_layers(encoder)
    if layer is not None and layer not in names:
        raise ConfigError(
            f"model {encoder.name} has no layer {layer!r}; its layers are {', '.join(names)}"
        )
    picture = finish_opened(image) if isinstance(image, Image.Image) else decode_image(image)
    pixels_CHW = encoder.preprocess(picture)
    name, map_CHW = _map_of(encoder, pixels_CHW, layer)
    tiles: list[tuple[str, Image.Image]] = [
        ("image", Image.fromarray(pixels_CHW.transpose(1, 2, 0))),
        (f"{map_CHW.shape[0]} channels", _components(map_CHW)),
    ]
    order = np.argsort(-map_CHW.var(axis=(1, 2)), kind="stable")[:channels]
    tiles += [(f"channel {number}", _coloured(map_CHW[number])) for number in order]
    rows, columns = map_CHW.shape[1:]
    return _sheet(f"{encoder.name}: {name}, {rows} x {columns} places", tiles)


def _map_of(
    encoder: Encoder, pixels_CHW: npt.NDArray[np.uint8], layer: str | None
) -> tuple[str, Array]:
    """The layer that is shown and its map (C, H, W)."""
    tower: Any = encoder.model.visual
    layers = image_layers(tower, encoder.name)
    image_BCHW = encoder.normalised(torch.from_numpy(pixels_CHW)[None].to(encoder.device))
    with torch.inference_mode(), layers.recorded(tower) as outputs:
        encoder.model.encode_image(image_BCHW)
    maps = layers.maps(outputs)
    if not maps or (layer is not None and layer not in maps):
        shown = f"the layer {layer}" if layer else "the layers"
        raise ModelError(
            f"model {encoder.name}: {shown} of its image tower, a {class_name(tower)}, has no map"
        )
    name = layer or layers.last_with_places(maps)
    map_CHW: Array = maps[name][0].float().cpu().numpy()
    return name, map_CHW


def _components(map_CHW: Array) -> Image.Image:
    """The three principal components of the places as red, green and blue."""
    num_channels, rows, columns = map_CHW.shape
    places_NC = map_CHW.reshape(num_channels, -1).T.astype(np.float64)
    places_NC = places_NC - places_NC.mean(axis=0)
    left_NK, size_K, _ = np.linalg.svd(places_NC, full_matrices=False)
    found_NK = left_NK[:, :3] * size_K[:3]
    if found_NK.shape[1] < 3:
        found_NK = np.pad(found_NK, ((0, 0), (0, 3 - found_NK.shape[1])))
    # A component's sign means nothing: its largest value is made positive, so that runs agree.
    largest = np.abs(found_NK).argmax(axis=0)
    found_NK *= np.where(found_NK[largest, range(3)] < 0, -1, 1)
    stretched = np.stack([_stretched(one) for one in found_NK.T], axis=-1)
    return Image.fromarray((stretched.reshape(rows, columns, 3) * 255).round().astype(np.uint8))


def _coloured(map_HW: Array) -> Image.Image:
    import matplotlib

    colours = matplotlib.colormaps["viridis"](_stretched(map_HW))[..., :3]
    return Image.fromarray((colours * 255).round().astype(np.uint8))


def _stretched(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """From 0 to 1 between the lowest and the highest one; 0 where all are equal."""
    low, high = float(values.min()), float(values.max())
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def _sheet(title: str, tiles: list[tuple[str, Image.Image]]) -> Image.Image:
    columns = min(_COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    font = ImageFont.load_default(size=12)
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    width = max(columns * (_TILE + _GAP) + _GAP, round(probe.textlength(title, font)) + 2 * _GAP)
    height = _TITLE + _GAP + rows * (_TILE + _TITLE + _GAP) + _GAP
    sheet = Image.new("RGB", (width, height), "white")
    write: Callable[..., None] = ImageDraw.Draw(sheet).text
    write((_GAP, _GAP // 2), title, "black", font)
    for number, (name, tile) in enumerate(tiles):
        left = _GAP + number % columns * (_TILE + _GAP)
        top = _TITLE + _GAP + number // columns * (_TILE + _TITLE + _GAP)
        write((left, top), name, "black", font)
        scale = min(_TILE / tile.width, _TILE / tile.height)
        size = (max(1, round(tile.width * scale)), max(1, round(tile.height * scale)))
        sheet.paste(tile.resize(size, Image.Resampling.NEAREST), (left, top + _TITLE))
    return sheet
