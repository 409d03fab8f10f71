"""Records where the model of a collection lies now."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from clipsys.retrieval.encoders.encoding import load_encoder, place_of
from clipsys.retrieval.encoders.pinned import PinnedEncoder
from clipsys.retrieval.storage.manifest import read_manifest
from clipsys.retrieval.writing.writer import Writer


def record_model(
    path: Path,
    encoder: PinnedEncoder,
    model: str,
    writing: Callable[[], AbstractContextManager[Writer]],
) -> None:
    """Writes a model's new place to the manifest; see `Collection.record_model`.

    Args:
        path: the collection's folder.
        encoder: its pin gets the new place. If its model is not loaded, the one at the new place
            is loaded and checked.
        model: what `clipsys.load` takes; a folder's path becomes absolute.
        writing: takes the writer's lock.
    """
    place = place_of(model)
    if place == read_manifest(path).encoder.model:
        return
    pin = encoder.pin.model_copy(update={"model": place})
    if encoder.loaded is None:
        load_encoder(path, pin)
    with writing() as writer:
        writer.record_model(place)
    encoder.pin = pin
