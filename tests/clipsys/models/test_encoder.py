from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clipsys
from clipsys.errors import ConfigError, ImageDecodeError
from clipsys.images.decoding import decode_image
from clipsys.inference import int8
from clipsys.inference.threads import Arrangement
from clipsys.models import devices
from clipsys.models.open_clip_models import load_model
from clipsys.probe.figures import Figures, choose_precision
from clipsys.probe.probing import Work
from tests.conftest import TINY_MODEL, noise_image


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


def test_a_gpu_takes_no_convolution_in_tf32(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reach_the_gpu(*_: object) -> None:
        raise RuntimeError("the model is moved")

    parts = load_model(model_folder)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr("clipsys.models.encoder.choose_device", torch.device)
    monkeypatch.setattr(torch.nn.Module, "to", reach_the_gpu)
    with pytest.raises(RuntimeError, match="the model is moved"):
        clipsys.Encoder(parts, device="cuda")
    assert not torch.backends.cudnn.allow_tf32


def test_bf16_stays_close_to_fp32(model_folder: Path, encoder: clipsys.Encoder) -> None:
    low = clipsys.load(model_folder, precision="bf16").encode_image([noise_image(1)])
    # bf16 keeps 8 bits of mantissa; unit vectors then differ by a few thousandths.
    assert float((low * encoder.encode_image([noise_image(1)])).sum()) > 0.999


def _measured(monkeypatch: pytest.MonkeyPatch, **gflops: float) -> list[tuple[str, ...]]:
    """Lets a machine have these rates; returns the precisions that it is asked for."""
    asked: list[tuple[str, ...]] = []

    def probe(work: Work) -> Figures:
        asked.append(work.precisions)
        rates = {name: gflops[name] for name in work.precisions if name in gflops}
        return Figures(rates, choose_precision(rates), (), Arrangement(1))

    monkeypatch.setattr(devices, "probe", probe)
    return asked


@pytest.mark.parametrize("asked", ["auto", "fast"])
def test_what_is_measured_to_be_faster_is_used_and_checked(
    asked: str,
    model_folder: Path,
    encoder: clipsys.Encoder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _measured(monkeypatch, fp32=88, bf16=378, int8=300)
    images = [noise_image(seed) for seed in range(9)]
    low = clipsys.load(model_folder, device="cpu", precision=asked)
    assert low.precision == "bf16"
    with caplog.at_level("INFO"):
        actual = low.encode_image(images)
    assert "bf16 (the first 9 images agree with fp32 to a cosine of" in caplog.text
    exact = encoder.encode_image(images)
    assert np.abs(actual - exact).max() > 1e-5, "not in bf16"
    assert (actual * exact).sum(axis=1).min() > 0.999
    monkeypatch.setattr("clipsys.inference.checking.MIN_AGREEMENT", 1.01)
    refused = clipsys.load(model_folder, device="cpu", precision="auto")
    np.testing.assert_array_equal(refused.encode_image(images), exact)
    assert refused.precision == "fp32"
    np.testing.assert_array_equal(refused.encode_text(["a"]), encoder.encode_text(["a"]))


@pytest.mark.skipif(not int8.is_fast(), reason="this processor has no VNNI")
def test_auto_leaves_int8_out_and_what_is_asked_for_is_not_measured(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = _measured(monkeypatch, fp32=100, bf16=50, int8=290)
    assert clipsys.load(model_folder, device="cpu").precision == "fp32"
    assert clipsys.load(model_folder, device="cpu", precision="fast").precision == "int8"
    assert asked == [("fp32", "bf16"), ("fp32", "bf16", "int8")]
    for precision in ("fp32", "bf16", "int8"):
        assert clipsys.load(model_folder, precision=precision).precision == precision
    assert len(asked) == 2


def test_a_real_probe_decides_and_is_stored(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CLIPSYS_PROBE")
    monkeypatch.setattr("clipsys.probe.machine.waiting_s", lambda: 0.0)
    assert clipsys.load(model_folder, device="cpu").precision in ("fp32", "bf16")
    assert len(list(tmp_path.rglob("*.json"))) == 1


@pytest.mark.skipif(not int8.is_fast(), reason="this processor has no VNNI")
@pytest.mark.parametrize("asked", ["int8", "fast"])
def test_int8_stays_close_to_fp32_and_leaves_texts_alone(
    asked: str, model_folder: Path, encoder: clipsys.Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    _measured(monkeypatch, fp32=100, bf16=50, int8=290)
    low = clipsys.load(model_folder, precision=asked)
    assert low.precision == "int8"
    images = [noise_image(seed) for seed in range(9)]
    actual, exact = low.encode_image(images), encoder.encode_image(images)
    assert (actual * exact).sum(axis=1).min() > 0.99
    assert np.abs(actual - exact).max() > 1e-5, "not in int8"
    np.testing.assert_array_equal(low.encode_text(["a"]), encoder.encode_text(["a"]))


def test_without_vnni_int8_is_refused_and_fast_is_fp32(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _measured(monkeypatch, fp32=100, bf16=50, int8=290)
    monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda: False)
    assert clipsys.load(model_folder, device="cpu", precision="fast").precision == "fp32"
    with pytest.raises(ConfigError, match="int8: this processor has no instructions for it"):
        clipsys.load(model_folder, device="cpu", precision="int8")


@pytest.mark.skipif(not int8.is_fast(), reason="this processor has no VNNI")
def test_int8_is_refused_for_a_tower_that_it_is_not_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _measured(monkeypatch, fp32=100, bf16=50, int8=290)
    from clipsys.models.open_clip_models import build_model, save_model

    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}
    save_model(build_model({**TINY_MODEL, "vision_cfg": vision}), tmp_path / "resnet")
    with pytest.raises(ConfigError, match=r"int8: the image tower of .* is not a vision"):
        clipsys.load(tmp_path / "resnet", precision="int8")
    images = [noise_image(seed) for seed in range(9)]
    np.testing.assert_array_equal(
        clipsys.load(tmp_path / "resnet", precision="fast").encode_image(images),
        clipsys.load(tmp_path / "resnet", precision="fp32").encode_image(images),
    )


def test_fast_reading_is_close_and_otherwise_it_is_exact(
    model_folder: Path, encoder: clipsys.Encoder, tmp_path: Path
) -> None:
    path = tmp_path / "large.jpg"
    noise_image(2, (40, 30)).resize((640, 480), Image.Resampling.BICUBIC).save(path, quality=92)
    exact = encoder.preprocess(decode_image(path))
    np.testing.assert_array_equal(encoder.read_pixels(path), exact)
    np.testing.assert_array_equal(encoder.read_pixels(path.read_bytes()), exact)
    fast = clipsys.load(model_folder, precision="fast").read_pixels(path)
    error = float(((fast.astype(float) - exact.astype(float)) ** 2).mean())
    assert 0 < error < 255**2 / 10**4.0  # 40 dB


@pytest.mark.parametrize("precision", ["fp32", "fast"])
def test_a_bad_file_is_named_by_who_reads_it(model_folder: Path, precision: str) -> None:
    encoder = clipsys.load(model_folder, precision=precision)
    with pytest.raises(ImageDecodeError, match="shard/7: not an image"):
        encoder.read_pixels(b"nothing", uri="shard/7")
