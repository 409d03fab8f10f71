"""Images in any form as vectors, streamed: decoded ahead of the encoder, in threads.

    paths, bytes, PIL, arrays, tensors, folders, tables, shards, iterables of these
        --inputs--> Input --workers: read, decode, resize--> encoder --> (inputs, vectors) in order

Memory depends on the batch size, not on the number of images: an iterable is asked for the next
image when there is room for it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipsys.corpora.sources import iterate_source, source_kind
from clipsys.errors import DataError
from clipsys.images.decoding import EXTENSIONS, finish_opened
from clipsys.processes.interruption import bounded_threads

if TYPE_CHECKING:
    from clipsys.models.encoder import Encoder

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

BATCH_SIZE = 64
_AHEAD = 3 * BATCH_SIZE


@dataclass(frozen=True)
class Input:
    """One image to be encoded.

    Attributes:
        name: its path or uri, or its position (``image 3``) where it has none.
        load: gives a decoded image, or a path or bytes to decode; raises `DataError`.
        given: what else is known of it, such as its record.
    """

    name: str
    load: Callable[[], Image.Image | str | Path | bytes] = field(repr=False)
    given: Any = None


@runtime_checkable
class StoredVectors(Protocol):
    """What has vectors already: `clipsys.retrieval.Collection`."""

    @property
    def encoder_pin(self) -> Any:
        """``name`` and ``fingerprint`` of the encoder that made the vectors."""

    def stored_vectors(self) -> Iterator[tuple[Sequence[Any], Floats]]:
        """Items, each with its ``uri``, and their unit vectors (B, D), block by block."""

    def __len__(self) -> int:
        """How many items there are."""


def inputs(images: Any) -> Iterator[Input]:
    """Images in any form, one by one.

    Args:
        images: one image (path, bytes, PIL image, array, tensor), a folder, a table or shards, or
            an iterable of any of these. Arrays and tensors are (H, W), (H, W, C) or (C, H, W), with
            C 1, 3 or 4, uint8 or floats from 0 to 1; with one axis more in front they are several
            images.

    Raises:
        DataError: one is of another kind.
    """
    numbers = itertools.count()
    yield from _inputs(images, numbers)


def count_of(images: Any) -> int | None:
    """How many images there are, where that is known without reading any."""
    if isinstance(images, np.ndarray) or _is_tensor(images):
        return len(images) if images.ndim == 4 else 1
    if isinstance(images, (bytes, bytearray, Image.Image)):
        return 1
    if isinstance(images, StoredVectors):
        return len(images)
    if isinstance(images, (str, Path)) or not isinstance(images, Sequence):
        return None
    counts = [1 if _is_image_file(one) else count_of(one) for one in images]
    return None if None in counts else sum(filter(None, counts))


def encoded(
    encoder: Encoder,
    found: Iterable[Input],
    *,
    on_error: Callable[[Input, DataError], None] | None = None,
    batch_size: int = BATCH_SIZE,
) -> Iterator[tuple[list[Input], Floats]]:
    """Usable images in their order with their unit vectors (B, D), batch by batch.

    Args:
        encoder: the model.
        found: images; each is asked for when there is room for it.
        on_error: called with what cannot be used; None: it is raised.
        batch_size: images encoded at once.
    """
    kept: list[Input] = []
    pixels: list[Pixels] = []
    for one, image in _decoded(encoder, iter(found), on_error):
        kept.append(one)
        pixels.append(image)
        if len(kept) == batch_size:
            yield kept, encoder.encode_pixels(np.stack(pixels))
            kept, pixels = [], []
    if kept:
        yield kept, encoder.encode_pixels(np.stack(pixels))


def _decoded(
    encoder: Encoder,
    found: Iterator[Input],
    on_error: Callable[[Input, DataError], None] | None,
) -> Iterator[tuple[Input, Pixels]]:
    def load(one: Input) -> Pixels:
        image = one.load()
        if isinstance(image, Image.Image):
            return encoder.preprocess(finish_opened(image, uri=one.name))
        return encoder.read_pixels(image, uri=one.name)

    ahead: deque[tuple[Input, Future[Pixels]]] = deque()
    with bounded_threads(min(16, os.cpu_count() or 1), "clipsys-decode") as pool:
        while True:
            for one in itertools.islice(found, _AHEAD - len(ahead)):
                ahead.append((one, pool.submit(load, one)))
            if not ahead:
                return
            one, future = ahead.popleft()
            try:
                pixels = future.result()
            except DataError as error:
                if on_error is None:
                    raise
                on_error(one, error)
                continue
            yield one, pixels


def _inputs(images: Any, numbers: Iterator[int]) -> Iterator[Input]:
    if isinstance(images, (str, Path)):
        yield from _of_place(images, numbers)
    elif isinstance(images, (bytes, bytearray)):
        encoded_image = bytes(images)
        yield Input(f"image {next(numbers)}", lambda: encoded_image)
    elif isinstance(images, Image.Image):
        yield Input(f"image {next(numbers)}", lambda: images)
    elif isinstance(images, np.ndarray) or _is_tensor(images):
        yield from _of_array(images, numbers)
    elif hasattr(images, "read"):
        yield from _inputs(images.read(), numbers)
    elif isinstance(images, Iterable) and not isinstance(images, Mapping):
        is_kept = isinstance(images, Sequence)
        for one in images:
            yield from _inputs(one if is_kept else _own(one), numbers)
    else:
        raise DataError(
            f"image {next(numbers)} is of type {type(images).__name__}; expected a path, bytes, a "
            "PIL image, an array, a tensor, a folder, or an iterable of these"
        )


def _own(one: Any) -> Any:
    """A copy of what its maker may fill anew: frames of a video or an animation share a buffer."""
    if isinstance(one, np.ndarray):
        return one.copy()
    if _is_tensor(one):
        return one.detach().clone()
    if isinstance(one, Image.Image) and getattr(one, "is_animated", False):
        with contextlib.suppress(OSError, ValueError, SyntaxError):  # loading it says so again
            return one.copy()
    return one


def _of_place(place: str | Path, numbers: Iterator[int]) -> Iterator[Input]:
    path = Path(place).expanduser()
    if _is_image_file(place) or (path.is_file() and _kind_or_none(place) is None):
        next(numbers)
        yield Input(str(place), lambda: path)
        return
    for record in iterate_source(place):
        next(numbers)
        yield Input(record.uri, record.read, record)


def _is_image_file(place: Any) -> bool:
    if not isinstance(place, (str, Path)):
        return False
    path = Path(place).expanduser()
    return path.suffix.lower() in EXTENSIONS and not path.is_dir()


def _kind_or_none(place: str | Path) -> str | None:
    try:
        return source_kind(place)
    except DataError:
        return None


def _is_tensor(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "detach")


def _of_tensor(tensor: Any) -> npt.NDArray[Any]:
    held = tensor.detach().cpu()
    # NumPy has no bfloat16, nor floats of 8 bits.
    return np.asarray((held.float() if held.is_floating_point() else held).numpy())


def _of_array(array: Any, numbers: Iterator[int]) -> Iterator[Input]:
    values = _of_tensor(array) if _is_tensor(array) else array
    if values.ndim == 4:
        for one in values:
            yield from _of_array(one, numbers)
        return
    name = f"image {next(numbers)}"
    yield Input(name, partial(_image_of, values, name))


def _image_of(values: npt.NDArray[Any], name: str) -> Image.Image:
    shape = values.shape
    if values.ndim == 3 and shape[0] in (1, 3, 4) and shape[2] not in (1, 3, 4):
        values = values.transpose(1, 2, 0)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    has_channels = values.ndim == 3 and values.shape[2] in (3, 4)
    if 0 in shape or not (values.ndim == 2 or has_channels):
        raise DataError(
            f"{name}: an array of shape {shape} is no image; expected (H, W), (H, W, 3) or "
            "(3, H, W)"
        )
    if np.issubdtype(values.dtype, np.floating):
        low, high = float(values.min(initial=0)), float(values.max(initial=0))
        if not (low >= 0 and high <= 1):
            raise DataError(
                f"{name}: floats from {low:.3g} to {high:.3g}; expected 0 to 1, not normalised"
            )
        values = (values * 255).round().astype(np.uint8)
    elif values.dtype == bool:
        values = values.astype(np.uint8) * 255
    elif values.dtype != np.uint8:
        raise DataError(f"{name}: an array of {values.dtype}; expected uint8, or floats 0 to 1")
    image = Image.fromarray(np.ascontiguousarray(values))
    if image.mode == "RGBA":  # transparency on white, as of files
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
