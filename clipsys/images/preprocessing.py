"""What happens to an image between the decoder and the encoder, as plain data.

The resize and crop run on the CPU in worker processes and give uint8; the normalisation runs on the
encoder's device. Together they equal open_clip's evaluation transform to the bit (a test compares).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from clipsys.errors import ConfigError, ModelError
from clipsys.images.decoding import UPRIGHT_TURNS, StoredImage

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

#: How much larger than its target an image must be for its resize to hide the decoder's fraction.
_FRACTION_MARGIN = 1.65

_RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop and normalisation of one image tower; the fields are open_clip's.

    Attributes:
        size: (height, width) in pixels of what the tower sees.
        mean, std: per channel, for pixels in [0, 1].
        interpolation: ``bicubic``, ``bilinear`` or ``nearest``.
        resize_mode: ``shortest`` resizes the shorter side and crops the centre, ``longest`` resizes
            the longer side and pads, ``squash`` ignores the aspect ratio.
        fill_color: the padding's grey value, for ``longest``.
    """

    size: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0

    @classmethod
    def from_open_clip(cls, config: dict[str, Any]) -> Preprocessing:
        """Reads open_clip's ``preprocess_cfg``.

        Raises:
            ModelError: it asks for an interpolation or a resize mode that is not known here.
        """
        size = config.get("size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        result = cls(
            size=(int(height), int(width)),
            mean=tuple(config.get("mean", OPENAI_MEAN)),
            std=tuple(config.get("std", OPENAI_STD)),
            interpolation=config.get("interpolation", "bicubic"),
            resize_mode=config.get("resize_mode", "shortest"),
            fill_color=config.get("fill_color", 0),
        )
        if result.interpolation not in (*_RESAMPLING, "random"):
            raise ModelError(
                f"preprocess_cfg.interpolation is {result.interpolation!r}; "
                f"expected one of {', '.join(_RESAMPLING)}"
            )
        if result.resize_mode not in ("shortest", "longest", "squash"):
            raise ModelError(
                f"preprocess_cfg.resize_mode is {result.resize_mode!r}; "
                "expected shortest, longest or squash"
            )
        return result

    def to_open_clip(self) -> dict[str, Any]:
        """The same settings as open_clip's ``preprocess_cfg``, for ``open_clip_config.json``."""
        return {**asdict(self), "mode": "RGB"}

    def pixels(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """Resizes and crops a decoded RGB image. Returns uint8 (3, height, width). Thread-safe."""
        height, width = self.size
        new = self._fitted(image.size)
        fitted = image if new == image.size else image.resize(new, self._resample())
        return _channels_first(_centre(fitted, height, width, self._fill()))

    def seen_box(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Where on an image of a (width, height) that lies which `pixels` makes of it.

        Returns (left, top, right, bottom) in pixels of the image: within it where it is cropped,
        beyond its edges where it is padded.
        """
        edges = []
        for whole, new, kept in zip(size, self._fitted(size), self.size[::-1], strict=True):
            padding = max(0, kept - new)
            start = round((new + padding - kept) / 2.0) - padding // 2
            edges.append((start * whole / new, (start + kept) * whole / new))
        (left, right), (top, bottom) = edges
        return left, top, right, bottom

    def fast_pixels(self, stored: StoredImage) -> npt.NDArray[np.uint8]:
        """`pixels` of an image as it is stored: resized, cropped, and only then turned upright.

        Within 40 dB of `pixels` of the whole upright image, for an image decoded with
        ``min_side=fast_min_side``. torch's resize of uint8 is Pillow's algorithm in AVX2, three
        times as fast, and differs by one level here and there. Returns uint8 (3, height, width).
        """
        height, width = self.size
        turned = stored.orientation >= 5
        full = stored.full_size[::-1] if turned else stored.full_size
        new = self._fitted(full)
        kept = (min(width, new[0]), min(height, new[1]))  # the rest, if any, is padding
        left, top = round((new[0] - kept[0]) / 2.0), round((new[1] - kept[1]) / 2.0)
        crop = (left, top, left + kept[0], top + kept[1])
        resized = self._resized(stored, new[::-1] if turned else new)
        x0, y0, x1, y1 = _stored_box(crop, new, stored.orientation)
        cropped = resized[y0:y1, x0:x1]
        if kept == (width, height) and stored.orientation == 1:
            return np.ascontiguousarray(cropped.transpose(2, 0, 1))
        image = Image.fromarray(np.ascontiguousarray(cropped))
        turn = UPRIGHT_TURNS.get(stored.orientation)
        upright = image if turn is None else image.transpose(turn)
        return _channels_first(_centre(upright, height, width, self._fill()))

    def _resized(self, stored: StoredImage, new: tuple[int, int]) -> npt.NDArray[np.uint8]:
        """(height, width, 3), of at least the (width, height) in ``new``, rows and columns that
        stand for nothing at its end.
        """
        mode = "bicubic" if self.interpolation == "random" else self.interpolation
        if mode == "nearest":
            return np.asarray(stored.image.resize(new, Image.Resampling.NEAREST))
        import torch

        image_1CHW = torch.from_numpy(stored.pixels).permute(2, 0, 1)[None]
        if stored.scale == 1:
            size, factors = (new[1], new[0]), None
        else:
            # By factors: a side that was rounded up by the decoder must not be squeezed. The
            # millionth keeps the product from being rounded down to one pixel less.
            size = None
            factors = tuple(
                (side + 1e-6) * stored.scale / whole
                for side, whole in zip(new[::-1], stored.full_size[::-1], strict=True)
            )
        resized_1CHW = torch.nn.functional.interpolate(
            image_1CHW, size=size, scale_factor=factors, mode=mode, antialias=True
        )
        result: npt.NDArray[np.uint8] = resized_1CHW[0].permute(1, 2, 0).numpy()
        return result

    @property
    def fast_min_side(self) -> int:
        """The shorter side at which a JPEG may be decoded for `fast_pixels`.

        libjpeg's fractions keep more detail than the reference's resize from full size. Resized to
        3/5 of its side or less, the difference is below 40 dB (90 photographs; a test has drawn
        ones).
        """
        return math.ceil(max(self.size) * _FRACTION_MARGIN)

    def _fill(self) -> tuple[int, int, int]:
        return (self.fill_color if self.resize_mode == "longest" else 0,) * 3

    def _resample(self) -> Image.Resampling:
        return _RESAMPLING.get(self.interpolation, Image.Resampling.BICUBIC)

    def _fitted(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) to which an image of a (width, height) is resized before the crop."""
        height, width = self.size
        if self.resize_mode == "squash":
            return width, height
        if self.resize_mode == "longest":
            scale = min(height / size[1], width / size[0])
            return (
                max(1, min(width, round(size[0] * scale))),
                max(1, min(height, round(size[1] * scale))),
            )
        if height == width:
            # torchvision's Resize(int): the shorter side exactly, the longer one truncated.
            short, long = sorted(size)
            longer = int(height * long / short)
            return (height, longer) if size[0] <= size[1] else (longer, height)
        # open_clip's ResizeKeepRatio for sizes that are not square.
        ratio = 1 / max(width / size[0], height / size[1])
        return round(size[0] / ratio), round(size[1] / ratio)


def check_preprocess(config: Mapping[str, Any], *, setting: str) -> None:
    """Checks settings that a person wrote, key by key.

    Raises:
        ConfigError: a key is not open_clip's, or a value is none for it; names the setting.
    """
    for key, value in config.items():
        expected = _CHECKS.get(key)
        if expected is None:
            near = get_close_matches(key, _CHECKS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(_CHECKS)}"
            raise ConfigError(f"{setting}.{key} is not a setting; {hint}")
        passes, words = expected
        if not passes(value):
            raise ConfigError(f"{setting}.{key} is {value!r}; expected {words}")


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _are_channels(value: Any) -> bool:
    numbers = isinstance(value, (list, tuple)) and len(value) == 3
    return numbers and all(isinstance(one, (int, float)) for one in value)


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "size": (
        lambda value: (
            _is_side(value)
            or (isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_side, value)))
        ),
        "pixels, or [height, width]",
    ),
    "mode": (lambda value: value == "RGB", "RGB"),
    "mean": (_are_channels, "three numbers, one a channel"),
    "std": (
        lambda value: _are_channels(value) and min(value) > 0,
        "three numbers above 0, one a channel",
    ),
    "interpolation": (lambda value: value in _RESAMPLING, f"one of {', '.join(_RESAMPLING)}"),
    "resize_mode": (
        lambda value: value in ("shortest", "longest", "squash"),
        "shortest, longest or squash",
    ),
    "fill_color": (
        lambda value: isinstance(value, int) and 0 <= value <= 255,
        "a grey value from 0 to 255",
    ),
}


def _channels_first(image: Image.Image) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _stored_box(
    box: tuple[int, int, int, int], size: tuple[int, int], orientation: int
) -> tuple[int, int, int, int]:
    """Where a box of the upright image, which has a (width, height), lies in the stored one."""
    x0, y0, x1, y1 = box
    width, height = size
    if orientation in (2, 3, 7, 6):  # the upright image's x runs against the stored axis
        x0, x1 = width - x1, width - x0
    if orientation in (3, 4, 7, 8):
        y0, y1 = height - y1, height - y0
    return (y0, x0, y1, x1) if orientation >= 5 else (x0, y0, x1, y1)


def _centre(image: Image.Image, height: int, width: int, fill: tuple[int, int, int]) -> Image.Image:
    """Crops the centre; pads first where the image is smaller (torchvision's center_crop)."""
    pad_x, pad_y = max(0, width - image.width), max(0, height - image.height)
    if pad_x or pad_y:
        border = (pad_x // 2, pad_y // 2, (pad_x + 1) // 2, (pad_y + 1) // 2)
        image = ImageOps.expand(image, border, fill=fill)
    left = round((image.width - width) / 2.0)
    top = round((image.height - height) / 2.0)
    return image.crop((left, top, left + width, top + height))
