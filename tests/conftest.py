"""What all tests share: small images, shards and a model folder, made on the spot."""

from __future__ import annotations

import io
import logging
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Processes, not threads, use the other cores: those of pytest-xdist, and ranks. One number of
# threads for all also makes runs comparable bit for bit, since it decides the order of sums.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Indexes of the tests' shards stay out of the user's cache folder. Ranks and other processes of a
# test inherit it: they end without removing a folder of their own.
if "CLIPSYS_TESTS_CACHE" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="clipsys-tests-")
    os.environ["CLIPSYS_CACHE"] = os.environ["CLIPSYS_TESTS_CACHE"] = _CACHE.name
# What `auto` is must not depend on the machine that runs the tests; nor may they touch the user's
# stored measurements. Tests of the probe measure on purpose, into a folder of their own.
os.environ["CLIPSYS_PROBE"] = "off"
_SHARED = "PYTEST_XDIST_WORKER" in os.environ
#: The files that take longest, about a minute each.
_LONGEST = (
    "test_docs.py",
    "test_run.py",
    "test_launch.py",
    "test_exactness.py",
    "test_end_to_end.py",
    "test_browser.py",
)

TINY_MODEL: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def no_tokenizer(texts: list[str]) -> Any:
    """For models of a vocabulary smaller than CLIP's, whose tests draw their tokens."""
    raise AssertionError(f"nothing tokenizes {texts}")


def encode_png(pixels: np.ndarray) -> bytes:
    """A PNG of uint8 (H, W, 3) pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def noise_image(seed: int, size: tuple[int, int] = (40, 48)) -> Image.Image:
    """An image with structure at several scales: (height, width)."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)


def pytest_configure() -> None:
    """Interrupts count: a background job of a script inherits SIGINT as ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where processes share a run, begins with the longest files: then they end together."""
    if _SHARED:
        ranks = {name: number for number, name in enumerate(_LONGEST)}
        items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    """The command line installs a handler; it must not outlive the stream of its test."""
    root, own = logging.getLogger(), logging.getLogger("clipsys")
    handlers, levels = list(root.handlers), (root.level, own.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    own.setLevel(levels[1])


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random weights."""
    import torch

    from clipsys.models.open_clip_models import build_model, save_model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(build_model(TINY_MODEL, for_training=True), folder)
    return folder


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Six images in two class folders, with side-by-side captions."""
    root = tmp_path / "images"
    for number in range(6):
        folder = root / ("cats" if number % 2 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        noise_image(number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}\nnumber {number}\n")
    return root


def write_training_shards(
    folder: Path, count: int = 64, *, shard_bytes: int = 60_000, with_captions: bool = True
) -> str:
    """Shards of noise images with captions, labels and metadata; returns their glob."""
    from clipsys.shards.samples import Sample
    from clipsys.shards.writing import write_shards

    def samples() -> Any:
        for number in range(count):
            image = encode_png(np.asarray(noise_image(number, (32, 32))))
            captions = (f"picture number {number}", f"image {number}") if with_captions else ()
            yield Sample(
                f"{number:04d}",
                image,
                "png",
                captions,
                f"class {number % 4}",
                {"family": number // 2, "clip": number // 10, "place": number % 10},
            )

    write_shards(samples(), folder, shard_bytes=shard_bytes)
    return str(folder / "*.tar")
