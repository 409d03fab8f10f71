from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clipsys
from clipsys.errors import ConfigError, ImageDecodeError, ModelError
from clipsys.evaluation import feature_maps as module
from clipsys.evaluation.feature_maps import feature_layers, feature_maps
from tests.conftest import noise_image


def test_a_sheet_has_the_image_all_channels_and_single_ones(model_folder: Path) -> None:
    encoder = clipsys.load(model_folder)
    few = feature_maps(encoder, noise_image(1), channels=2)
    many = feature_maps(encoder, noise_image(1), "transformer.resblocks.0", channels=16)
    assert many.width > few.width and many.height > few.height
    assert few.tobytes() == feature_maps(encoder, noise_image(1), channels=2).tobytes()


def test_an_unknown_layer_is_answered_with_those_there_are(model_folder: Path) -> None:
    encoder = clipsys.load(model_folder)
    assert feature_layers(encoder) == ("conv1", "transformer.resblocks.0")
    with pytest.raises(ConfigError, match="no layer 'x'; its layers are conv1, transformer"):
        feature_maps(encoder, noise_image(1), "x")
    with pytest.raises(ConfigError, match="channels is -1"):
        feature_maps(encoder, noise_image(1), channels=-1)


def test_the_sheet_shows_the_input_and_the_channels_that_vary_most(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = clipsys.load(model_folder)
    tiles: list[tuple[str, Image.Image]] = []
    made = module._sheet

    def recording(title: str, given: list[tuple[str, Image.Image]]) -> Image.Image:
        tiles.extend(given)
        return made(title, given)

    monkeypatch.setattr(module, "_sheet", recording)
    feature_maps(encoder, noise_image(1), "conv1", channels=5)
    pixels_CHW = encoder.preprocess(noise_image(1))
    with torch.no_grad():
        image_BCHW = encoder.normalised(torch.from_numpy(pixels_CHW)[None])
        map_CHW = encoder.model.visual.conv1(image_BCHW)[0].numpy()
    most = np.argsort(-map_CHW.var(axis=(1, 2)))[:5]
    assert [name for name, _ in tiles] == [
        "image",
        f"{len(map_CHW)} channels",
        *(f"channel {number}" for number in most),
    ]
    assert np.array_equal(np.asarray(tiles[0][1]), pixels_CHW.transpose(1, 2, 0))
    assert tiles[1][1].size == tiles[2][1].size == map_CHW.shape[:0:-1]
    highest = np.asarray(tiles[2][1])[np.unravel_index(map_CHW[most[0]].argmax(), (2, 2))]
    assert highest.tolist() == [253, 231, 37]  # the end of viridis


def test_all_channels_are_shown_of_a_layer_with_fewer(model_folder: Path) -> None:
    encoder = clipsys.load(model_folder)
    all_of_them = feature_maps(encoder, noise_image(1), "conv1", channels=32)
    assert all_of_them.tobytes() == feature_maps(encoder, noise_image(1), "conv1", 99).tobytes()


def test_a_picture_of_one_colour_is_drawn_too(model_folder: Path) -> None:
    sheet = feature_maps(clipsys.load(model_folder), Image.new("RGB", (9, 9)), "conv1")
    assert sheet.mode == "RGB"


def test_an_opened_picture_is_what_its_file_is(model_folder: Path, tmp_path: Path) -> None:
    encoder, path = clipsys.load(model_folder), tmp_path / "one.png"
    Image.new("RGBA", (20, 10), (255, 0, 0, 90)).save(path)
    with Image.open(path) as opened:
        assert feature_maps(encoder, opened).tobytes() == feature_maps(encoder, path).tobytes()
    with pytest.raises(ImageDecodeError, match="not an image"):
        (tmp_path / "bad.png").write_bytes(b"no picture")
        feature_maps(encoder, tmp_path / "bad.png")


def test_a_tower_of_another_kind_is_named(model_folder: Path) -> None:
    encoder = clipsys.load(model_folder)
    encoder.model.visual = torch.nn.Flatten()
    with pytest.raises(ModelError, match="its image tower is a Flatten"):
        feature_maps(encoder, noise_image(1))
