"""One unit vector a class: the mean of its prompts' unit vectors, normalised again.

Radford et al. 2021, section 3.1.4. A thousand classes with eighty templates are 80,000 texts, so
the vectors are stored, by the encoder's fingerprint and precision and by the texts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from clipsys.files.user_cache import cache_folder

if TYPE_CHECKING:
    from clipsys.models.encoder import Encoder

Floats = npt.NDArray[np.float32]

#: Raised when the vectors of equal texts change.
VERSION = 1
#: Files beyond which the least recently used ones are removed.
_MAX_FILES = 200

_logger = logging.getLogger(__name__)


def folder() -> Path:
    """``classes`` in ``CLIPSYS_CACHE``, or in ``clipsys`` in the user's cache folder."""
    return cache_folder("classes")


def class_vectors(
    encoder: Encoder, prompts: Sequence[Sequence[str]], *, cache: bool = True
) -> Floats:
    """The vectors of classes: (C, D) float32 of unit norm.

    Args:
        encoder: the model.
        prompts: the texts of each class, one or more.
        cache: whether vectors are looked up and stored; a cache that cannot be used is no error.
    """
    path = None
    if cache:
        with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home folder
            path = _path(encoder, prompts)
            stored = _read(path, (len(prompts), encoder.dim))
            if stored is not None:
                return stored
    text_ND = encoder.encode_text([text for texts in prompts for text in texts])
    vectors_CD = mean_vectors(text_ND, [len(texts) for texts in prompts])
    if path is not None:
        _write(path, vectors_CD)
    return vectors_CD


def mean_vectors(text_ND: Floats, counts: Sequence[int]) -> Floats:
    """One unit vector (C, D) of each run of unit vectors; ``counts``: the length of each run."""
    starts = np.cumsum([0, *counts[:-1]])
    sums_CD = np.add.reduceat(text_ND, starts, axis=0) if len(counts) else text_ND
    vectors_CD = sums_CD / np.asarray(counts, np.float32)[:, None]
    norms = np.linalg.norm(vectors_CD, axis=-1, keepdims=True)
    return np.asarray(vectors_CD / np.maximum(norms, 1e-12), np.float32)


def _path(encoder: Encoder, prompts: Sequence[Sequence[str]]) -> Path:
    precision = "bf16" if encoder.precision == "bf16" else "fp32"
    named = [VERSION, encoder.fingerprint, precision, str(encoder.device.type), prompts]
    text = json.dumps(named, ensure_ascii=True)
    return folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npy"


def _read(path: Path, shape: tuple[int, int]) -> Floats | None:
    try:
        vectors = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        _logger.debug("%s: stored class vectors are not used (%s)", path, error)
        return None
    if vectors.shape != shape or vectors.dtype != np.float32 or not _are_unit(vectors):
        _logger.debug("%s: stored class vectors are not used (damaged)", path)
        return None
    with contextlib.suppress(OSError):
        path.touch()  # the time says when it was last used
    return np.asarray(vectors)


def _are_unit(vectors_CD: Floats) -> bool:
    # A flipped bit of a stored number rarely leaves the norm at 1; NaN never does.
    with np.errstate(all="ignore"):
        norms_C = np.linalg.norm(vectors_CD.astype(np.float64), axis=1)
        return bool((np.abs(norms_C - 1) < 1e-4).all())


def _write(path: Path, vectors_CD: Floats) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                np.save(file, vectors_CD)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        stored = sorted(path.parent.glob("*.npy"), key=lambda one: one.stat().st_mtime)
        for old in stored[: max(0, len(stored) - _MAX_FILES)]:
            old.unlink(missing_ok=True)
    except OSError as error:
        _logger.debug("class vectors are not stored (%s)", error)
