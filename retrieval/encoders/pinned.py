"""The encoder that a collection is pinned to: loaded when first needed, one call at a time."""

from __future__ import annotations

import threading
from pathlib import Path

from clipsys.inference.numpy_text_tower import LightTower
from clipsys.retrieval.encoders import light
from clipsys.retrieval.encoders.encoding import (
    ImageTextEncoder,
    TurnTakingEncoder,
    load_encoder,
)
from clipsys.retrieval.storage.manifest import EncoderPin


class PinnedEncoder:
    """Loads the model of a manifest on first use, and stands in for it where torch is not needed.

    Args:
        folder: of the collection, for messages.
        data: folder of its current edition, where the light text tower is recorded.
        pin: what the manifest says of the model.
        encoder: the model, if it is loaded already.
        precision: in which images are encoded; see `clipsys.load`.
    """

    def __init__(
        self,
        folder: Path,
        data: Path,
        pin: EncoderPin,
        encoder: ImageTextEncoder | None,
        *,
        precision: str,
    ) -> None:
        self.pin = pin
        #: Held around each call of the model.
        self.lock = threading.Lock()
        #: The model, None as long as nothing has needed it.
        self.loaded = encoder
        self._folder = folder
        self._data = data
        self._precision = precision
        self._light: LightTower | None = None
        self._is_light_remembered = False

    def get(self) -> ImageTextEncoder:
        """The model, loaded now if it was not yet.

        Raises:
            ModelError: the manifest's model cannot be loaded.
            CollectionError: another model lies there now.
        """
        if self.loaded is None:
            with self.lock:
                if self.loaded is None:
                    self.loaded = load_encoder(self._folder, self.pin, precision=self._precision)
        return self.loaded

    def turns(self) -> TurnTakingEncoder:
        """The model, loaded at its first call, whose calls take turns."""
        return TurnTakingEncoder(self.get, self.lock)

    def light_tower(self, num_texts: int) -> LightTower | None:
        """The text tower in numpy, where it saves loading the model for so many texts."""
        if self.loaded is not None or not 0 < num_texts <= light.MAX_TEXTS:
            return None
        if self._light is None:
            self._light = light.open_light(self._data, self.pin)
        return self._light

    def remember_light_tower(self) -> None:
        """Records, once the model is loaded, that the next process can encode texts without it."""
        if self.loaded is None or self._is_light_remembered:
            return
        self._is_light_remembered = True
        if light.open_light(self._data, self.pin) is None:
            with self.lock:
                light.remember(self._data, self.pin, self.loaded)
