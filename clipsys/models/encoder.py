"""The encoder: a trained model as a function from images and texts to unit vectors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.nn import functional as F  # noqa: N812

from clipsys.images.decoding import decode_image, decode_stored, finish_opened
from clipsys.inference.checking import CheckedEncoder, MakeEncoder
from clipsys.inference.image_tower import CPU_CHUNK, INT8_CHUNK, image_encoder, int8_image_encoder
from clipsys.inference.text_tower import text_encoder
from clipsys.inference.threads import EncodeImage, in_chunks
from clipsys.models import open_clip_models as models
from clipsys.models.devices import choose_device, choose_encoding, compute_in_full_float32
from clipsys.models.loading import BASE_SEPARATOR
from clipsys.models.tokenization import Tokenizer

Vectors = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]

#: Images that pass a GPU together where bits must not depend on their number.
_DEVICE_CHUNK = 128
#: Texts that pass together likewise, and the step of the lengths that they are cut at. In bf16 each
#: pass converts all weights, which 32 texts do not repay: ViT-B/32's tower encoded 102 texts/s in
#: fp32 with 32 and 74 with 128, in bf16 100 and 157 (two cores, AVX512-BF16).
_TEXT_CHUNK, _TEXT_CHUNK_BF16, _TEXT_STEP = 32, 128, 8
#: Batches of texts that are sorted by length together.
_SORTED_BATCHES = 16


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
        precision: ``fp32``, ``bf16``, or ``int8`` (images in int8, texts in fp32): what was asked
            for or chosen, until the first images that are compared with fp32 decide otherwise.
    """

    def __init__(
        self, parts: models.ModelParts, *, device: str = "auto", precision: str = "auto"
    ) -> None:
        self.name = parts.name
        self.spec = parts.spec
        self.fingerprint = parts.loaded_fingerprint or models.fingerprint(parts)
        self.preprocessing = parts.preprocessing
        self.device = choose_device(device)
        if self.device.type == "cuda":
            compute_in_full_float32()
        self._read_fast = precision == "fast"
        self._model: Any = parts.model.eval().requires_grad_(False).to(self.device)
        self._choice = choose_encoding(
            precision,
            self.device,
            self._model,
            name=self.name,
            image_size=parts.preprocessing.size,
        )
        self.precision = self._choice.precisions[0]
        self._is_settled = not self._choice.is_checked or self._choice.precisions == ("fp32",)
        self._fixed_forms: dict[str, EncodeImage] = {}
        self._encode_tokens = text_encoder(self._model)
        self._tokenizer = parts.tokenizer
        shape = (3, 1, 1)
        self._mean = torch.tensor(parts.preprocessing.mean, device=self.device).view(shape)
        self._std = torch.tensor(parts.preprocessing.std, device=self.device).view(shape)
        self.dim = int(self._encode_text_batch(self._tokenizer([""]).to(self.device)).shape[1])

    def __repr__(self) -> str:
        return (
            f"Encoder({self.name!r}, dim={self.dim}, device={self.device}, {self.fingerprint[:12]})"
        )

    @property
    def model(self) -> Any:
        """open_clip's model, in evaluation mode, on `device`."""
        return self._model

    @property
    def tokenizer(self) -> Tokenizer:
        """Texts to int64 (N, context_length)."""
        return self._tokenizer

    @property
    def logit_scale(self) -> float:
        """What similarities are multiplied with before a softmax, as trained (no logarithm)."""
        return float(self._model.logit_scale.detach().exp())

    @property
    def logit_bias(self) -> float | None:
        """What is added to scaled similarities before a sigmoid; None of a softmax model."""
        bias = getattr(self._model, "logit_bias", None)
        return None if bias is None else float(bias.detach())

    @cached_property
    def _encode_pixels(self) -> EncodeImage:
        # When first needed: a search by text must not wait for it.
        encode = self._form("fp32")
        assert encode is not None
        names = [name for name in self._choice.precisions if name != "fp32"]
        if not names:
            return encode
        if self._choice.is_checked and not self._is_settled:
            approximations: dict[str, MakeEncoder] = {
                name: partial(self._form, name) for name in names
            }
            return CheckedEncoder(encode, approximations, self._settle)
        return self._form(self.precision) or encode

    @property
    def settled_precision(self) -> str | None:
        """`precision`, where it is final; None where images have still to be compared."""
        return self.precision if self._is_settled else None

    @property
    def precision_choices(self) -> tuple[str, ...]:
        """The precisions that it may come to, the preferred one first."""
        return self._choice.precisions

    def settle_for(self, precision: str) -> None:
        """Makes a precision final that images decided for, here or in an earlier run."""
        if self._is_settled and precision == self.precision:
            return
        self._settle(precision)
        vars(self).pop("_encode_pixels", None)  # made anew, in this precision

    def _settle(self, precision: str) -> None:
        self.precision, self._is_settled = precision, True

    @cached_property
    def _int8(self) -> EncodeImage | None:
        return int8_image_encoder(self._model)

    @cached_property
    def _exact(self) -> EncodeImage:
        return image_encoder(self._model)

    def _form(self, precision: str, *, is_fixed: bool = False) -> EncodeImage | None:
        """The image tower in one precision; None: it has no such form."""
        if precision == "int8":
            tower, chunk = self._int8, INT8_CHUNK
        else:
            tower = self._exact if precision == "fp32" else self._in_bf16(self._exact)
            chunk = CPU_CHUNK
        if self.device.type != "cpu" and is_fixed:
            chunk = _DEVICE_CHUNK
        return None if tower is None else self._from_pixels(tower, chunk, is_fixed=is_fixed)

    def _in_bf16(self, encode: EncodeImage) -> EncodeImage:
        def encode_in_bf16(image_BCHW: torch.Tensor) -> torch.Tensor:
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                return encode(image_BCHW)

        return encode_in_bf16

    def _from_pixels(
        self, encode: EncodeImage, chunk: int, *, is_fixed: bool = False
    ) -> EncodeImage:
        # Floats are four times the bytes: they are made when their images' turn has come.
        return in_chunks(
            lambda pixels: encode(self.normalised(pixels)),
            chunk,
            self._choice.arrangement,
            is_fixed=is_fixed,
        )

    def preprocess(self, image: Image.Image) -> Pixels:
        """Resizes and crops one decoded image: uint8 (3, H, W). Thread-safe."""
        return self.preprocessing.pixels(image.convert("RGB"))

    def read_pixels(
        self, source: str | Path | bytes, *, uri: str | None = None, is_fast: bool | None = None
    ) -> Pixels:
        """Decodes and preprocesses one file: uint8 (3, H, W). Thread-safe.

        Fast is as training does it: JPEGs at a fraction of their size where that leaves enough, and
        resized by torch, within 40 dB of the exact pixels. Otherwise `preprocess` of the whole
        image.

        Args:
            source: a path, or the file's bytes.
            uri: what error messages call it; the path if not given.
            is_fast: None: in precision ``fast``.

        Raises:
            ImageDecodeError: it cannot be decoded.
        """
        if not (self._read_fast if is_fast is None else is_fast):
            return self.preprocess(decode_image(source, uri=uri))
        stored = decode_stored(source, uri=uri, min_side=self.preprocessing.fast_min_side)
        return self.preprocessing.fast_pixels(stored)

    def normalised(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) uint8 as the model takes them: float32, on their device."""
        return (pixels_BCHW.float() / 255 - self._mean) / self._std

    def encode_pixels(self, pixels_BCHW: Pixels) -> Vectors:
        """Encodes what `preprocess` or `read_pixels` made: (B, 3, H, W) uint8 -> (B, D) float32."""
        pixels = torch.from_numpy(np.ascontiguousarray(pixels_BCHW)).to(self.device)
        with torch.inference_mode():
            return _unit(self._encode_pixels(pixels))

    def encode_pixels_fixed(self, pixels_BCHW: Pixels, precision: str) -> Vectors:
        """`encode_pixels` with the same bits for an image, whatever is encoded with it.

        Args:
            pixels_BCHW: (B, 3, H, W) uint8.
            precision: a final one: `settled_precision`, or ``fp32`` at any time.
        """
        encode = self._fixed_forms.get(precision)
        if encode is None:
            encode = self._form(precision, is_fixed=True)
            if encode is None:
                encode = self._form("fp32", is_fixed=True)
            assert encode is not None
            self._fixed_forms[precision] = encode
        pixels = torch.from_numpy(np.ascontiguousarray(pixels_BCHW)).to(self.device)
        with torch.inference_mode():
            return _unit(encode(pixels))

    def encode_text_fixed(self, texts: Sequence[str]) -> Vectors:
        """`encode_text` with the same bits for a text, whatever is encoded with it.

        Texts of about one length are encoded together, always as many of them: (N, D) float32.
        """
        vectors_ND = np.zeros((len(texts), self.dim), np.float32)
        if not texts:
            return vectors_ND
        tokens_NL = self._tokenizer(list(texts))
        width = tokens_NL.shape[1]
        ends_N = self._encode_tokens.ends(tokens_NL)
        lengths_N = ((ends_N // _TEXT_STEP + 1) * _TEXT_STEP).clamp(max=width)
        size = _TEXT_CHUNK_BF16 if self.precision == "bf16" else _TEXT_CHUNK
        for length in sorted(set(lengths_N.tolist())):
            rows = (lengths_N == length).nonzero().flatten()
            for part in rows.split(size - 1):
                # A tower that cuts a batch at its longest text so cuts it at `length`, whatever
                # is in it.
                filler_L = self._encode_tokens.texts_of_length(tokens_NL[part[0]], int(length))
                filler_XL = filler_L.expand(size - len(part), -1)
                chunk_BL = torch.cat([tokens_NL[part], filler_XL]).to(self.device)
                vectors_ND[part.numpy()] = self._encode_text_batch(chunk_BL)[: len(part)]
        return vectors_ND

    def _encode_text_batch(self, tokens_BL: torch.Tensor) -> Vectors:
        in_bf16 = torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"
        )
        with torch.inference_mode(), in_bf16:
            return _unit(self._encode_tokens(tokens_BL))

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
                finish_opened(image) if isinstance(image, Image.Image) else decode_image(image)
                for image in images[start : start + batch_size]
            ]
            batches.append(self.encode_pixels(np.stack([self.preprocess(one) for one in decoded])))
        return np.concatenate(batches) if batches else np.zeros((0, self.dim), np.float32)

    def encode_text(self, texts: Sequence[str], *, batch_size: int = 256) -> Vectors:
        """Encodes texts: (N, D) float32. Longer ones are cut at the model's context length.

        Texts of about one length are encoded together, since a batch is as long as its longest.
        """
        vectors_ND = np.zeros((len(texts), self.dim), np.float32)
        for start in range(0, len(texts), _SORTED_BATCHES * batch_size):
            tokens_XL = self._tokenizer(list(texts[start : start + _SORTED_BATCHES * batch_size]))
            order_X = self._encode_tokens.ends(tokens_XL).argsort(stable=True)
            for part in torch.split(order_X, batch_size):
                made_BD = self._encode_text_batch(tokens_XL[part].to(self.device))
                vectors_ND[start + part.numpy()] = made_BD
        return vectors_ND


def _unit(features: torch.Tensor) -> Vectors:
    vectors: Vectors = F.normalize(features.float(), dim=-1).cpu().numpy()
    return vectors


def load(
    spec: str | Path,
    *,
    adapter: str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> Encoder:
    """Loads an encoder.

    Args:
        spec: ``NAME/TAG`` of open_clip (``ViT-B-32/laion2b_s34b_b79k``), ``hf-hub:ORG/REPO``, a
            model folder or a run folder; an adapter folder, which names its base.
        adapter: an adapter folder (`clipsys export --adapter`, or peft's) for the model ``spec``.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
        precision: ``fp32``, ``bf16``, or ``int8`` (for processors with VNNI); ``auto``: fp32 or
            bf16, on a CPU by a measurement on the model's own products, which takes half a second
            once and is stored; ``fast``: int8 too, and files are read as in `Encoder.read_pixels`.
            Whatever is chosen, and int8 always, is given up where the first images do not agree
            with fp32 to a cosine of 0.99.

    Raises:
        ModelError: there is no such model, its files are damaged or altered, or the adapter was
            trained on another one.
        ConfigError: the device is not there, or cannot compute in this precision.
    """
    if adapter is not None:
        spec = f"{spec}{BASE_SEPARATOR}{adapter}"
    return Encoder(models.load_model(spec), device=device, precision=precision)


def load_as_listed(spec: str, *, device: str = "auto", precision: str = "auto") -> Encoder | None:
    """Loads weights with the activation of the architecture that open_clip lists them under.

    This is the encoder that clipsys 0.1.0 made of them. None where `load` makes the same one.

    Raises:
        ModelError: as `load` does.
        ConfigError: as `load` does.
    """
    if not models.is_listed_with_other_activation(spec):
        return None
    parts = models.load_model(spec, listed_activation=True)
    return Encoder(parts, device=device, precision=precision)
