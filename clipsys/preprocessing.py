"""What happens to an image between the decoder and the encoder, as plain data.

The resize and crop run on the CPU in worker processes and give uint8; the normalisation runs on the
encoder's device. Together they equal open_clip's evaluation transform to the bit (a test compares).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from clipsys.errors import ModelError

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

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
        resample = _RESAMPLING.get(self.interpolation, Image.Resampling.BICUBIC)
        height, width = self.size
        if self.resize_mode == "squash":
            fitted = image.resize((width, height), resample)
        elif self.resize_mode == "longest":
            scale = min(height / image.height, width / image.width)
            inner = (
                max(1, min(width, round(image.width * scale))),
                max(1, min(height, round(image.height * scale))),
            )
            fill = (self.fill_color,) * 3
            fitted = _centre(image.resize(inner, resample), height, width, fill)
        else:
            fitted = self._shortest(image, resample)
        return np.ascontiguousarray(np.asarray(fitted).transpose(2, 0, 1))

    def _shortest(self, image: Image.Image, resample: Image.Resampling) -> Image.Image:
        height, width = self.size
        if height == width:
            # torchvision's Resize(int): the shorter side exactly, the longer one truncated.
            short, long = sorted(image.size)
            longer = int(height * long / short)
            new = (height, longer) if image.width <= image.height else (longer, height)
        else:
            # open_clip's ResizeKeepRatio for sizes that are not square.
            ratio = 1 / max(width / image.width, height / image.height)
            new = (round(image.width / ratio), round(image.height / ratio))
        if new != image.size:
            image = image.resize(new, resample)
        return _centre(image, height, width, (0, 0, 0))


def _centre(image: Image.Image, height: int, width: int, fill: tuple[int, int, int]) -> Image.Image:
    """Crops the centre; pads first where the image is smaller (torchvision's center_crop)."""
    pad_x, pad_y = max(0, width - image.width), max(0, height - image.height)
    if pad_x or pad_y:
        border = (pad_x // 2, pad_y // 2, (pad_x + 1) // 2, (pad_y + 1) // 2)
        image = ImageOps.expand(image, border, fill=fill)
    left = round((image.width - width) / 2.0)
    top = round((image.height - height) / 2.0)
    return image.crop((left, top, left + width, top + height))
