from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import clipsys
from clipsys.errors import ClipsysError, ConfigError, TrainingError
from clipsys.models.open_clip_models import ModelParts, build_model, load_model, save_model
from clipsys.training.model.initial import ModelConfig, initial_model, resumed_settings
from tests.conftest import TINY_MODEL, noise_image
from tests.tiny_models import (
    HF_TEXT_TOWERS,
    SIGLIP_PREPROCESS,
    coca_config,
    hf_text_config,
    siglip_config,
    write_stock_folder,
    write_text_model,
    write_tokenizer,
)
from tests.training.runs import Attempt, train_in_group, write_recipe

IMAGES = [noise_image(seed) for seed in range(4)]
TEXTS = ["a red square", "the picture of a cat", "image number 7"]


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights with another activation, preprocessing, tokenizer and context length than CLIP's."""
    folder = tmp_path_factory.mktemp("weights") / "siglip"
    config = {**siglip_config(write_tokenizer(folder)), "quick_gelu": True}
    return write_stock_folder(folder, config, SIGLIP_PREPROCESS)


def _vectors(parts: ModelParts) -> tuple[np.ndarray, np.ndarray]:
    encoder = clipsys.Encoder(parts, precision="fp32")
    return encoder.encode_image(IMAGES), encoder.encode_text(TEXTS)


def _assert_equal_vectors(one: ModelParts, other: ModelParts) -> None:
    for actual, expected in zip(_vectors(one), _vectors(other), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_a_run_without_learning_exports_the_source(
    siglip: Path, shards: str, tmp_path: Path
) -> None:
    recipe = write_recipe(
        tmp_path / "run",
        shards,
        model={"architecture": None, "pretrained": str(siglip)},
        optimizer={"lr": 1e-12},
        schedule={"epochs": 1},
        objective={"loss": "sigmoid"},
    )
    (outcome,) = train_in_group([Attempt(recipe)], 1)[0]
    assert outcome.error == ""
    exported, source = load_model(tmp_path / "run" / "run"), load_model(siglip)
    assert exported.preprocessing == source.preprocessing
    assert exported.preprocessing.mean == (0.5,) * 3
    assert exported.config["quick_gelu"] is True
    _assert_equal_vectors(exported, source)
    assert "quick_gelu true, images of 32 x 32 px (squash, bicubic, mean 0.5" in outcome.log


def test_what_the_recipe_sets_is_used_and_said(
    siglip: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        parts = initial_model(
            ModelConfig(
                architecture={**siglip_config(siglip), "quick_gelu": False},
                pretrained=str(siglip),
                preprocess={"resize_mode": "shortest"},
            )
        )
    assert parts.config["quick_gelu"] is False
    assert parts.preprocessing.resize_mode == "shortest"
    assert parts.preprocessing.mean == (0.5,) * 3
    assert "model.preprocess.resize_mode is shortest, and the weights of siglip" in caplog.text
    assert "quick_gelu is False, and the weights of siglip were trained with True" in caplog.text
    assert "have a bias, as the sigmoid loss trains it" in caplog.text


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"architecture": TINY_MODEL},
            TrainingError,
            "model.architecture has vision_cfg.no_ln_pre False, and the weights .* have True",
        ),
        ({"architecture": "ViT-B-32"}, TrainingError, "embed_dim 512, and the weights .* have 32"),
        ({"preprocess": {"means": [0.5] * 3}}, ConfigError, "means is not a setting; did you mean"),
        ({"preprocess": {"mean": [0.5]}}, ConfigError, r"mean is \[0.5\]; expected three numbers"),
        ({"preprocess": {"size": 64}}, ConfigError, "size is 64, .*32 x 32; .*model.image_size"),
    ],
)
def test_a_contradiction_is_refused(
    settings: dict[str, Any], error: type[ClipsysError], message: str, siglip: Path
) -> None:
    with pytest.raises(error, match=message) as caught:
        initial_model(ModelConfig(pretrained=str(siglip), **settings))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_another_image_size_and_context_length_interpolate_positions_as_open_clip_does(
    kind: str, siglip: Path, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from open_clip.model import resize_pos_embed, resize_text_pos_embed

    source = load_model(siglip if kind == "siglip" else model_folder)
    settings = ModelConfig(
        pretrained=source.spec, image_size=64, context_length=24, initial_logit_scale=5.0
    )
    with caplog.at_level(logging.INFO):
        parts = initial_model(settings)
    expected = source.model.state_dict()
    resize_pos_embed(expected, parts.model)
    resize_text_pos_embed(expected, parts.model)
    for name, tensor in parts.model.state_dict().items():
        if name != "logit_scale":
            torch.testing.assert_close(tensor.reshape(expected[name].shape), expected[name])
    assert parts.preprocessing.size == (64, 64)
    assert parts.tokenizer(["a"]).shape == (1, 24)
    assert source.tokenizer(["a"]).shape == (1, 16)
    assert "of 2 x 2 patches are interpolated to 4 x 4" in caplog.text
    assert "of 16 tokens are interpolated to 24" in caplog.text


def test_the_other_size_is_exported_and_loaded_by_stock_open_clip(
    siglip: Path, tmp_path: Path
) -> None:
    import open_clip

    parts = initial_model(ModelConfig(pretrained=str(siglip), image_size=[64, 48]))
    save_model(parts, tmp_path / "larger")
    stock, transform = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'larger'}")
    with torch.no_grad():
        expected = stock.eval().encode_image(torch.stack([transform(i) for i in IMAGES]), True)
    actual = clipsys.load(tmp_path / "larger", precision="fp32").encode_image(IMAGES)
    np.testing.assert_allclose(actual, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    "vision",
    [
        {"layers": [1, 1, 1, 1], "width": 8, "head_width": 32, "image_size": 64},
        {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "", "timm_proj": "linear"},
    ],
)
def test_towers_of_other_libraries_are_fine_tuned_too(
    vision: dict[str, Any], tmp_path: Path
) -> None:
    source = build_model({**TINY_MODEL, "vision_cfg": vision})
    save_model(source, tmp_path / "source")
    parts = initial_model(ModelConfig(pretrained=str(tmp_path / "source")))
    _assert_equal_vectors(parts, source)
    if "layers" in vision:
        larger = initial_model(ModelConfig(pretrained=str(tmp_path / "source"), image_size=96))
        assert larger.model.visual.attnpool.positional_embedding.shape[0] == 1 + 3 * 3
        larger.model.encode_image(torch.zeros(1, 3, 96, 96))


