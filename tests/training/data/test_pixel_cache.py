"""Decoded images: one file for the ranks of a machine, and none left behind."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from clipsys.training.data import pixel_cache
from clipsys.training.data.pixel_cache import make_cache
from clipsys.training.data.samples import DecodedImage, Decoder
from tests.ranks import run_ranks
from tests.training.data.test_batches import _dataset

EPOCHS = 4


def _decode_all(rank: int, world_size: int, shards: str, folder: Path) -> list[str]:
    """The places of the images that this rank decodes in some epochs, step by step."""
    tempfile.tempdir = str(folder)
    decoded: list[str] = []
    pixels = Decoder.pixels

    def counted(self: Decoder, data: bytes, place: str) -> Any:
        decoded.append(place)
        return pixels(self, data, place)

    Decoder.pixels = counted  # type: ignore[method-assign]
    batches = _dataset(
        shards, rank=rank, world_size=world_size, epochs=EPOCHS, pixel_cache_bytes=10**9
    )
    dist.barrier()
    assert list(folder.iterdir()) == []  # nothing to clean up, even after a SIGKILL
    for _ in batches:
        dist.barrier()
    return decoded


def test_the_ranks_of_a_machine_decode_each_image_once(shards: str, tmp_path: Path) -> None:
    first, second = run_ranks(_decode_all, 2, shards, tmp_path)
    assert len(first) > 10
    assert len(second) > 10
    assert len(set(first + second)) == len(first + second)


def _open_what_another_cannot(rank: int, world_size: int, folder: Path) -> list[bool]:
    tempfile.tempdir = str(folder)
    if rank == 1:
        pixel_cache.os.open = _refuse
    cache = make_cache(4, (8, 8), limit_bytes=10**6)
    dist.barrier()
    return [cache is not None, not list(folder.iterdir())]


def _refuse(*arguments: object) -> int:
    raise OSError(13, "Permission denied")


def test_a_rank_that_cannot_open_the_file_decodes_anew(tmp_path: Path) -> None:
    assert run_ranks(_open_what_another_cannot, 2, tmp_path) == [[True, True], [False, True]]


def test_macos_has_no_posix_fallocate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache = make_cache(700, (32, 32), limit_bytes=10**8)  # more than a block of zeros
    assert cache is not None
    assert cache.get(699) is None
    image = DecodedImage(np.full((3, 32, 32), 7, np.uint8), 5)
    cache.put(699, image)
    found = cache.get(699)
    assert found is not None
    assert (found.group, int(found.pixels.min())) == (5, 7)
    assert list(tmp_path.iterdir()) == []

    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    assert make_cache(700, (32, 32), limit_bytes=10**8) is None
    assert list(tmp_path.iterdir()) == []
