"""The encoder: a trained model as a function from images and texts to unit vectors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.nn import functional as F  # noqa: N812

from clipsys import models
from clipsys.devices import choose_device, choose_precision
from clipsys.image_tower import EncodeImage, image_encoder
from clipsys.images import decode_image
from clipsys.text_tower import text_encoder

Vectors = npt.NDArray[np.float32]


class Encoder:
    """Encodes images and texts into one space. Made by `clipsys.load`.

    Vectors are float32 and of unit norm, so that a dot product is a cosine. Calls that run the
    model are not thread-safe; `preprocess` is.

    Attributes:
        name: what messages call the model.
        spec: what `load` takes to load the same model again.
        fingerprint: SHA-256 of weights, architecture, tokenizer and preprocessing.
        dim: D, the width of the vectors.
        device: where the model runs.
        precision: ``fp32`` or ``bf16``.
    """

    def __init__(
        self, parts: models.ModelParts, *, device: str = "auto", precision: str = "auto"
    ) -> None:
        self.name = parts.name
        self.spec = parts.spec
        self.fingerprint = parts.loaded_fingerprint or models.fingerprint(parts)
        self.preprocessing = parts.preprocessing
        self.device = choose_device(device)
        self.precision = choose_precision(precision, self.device)
        self._model: Any = parts.model.eval().requires_grad_(False).to(self.device)
        self._encode_tokens = text_encoder(self._model)
        self._tokenizer = parts.tokenizer
        shape = (3, 1, 1)
        self._mean = torch.tensor(parts.preprocessing.mean, device=self.device).view(shape)
        self._std = torch.tensor(parts.preprocessing.std, device=self.device).view(shape)
        self.dim = int(self.encode_text([""]).shape[1])

    def __repr__(self) -> str:
        return (
            f"Encoder({self.name!r}, dim={self.dim}, device={self.device}, {self.fingerprint[:12]})"
        )

    @property
    def model(self) -> Any:
        """open_clip's model, in evaluation mode, on `device`."""
        return self._model

    @property
    def tokenizer(self) -> models.Tokenizer:
        """Texts to int64 (N, context_length)."""
        return self._tokenizer

    @property
    def logit_scale(self) -> float:
        """What similarities are multiplied with before a softmax, as trained (no logarithm)."""
        return float(self._model.logit_scale.detach().exp())

    @cached_property
    def _encode_pixels(self) -> EncodeImage:
        # When first needed: a search by text must not wait for it.
        return image_encoder(self._model)

    def preprocess(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """Resizes and crops one decoded image: uint8 (3, H, W). Thread-safe."""
        return self.preprocessing.pixels(image.convert("RGB"))

    def encode_pixels(self, pixels_BCHW: npt.NDArray[np.uint8]) -> Vectors:
        """Encodes a batch that `preprocess` has made: (B, 3, H, W) uint8 -> (B, D) float32."""
        pixels = torch.from_numpy(np.ascontiguousarray(pixels_BCHW)).to(self.device)
        image_BCHW = (pixels.to(torch.float32) / 255 - self._mean) / self._std
        with torch.inference_mode(), self._autocast():
            features = self._encode_pixels(image_BCHW)
        return _unit(features)

    def encode_image(
        self, images: Sequence[Image.Image | str | Path], *, batch_size: int = 64
    ) -> Vectors:
        """Encodes images, given decoded or by path, ``batch_size`` at a time: (N, D) float32.

        Raises:
            ImageDecodeError: one of the files cannot be decoded.
        """
        batches = []
        for start in range(0, len(images), batch_size):
            decoded = [
                image if isinstance(image, Image.Image) else decode_image(image)
                for image in images[start : start + batch_size]
            ]
            batches.append(self.encode_pixels(np.stack([self.preprocess(one) for one in decoded])))
        return np.concatenate(batches) if batches else np.zeros((0, self.dim), np.float32)

    def encode_text(self, texts: Sequence[str], *, batch_size: int = 256) -> Vectors:
        """Encodes texts: (N, D) float32. Longer ones are cut at the model's context length."""
        batches = []
        for start in range(0, len(texts), batch_size):
            tokens_BL = self._tokenizer(list(texts[start : start + batch_size])).to(self.device)
            with torch.inference_mode(), self._autocast():
                batches.append(_unit(self._encode_tokens(tokens_BL)))
        return np.concatenate(batches) if batches else np.zeros((0, self.dim), np.float32)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"
        )


def _unit(features: torch.Tensor) -> Vectors:
    vectors: Vectors = F.normalize(features.float(), dim=-1).cpu().numpy()
    return vectors


def load(spec: str | Path, *, device: str = "auto", precision: str = "auto") -> Encoder:
    """Loads an encoder.

    Args:
        spec: ``NAME/TAG`` of open_clip (``ViT-B-32/laion2b_s34b_b79k``), ``hf-hub:ORG/REPO``, a
            model folder or a run folder.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
        precision: ``auto``, ``fp32`` or ``bf16``.

    Raises:
        ModelError: there is no such model, or its files are damaged or altered.
        ConfigError: the device is not there.
    """
    return Encoder(models.load_model(spec), device=device, precision=precision)