def test_coca_begins_as_its_pair_of_towers(tmp_path: Path) -> None:
    folder = write_stock_folder(tmp_path / "coca", coca_config(), {})
    parts = initial_model(ModelConfig(pretrained=str(folder)))
    assert not hasattr(parts.model, "text_decoder")
    _assert_equal_vectors(parts, load_model(folder))
    longer = initial_model(ModelConfig(pretrained=str(folder), context_length=20))
    last = longer.model.text.positional_embedding[-1]
    assert torch.equal(last, parts.model.text.positional_embedding[-1])  # of the class token


def test_the_sigmoid_loss_begins_with_its_own_scale_where_the_architecture_has_a_bias(
    siglip: Path,
) -> None:
    parts = initial_model(ModelConfig(architecture=siglip_config(siglip)), with_bias=True)
    assert parts.model.logit_scale.exp().item() == pytest.approx(10)
    assert parts.model.logit_bias.item() == -10


def test_patch_dropout_of_a_resnet_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ClipsysError, match=r"model\.patch_dropout is for vision"):
        initial_model(ModelConfig(architecture="RN50", patch_dropout=0.5))


def test_a_moved_source_still_has_its_tokenizer(siglip: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(siglip, tmp_path / "moved")
    parts = initial_model(ModelConfig(pretrained=str(moved)))
    save_model(parts, tmp_path / "out")
    _assert_equal_vectors(load_model(tmp_path / "out"), load_model(siglip))


@pytest.mark.parametrize("kind", [kind for kind in HF_TEXT_TOWERS if kind != "xlm-roberta"])
def test_a_hugging_face_text_tower_is_locked_but_for_its_last_block(
    kind: str, tmp_path: Path
) -> None:
    config = hf_text_config(write_text_model(tmp_path / kind, kind))
    model = initial_model(ModelConfig(architecture=config, unlocked_text_blocks=1)).model
    trained = {name for name, one in model.text.named_parameters() if one.requires_grad}
    assert any(name.startswith("proj.") for name in trained)
    assert any(".0." in name and name.startswith("transformer.") for name in trained)
    assert not any("embed" in name for name in trained)


def test_a_resumed_run_goes_on_with_what_its_checkpoint_says(siglip: Path, tmp_path: Path) -> None:
    settings = ModelConfig(
        pretrained=str(siglip), image_size=64, patch_dropout=0.5, preprocess={"mean": [0.4] * 3}
    )
    began = initial_model(settings, with_bias=True)
    save_model(began, tmp_path / "checkpoint")
    resumed = initial_model(resumed_settings(settings, tmp_path / "checkpoint"), with_bias=True)
    assert resumed.preprocessing == began.preprocessing
    own = {"hf_tokenizer_name": str(tmp_path / "checkpoint")}
    assert resumed.config == {
        **began.config,
        "text_cfg": {**began.config["text_cfg"], **own},
    }
    _assert_equal_vectors(resumed, began)
    tuned = initial_model(ModelConfig(pretrained=str(tmp_path / "checkpoint")))
    assert "patch_dropout" not in tuned.config["vision_cfg"]
