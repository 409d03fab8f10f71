"""Vectors of a data set: equal to plain encoding, once each, the same bits in every process."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clipsys
from clipsys.corpora.records import Record
from clipsys.errors import DataError
from clipsys.evaluation import encoding
from clipsys.evaluation.cache import EmbeddingCache
from clipsys.evaluation.data import DataSet, open_data
from clipsys.evaluation.encoding import encode_images, encode_texts
from clipsys.images.decoding import decode_image
from clipsys.models.encoder import Encoder
from tests.conftest import encode_png, noise_image


@dataclass(frozen=True)
class Shuffled:
    """A corruption that depends on its seed."""

    strength: int = 40

    @property
    def key(self) -> str:
        return f"shuffled {self.strength}"

    def __call__(self, pixels_HWC: np.ndarray, seed: int) -> np.ndarray:
        noise = np.random.default_rng(seed).integers(0, self.strength, pixels_HWC.shape)
        return np.clip(pixels_HWC + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def encoder(model_folder: Path) -> Encoder:
    return clipsys.load(model_folder, device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """130 different images, more than a block, of which the first three occur twice."""
    root = tmp_path_factory.mktemp("images")
    for number in range(133):
        content = encode_png(np.asarray(noise_image(number % 130, (24, 30))))
        (root / f"{number:03d}.png").write_bytes(content)
    return root


@pytest.fixture
def counted(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of images of each forward."""
    seen: list[int] = []
    plain = Encoder.encode_pixels_fixed

    def count(self: Encoder, pixels: Any, precision: str) -> Any:
        seen.append(len(pixels))
        return plain(self, pixels, precision)

    monkeypatch.setattr(Encoder, "encode_pixels_fixed", count)
    return seen


def _of(records: Sequence[Record]) -> DataSet:
    return open_data("data", records=records)


def _records(folder: Path) -> list[Record]:
    return list(open_data(folder).records())


def test_vectors_equal_those_of_single_images(encoder: Encoder, folder: Path) -> None:
    images = encode_images(encoder, open_data(folder), cache=None)
    assert len(images) == 133
    plain = np.concatenate(
        [encoder.encode_image([decode_image(record.read())]) for record in images.records]
    )
    np.testing.assert_allclose(images.vectors_ND, plain, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(images.vectors_ND, axis=1), 1, atol=1e-6)
    assert images.contents[0] == images.contents[130]


def test_equal_images_are_encoded_once_and_a_second_run_encodes_nothing(
    encoder: Encoder, folder: Path, tmp_path: Path, counted: list[int]
) -> None:
    cache = EmbeddingCache(tmp_path)
    first = encode_images(encoder, open_data(folder), cache=cache)
    assert sum(counted) == 130
    counted.clear()
    second = encode_images(encoder, open_data(folder), cache=EmbeddingCache(tmp_path))
    assert counted == []
    np.testing.assert_array_equal(first.vectors_ND, second.vectors_ND)
    assert first.contents == second.contents


def test_bits_depend_neither_on_order_nor_on_what_is_stored(
    encoder: Encoder, folder: Path, tmp_path: Path
) -> None:
    records = _records(folder)
    fresh = encode_images(encoder, _of(records), cache=None).vectors_ND
    turned = encode_images(encoder, _of(records[::-1]), cache=None).vectors_ND
    np.testing.assert_array_equal(turned[::-1], fresh)
    cache = EmbeddingCache(tmp_path)
    encode_images(encoder, _of(records[::3]), cache=cache)
    encode_images(encoder, _of(records[5:6]), cache=cache)
    partly = encode_images(encoder, _of(records), cache=cache).vectors_ND
    np.testing.assert_array_equal(partly, fresh)


def test_worker_processes_give_the_same_bits(
    encoder: Encoder, folder: Path, tmp_path: Path
) -> None:
    records = [*_records(folder), Record("/x/bad.png", lambda: b"no image")]
    cache = EmbeddingCache(tmp_path)
    corruption = Shuffled()
    one = encode_images(encoder, _of(records), cache=None, corruption=corruption)
    two = encode_images(encoder, _of(records), cache=cache, corruption=corruption, num_processes=2)
    np.testing.assert_array_equal(one.vectors_ND, two.vectors_ND)
    assert one.contents == two.contents


