from __future__ import annotations

from pathlib import Path

import pytest

import clipsys
from clipsys.errors import ConfigError
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
