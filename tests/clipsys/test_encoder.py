from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import clipsys
from clipsys.errors import ConfigError, ImageDecodeError
from tests.conftest import noise_image


@pytest.fixture(scope="module")
def encoder(model_folder: Path) -> clipsys.Encoder:
    return clipsys.load(model_folder)


def test_vectors_are_float32_of_unit_norm(encoder: clipsys.Encoder) -> None:
    for vectors in (encoder.encode_image([noise_image(0)]), encoder.encode_text(["a", "b"])):
        assert vectors.dtype == np.float32
        assert vectors.shape[1] == encoder.dim
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_batches_do_not_change_the_vectors(encoder: clipsys.Encoder) -> None:
    images = [noise_image(seed) for seed in range(5)]
    texts = [f"text {n} " * n for n in range(1, 6)]
    np.testing.assert_allclose(
        encoder.encode_image(images), encoder.encode_image(images, batch_size=2), atol=1e-6
    )
    np.testing.assert_allclose(
        encoder.encode_text(texts), encoder.encode_text(texts, batch_size=2), atol=1e-6
    )


def test_nothing_gives_no_rows(encoder: clipsys.Encoder) -> None:
    assert encoder.encode_image([]).shape == (0, encoder.dim)
    assert encoder.encode_text([]).shape == (0, encoder.dim)


def test_paths_and_pixels_give_what_images_give(encoder: clipsys.Encoder, tmp_path: Path) -> None:
    noise_image(3).save(tmp_path / "a.png")
    expected = encoder.encode_image([noise_image(3)])
    np.testing.assert_array_equal(encoder.encode_image([tmp_path / "a.png"]), expected)
    pixels = encoder.preprocess(noise_image(3))
    np.testing.assert_array_equal(encoder.encode_pixels(pixels[None]), expected)


def test_a_bad_file_is_named(encoder: clipsys.Encoder, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"nothing")
    with pytest.raises(ImageDecodeError, match=r"bad\.jpg"):
        encoder.encode_image([tmp_path / "bad.jpg"])


def test_a_run_folder_is_loaded_by_its_model(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(model_folder)
    assert clipsys.load(tmp_path / "run").fingerprint == clipsys.load(model_folder).fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "quantum"}, "device 'quantum' is not known"),
        ({"precision": "int3"}, "precision 'int3' is not known"),
    ],
)
def test_an_unknown_option_is_refused(
    model_folder: Path, options: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        clipsys.load(model_folder, **options)


def test_bf16_stays_close_to_fp32(model_folder: Path, encoder: clipsys.Encoder) -> None:
    low = clipsys.load(model_folder, precision="bf16").encode_image([noise_image(1)])
    # bf16 keeps 8 bits of mantissa; unit vectors then differ by a few thousandths.
    assert float((low * encoder.encode_image([noise_image(1)])).sum()) > 0.999