def test_an_interrupted_run_leaves_what_it_has_encoded(
    encoder: Encoder, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Encoder.encode_pixels_fixed
    calls: list[int] = []

    def interrupted(self: Encoder, pixels: Any, precision: str) -> Any:
        calls.append(len(pixels))
        if len(calls) > 1:
            raise KeyboardInterrupt
        return plain(self, pixels, precision)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Encoder, "encode_pixels_fixed", interrupted)
        encode_images(encoder, open_data(folder), cache=EmbeddingCache(tmp_path))
    rest: list[int] = []
    monkeypatch.setattr(
        Encoder,
        "encode_pixels_fixed",
        lambda self, pixels, precision: (rest.append(len(pixels)), plain(self, pixels, precision))[
            1
        ],
    )
    images = encode_images(encoder, open_data(folder), cache=EmbeddingCache(tmp_path))
    assert rest == [130 - 96]
    fresh = encode_images(encoder, open_data(folder), cache=None)
    np.testing.assert_array_equal(images.vectors_ND, fresh.vectors_ND)


def test_what_another_run_encodes_is_waited_for(
    encoder: Encoder,
    folder: Path,
    tmp_path: Path,
    counted: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    records = _records(folder)[:20]
    fresh = encode_images(encoder, _of(records), cache=None)
    keys = [encoding._key("image exact", bytes.fromhex(one)) for one in fresh.contents]
    cache = EmbeddingCache(tmp_path)
    counted.clear()
    # The process with number 1 lives: ten claims are its own, of which it keeps nine.
    monkeypatch.setattr("clipsys.evaluation.cache.os.getpid", lambda: 1)
    with encoding._open(cache, encoder, "fp32") as other:
        other.claim(keys[:10])
        other.close = lambda: None  # type: ignore[method-assign]
    monkeypatch.undo()

    def finish() -> None:
        time.sleep(0.4)
        with encoding._open(cache, encoder, "fp32") as late:
            late.put(dict(zip(keys[:9], fresh.vectors_ND[:9], strict=True)))
            assert late._connection is not None
            late._connection.execute("DELETE FROM claims")

    thread = threading.Thread(target=finish)
    thread.start()
    waited: list[int] = []
    plain = Encoder.encode_pixels_fixed
    monkeypatch.setattr(
        Encoder,
        "encode_pixels_fixed",
        lambda self, pixels, precision: (
            waited.append(len(pixels)),
            plain(self, pixels, precision),
        )[1],
    )
    images = encode_images(encoder, _of(records), cache=cache)
    thread.join()
    assert waited == [10, 1]
    np.testing.assert_array_equal(images.vectors_ND, fresh.vectors_ND)


def test_a_corruption_has_vectors_of_its_own_drawn_from_the_content(
    encoder: Encoder, folder: Path, tmp_path: Path
) -> None:
    records = _records(folder)[:9]
    cache = EmbeddingCache(tmp_path)
    clean = encode_images(encoder, _of(records), cache=cache).vectors_ND
    noisy = encode_images(encoder, _of(records), cache=cache, corruption=Shuffled()).vectors_ND
    stronger = encode_images(encoder, _of(records), cache=cache, corruption=Shuffled(90)).vectors_ND
    assert not np.array_equal(clean, noisy)
    assert not np.array_equal(noisy, stronger)
    turned = encode_images(encoder, _of(records[::-1]), cache=None, corruption=Shuffled())
    np.testing.assert_array_equal(turned.vectors_ND[::-1], noisy)
    again = encode_images(encoder, _of(records), cache=cache).vectors_ND
    np.testing.assert_array_equal(again, clean)


def test_fast_decoding_is_close_and_stored_apart(
    encoder: Encoder, tmp_path: Path, counted: list[int]
) -> None:
    for number in range(4):
        noise_image(number, (200, 240)).save(tmp_path / f"{number}.jpg", quality=92)
    cache = EmbeddingCache(tmp_path / "cache")
    exact = encode_images(encoder, open_data(tmp_path), cache=cache).vectors_ND
    fast = encode_images(encoder, open_data(tmp_path), cache=cache, decode="fast").vectors_ND
    assert counted == [4, 4]
    assert not np.array_equal(exact, fast)
    assert (exact * fast).sum(axis=1).min() > 0.99


def test_unusable_images_are_counted_and_named_in_one_warning(
    encoder: Encoder, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def gone() -> bytes:
        raise DataError("/x/gone.png: cannot be read (No such file or directory)")

    bad = Record("/x/bad.png", lambda: b"no image")
    records = [bad, *_records(folder)[:2], Record("/x/gone.png", gone), bad]
    images = encode_images(encoder, _of(records), cache=None)
    assert len(images) == 2
    (line,) = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
    assert line.startswith("3 images cannot be used: 1 unreadable, 2 not an image (")
    assert "/x/gone.png" in line
    assert "/x/bad.png" in line
    with pytest.raises(DataError, match="data: none of the images can be used"):
        encode_images(encoder, _of([bad]), cache=None)


def test_the_precision_is_settled_before_vectors_are_looked_up(
    model_folder: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clipsys.models import encoder as encoders
    from clipsys.models.devices import EncodingChoice

    monkeypatch.setattr(
        encoders, "choose_encoding", lambda *_, **__: EncodingChoice(("bf16", "fp32"), True)
    )
    monkeypatch.setattr("clipsys.inference.checking.MIN_AGREEMENT", 2.0)  # nothing agrees
    cache = EmbeddingCache(tmp_path)
    records = _records(folder)
    undecided = clipsys.load(model_folder, device="cpu", precision="auto")
    few = encode_images(undecided, _of(records[:3]), cache=cache)
    assert undecided.settled_precision is None  # too few to decide: fp32, and stored as such
    exact = clipsys.load(model_folder, device="cpu", precision="auto")
    images = encode_images(exact, _of(records), cache=cache)
    assert exact.settled_precision == "fp32"
    np.testing.assert_array_equal(images.vectors_ND[:3], few.vectors_ND)
    # A later run goes by the earlier one's comparison.
    monkeypatch.setattr("clipsys.inference.checking.MIN_AGREEMENT", -1.0)
    later = clipsys.load(model_folder, device="cpu", precision="auto")
    again = encode_images(later, _of(records), cache=cache)
    assert later.settled_precision == "fp32"
    np.testing.assert_array_equal(again.vectors_ND, images.vectors_ND)
    # Without one it decides by its own images, and its vectors are those of bf16.
    other = clipsys.load(model_folder, device="cpu", precision="auto")
    rounded = encode_images(other, _of(records), cache=None)
    assert other.settled_precision == "bf16"
    assert not np.array_equal(rounded.vectors_ND, images.vectors_ND)


def test_texts_equal_plain_encoding_and_are_encoded_once(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = list("a photo of one red dog and two cats in the snow")
    texts = [" ".join(words[: 1 + n % 14]) + f" {n % 50}" for n in range(120)]
    cache = EmbeddingCache(tmp_path)
    made = encode_texts(encoder, texts, cache=cache)
    assert made.dtype == np.float32
    plain = np.concatenate([encoder.encode_text([text]) for text in texts])
    np.testing.assert_allclose(made, plain, atol=1e-6)
    turned = encode_texts(encoder, texts[::-1], cache=None)
    np.testing.assert_array_equal(turned[::-1], made)
    np.testing.assert_array_equal(encode_texts(encoder, texts[7:8], cache=None)[0], made[7])
    seen: list[int] = []
    plain_fixed = Encoder.encode_text_fixed
    monkeypatch.setattr(
        Encoder,
        "encode_text_fixed",
        lambda self, some: (seen.append(len(some)), plain_fixed(self, some))[1],
    )
    again = encode_texts(encoder, [*texts, texts[0], "a new one", "a new one"], cache=cache)
    assert sum(seen) == 1
    np.testing.assert_array_equal(again[:120], made)
    assert encode_texts(encoder, [], cache=cache).shape == (0, encoder.dim)
