"""The interface of an encoder, one whose callers take turns, and the check that it fits.

Shapes: B batch, N texts, D embedding width, (3, H, W) a preprocessed image.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipsys.errors import ClipsysError, CollectionError, ConfigError, ModelError
from clipsys.retrieval.storage.manifest import EncoderPin
from clipsys.retrieval.storage.segments import Floats

_logger = logging.getLogger(__name__)


class ImageTextEncoder(Protocol):
    """What a collection needs of an encoder; `clipsys.Encoder` is one."""

    @property
    def name(self) -> str:
        """What people call it."""
        ...

    @property
    def spec(self) -> str:
        """What `clipsys.load` takes to load it again; empty if nothing does."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal for two encoders if and only if their vectors can be compared."""
        ...

    @property
    def dim(self) -> int:
        """Embedding width D."""
        ...

    def preprocess(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """A decoded RGB image as uint8 (3, H, W). Called from several threads."""
        ...

    def read_pixels(
        self, source: str | Path | bytes, *, uri: str | None = None
    ) -> npt.NDArray[np.uint8]:
        """A file, by its path or bytes, as uint8 (3, H, W). Called from several threads.

        Raises `ImageDecodeError` where it cannot be decoded.
        """
        ...

    def encode_pixels(self, pixels_BCHW: npt.NDArray[np.uint8]) -> Floats:
        """Preprocessed images as unit vectors, (B, D) float32."""
        ...

    def encode_text(self, texts: Sequence[str]) -> Floats:
        """Texts as unit vectors, (N, D) float32."""
        ...


class TurnTakingEncoder:
    """An encoder whose model runs one call at a time; reading stays concurrent.

    The app answers several people and may index meanwhile, and running a model is not thread-safe.

    Args:
        get: gives the encoder; called at each use, so that one that is never used is never loaded.
        lock: held while the model runs.
    """

    def __init__(self, get: Callable[[], ImageTextEncoder], lock: threading.Lock) -> None:
        self._get = get
        self._lock = lock

    @property
    def name(self) -> str:
        """What people call the encoder."""
        return self._get().name

    @property
    def spec(self) -> str:
        """What `clipsys.load` takes to load it again; empty if nothing does."""
        return self._get().spec

    @property
    def fingerprint(self) -> str:
        """Covers weights, preprocessing and tokenizer."""
        return self._get().fingerprint

    @property
    def dim(self) -> int:
        """Embedding width D."""
        return self._get().dim

    def preprocess(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """A decoded RGB image as uint8 (3, H, W)."""
        return self._get().preprocess(image)

    def read_pixels(
        self, source: str | Path | bytes, *, uri: str | None = None
    ) -> npt.NDArray[np.uint8]:
        """A file as uint8 (3, H, W)."""
        return self._get().read_pixels(source, uri=uri)

    def encode_pixels(self, pixels_BCHW: npt.NDArray[np.uint8]) -> Floats:
        """Preprocessed images as unit vectors, (B, D) float32."""
        encoder = self._get()
        with self._lock:
            return encoder.encode_pixels(pixels_BCHW)

    def encode_text(self, texts: Sequence[str]) -> Floats:
        """Texts as unit vectors, (N, D) float32."""
        encoder = self._get()
        with self._lock:
            return encoder.encode_text(texts)


def load_encoder(folder: Path, pin: EncoderPin, *, precision: str = "fast") -> ImageTextEncoder:
    """Loads the model that a collection is pinned to.

    Args:
        folder: of the collection, for messages.
        pin: what its manifest says of the model.
        precision: see `clipsys.load`.

    Raises:
        ModelError: it cannot be loaded.
        CollectionError: what lies there now is another model.
        ConfigError: this machine cannot compute in this precision.
    """
    import clipsys

    try:
        encoder: ImageTextEncoder = clipsys.load(pin.model, precision=precision)
    except ConfigError:
        raise
    except ClipsysError as error:
        raise ModelError(
            f"{folder}: its model{pin.name and f' {pin.name}'} cannot be loaded from {pin.model} "
            f"({error}); if it was moved, `clipsys index {folder} --model PLACE` "
            "records that, and `--model PLACE` of search and ui uses it once"
        ) from error
    if encoder.fingerprint != pin.fingerprint:
        encoder = _load_as_before(folder, pin, precision=precision) or encoder
    check_encoder(folder, pin, encoder)
    return encoder


def _load_as_before(folder: Path, pin: EncoderPin, *, precision: str) -> ImageTextEncoder | None:
    """The encoder that clipsys 0.1.0 made of a model's weights, if it made these vectors."""
    from clipsys.models.encoder import load_as_listed

    encoder = load_as_listed(pin.model, precision=precision)
    if encoder is None or encoder.fingerprint != pin.fingerprint:
        return None
    _logger.warning(
        "%s: its vectors were made by clipsys 0.1.0 without QuickGELU, the activation that %s was "
        "trained with, and its texts are encoded likewise; `clipsys index %s --migrate --model %s` "
        "encodes the images again, as the weights were meant",
        *(folder, pin.name, folder, pin.model),
    )
    return encoder


def place_of(model: str) -> str:
    """What a manifest says of a model's place: an absolute path for a folder, else its name."""
    folder = Path(model.removeprefix("local-dir:")).expanduser()
    return str(folder.absolute()) if folder.is_dir() else model


def pin_of(encoder: ImageTextEncoder, model: str | None) -> EncoderPin:
    """What a manifest says of an encoder; ``model``: what `clipsys.load` takes to load it again."""
    return EncoderPin(
        name=encoder.name,
        model=model or encoder.spec or encoder.name,
        fingerprint=encoder.fingerprint,
        dim=encoder.dim,
    )


def check_encoder(folder: Path, pin: EncoderPin, encoder: ImageTextEncoder) -> None:
    """Refuses an encoder that did not make a collection's vectors.

    Raises:
        CollectionError: it is another one; names both.
    """
    if encoder.fingerprint != pin.fingerprint or encoder.dim != pin.dim:
        raise CollectionError(
            f"{folder}: its vectors are of model {pin.name} ({pin.fingerprint[:12]}), not of "
            f"{encoder.name} ({encoder.fingerprint[:12]}); use that model, or give the collection "
            "to the other with `clipsys index --migrate`"
        )
