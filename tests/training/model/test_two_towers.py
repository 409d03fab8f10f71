"""Two pretrained towers as one model: weights, heads, locks, and a folder that open_clip loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import clipsys
from clipsys.errors import ConfigError, ModelError, TrainingError
from clipsys.models.open_clip_models import build_model, save_model
from clipsys.training.model.initial import ModelConfig, initial_model
from clipsys.training.model.tower_weights import load_trunk, read_weights
from tests.conftest import TINY_MODEL, noise_image
from tests.two_towers import TRUNK, tower_sections, write_encoder, write_trunk


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("towers")
    tower_sections(folder)
    return folder


def _model(folder: Path, *, text: dict[str, Any] | None = None, **image: Any) -> Any:
    sections = tower_sections(folder, **image)
    sections["text_tower"] |= text or {}
    return initial_model(ModelConfig.model_validate(sections))


def _trained(model: torch.nn.Module) -> set[str]:
    return {name for name, one in model.named_parameters() if one.requires_grad}


def test_weights_of_another_library_are_taken_in_their_order(tmp_path: Path) -> None:
    import timm

    trunk = timm.create_model(TRUNK, num_classes=0)
    load_trunk(trunk, read_weights(write_trunk(tmp_path / "a.pth", renamed=True)), "a.pth")
    named = timm.create_model(TRUNK, num_classes=0)
    load_trunk(named, read_weights(write_trunk(tmp_path / "b.pth")), "b.pth")
    for one, other in zip(trunk.state_dict().values(), named.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    import timm

    trunk = timm.create_model("test_vit", num_classes=0)
    with pytest.raises(TrainingError, match="do not fit VisionTransformer"):
        load_trunk(trunk, read_weights(write_trunk(tmp_path / "a.pth")), "a.pth")


def test_a_pickle_that_is_no_weights_is_refused_without_being_run(tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"code": Path("/")}, path)
    with pytest.raises(ModelError, match=r"evil\.pth: the weights cannot be read"):
        read_weights(path)


def test_towers_bring_their_weights_preprocessing_and_tokenizer(towers: Path) -> None:
    from transformers import AutoModel

    parts = _model(towers)
    assert parts.preprocessing.mean == (0.485, 0.456, 0.406)
    assert parts.preprocessing.size == (64, 64)
    assert parts.config["text_cfg"]["context_length"] == 20
    assert parts.config["text_cfg"]["hf_pooler_type"] == "mean_pooler"
    own = AutoModel.from_pretrained(str(towers / "encoder"))
    assert torch.equal(
        own.embeddings.word_embeddings.weight,
        parts.model.text.transformer.embeddings.word_embeddings.weight,
    )
    file = torch.load(towers / "trunk.pth", weights_only=True)
    assert torch.equal(file["conv_stem.weight"], parts.model.visual.trunk.conv_stem.weight)


def test_locked_towers_train_their_heads_alone(towers: Path) -> None:
    assert _trained(_model(towers).model) == {
        *("logit_scale", "visual.head.proj.weight", "text.proj.weight"),
    }
    mlp = _trained(_model(towers, head="mlp", text={"head": "mlp"}).model)
    assert mlp == {
        *("logit_scale", "visual.head.mlp.fc1.weight", "visual.head.mlp.fc1.bias"),
        *("visual.head.mlp.fc2.weight", "text.proj.0.weight", "text.proj.2.weight"),
    }


def test_unlocked_blocks_are_the_last_ones(towers: Path) -> None:
    trained = _trained(_model(towers, unlocked_blocks=1, text={"unlocked_blocks": None}).model)
    trunk = {name for name in trained if name.startswith("visual.trunk.")}
    assert "visual.trunk.conv_head.weight" in trunk
    assert "visual.trunk.conv_stem.weight" not in trunk
    assert "text.transformer.embeddings.word_embeddings.weight" in trained
    with pytest.raises(ConfigError, match=r"text_tower\.unlocked_blocks is 9, but the text tower"):
        _model(towers, text={"unlocked_blocks": 9})


def test_a_saved_model_is_loaded_by_stock_open_clip_with_equal_embeddings(
    towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "model"
    save_model(_model(towers, head="mlp", dropout=0.5), folder)
    ours = clipsys.load(folder, precision="fp32")
    stock, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    images, texts = [noise_image(seed) for seed in range(3)], ["a red cat", "dog", "a star on blue"]
    with torch.no_grad():
        pixels = torch.stack([transform(image) for image in images])
        expected_image = stock.eval().encode_image(pixels, normalize=True).numpy()
        expected_text = stock.encode_text(tokenizer(texts), normalize=True).numpy()
    assert np.abs(ours.encode_image(images) - expected_image).max() < 1e-5
    assert np.abs(ours.encode_text(texts) - expected_text).max() < 1e-5


def test_towers_of_open_clip_keep_their_heads(tmp_path: Path) -> None:
    torch.manual_seed(1)
    folder = tmp_path / "clip"
    parts = build_model(TINY_MODEL)
    save_model(parts, folder)
    encoder = write_encoder(tmp_path / "encoder")
    settings = {
        "image_tower": {"name": str(folder), "locked_head": True},
        "text_tower": {"name": f"hf:{encoder}"},
    }
    lit = initial_model(ModelConfig.model_validate(settings))
    assert lit.config["embed_dim"] == TINY_MODEL["embed_dim"]
    assert _trained(lit.model) == {"logit_scale", "text.proj.weight"}
    assert torch.equal(lit.model.visual.proj, parts.model.visual.proj)  # type: ignore[arg-type]
    tuned = {**settings, "image_tower": {"name": str(folder)}}
    assert "visual.proj" in _trained(initial_model(ModelConfig.model_validate(tuned)).model)
    new = {
        **settings,
        "image_tower": {"name": str(folder), "head": "linear"},
        "embed_dim": 12,
    }
    widened = initial_model(ModelConfig.model_validate(new))
    assert widened.model.visual.proj.shape[1] == 12  # type: ignore[union-attr]
    assert torch.equal(
        widened.model.visual.conv1.weight,  # type: ignore[union-attr]
        parts.model.visual.conv1.weight,  # type: ignore[union-attr,arg-type]
    )


def test_the_text_tower_of_clip_goes_into_a_model_of_two_towers(
    towers: Path, tmp_path: Path
) -> None:
    torch.manual_seed(2)
    folder = tmp_path / "clip"
    parts = build_model(TINY_MODEL)
    save_model(parts, folder)
    sections = tower_sections(towers)
    sections |= {"text_tower": {"name": str(folder)}, "embed_dim": None}
    both = initial_model(ModelConfig.model_validate(sections))
    tokens = parts.tokenizer(["a red cat"])
    with torch.no_grad():
        expected = parts.model.eval().encode_text(tokens)  # type: ignore[operator]
        actual = both.model.eval().encode_text(tokens)  # type: ignore[operator]
    assert torch.allclose(expected, actual, atol=1e-6)


@pytest.mark.parametrize(
    ("image", "text", "message"),
    [
        (
            {"name": "timm:resnet5O"},
            {},
            r"timm has no model 'resnet5O'; did you mean timm:resnet50",
        ),
        ({"weights": "/nowhere.pth"}, {}, "/nowhere.pth: there is no such file of weights"),
        ({}, {"name": "hf:/nowhere"}, "/nowhere: there is no such folder"),
    ],
)
def test_what_cannot_be_found_is_named(
    towers: Path, image: dict[str, Any], text: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigError, ModelError), match=message):
        _model(towers, text=text, **image)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_tower": None}, "image_tower needs text_tower beside it"),
        ({"architecture": "ViT-B-32"}, "architecture and image_tower exclude each other"),
        ({"unlocked_image_blocks": 1}, r"set image_tower\.unlocked_blocks"),
        ({"patch_dropout": 0.5}, "patch_dropout does nothing for image_tower"),
        ({"image_tower": {"name": "hf:x"}}, "a text encoder"),
        ({"text_tower": {"name": "timm:x"}}, "an image model"),
        ({"image_tower": {"name": "timm:x", "weights": "random"}}, "unlocked_blocks to null"),
        (
            {"image_tower": {"name": "timm:x", "locked_head": True}},
            "timm:x has no head of its own",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    towers: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate({**tower_sections(towers), **change})


def test_the_width_of_an_own_head_must_be_the_common_one(tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    save_model(build_model(TINY_MODEL), folder)
    settings = {
        "image_tower": {"name": str(folder)},
        "text_tower": {"name": f"hf:{write_encoder(tmp_path / 'encoder')}"},
        "embed_dim": 48,
    }
    with pytest.raises(ConfigError, match=r"its own head gives \d+ values, and the common space"):
        initial_model(ModelConfig.model_validate(settings))


def test_an_encoder_of_the_hub_is_taken_from_its_cache_with_its_own_pooling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--org--encoder"
    encoder = write_encoder(repository / "snapshots" / "abc")
    modes = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (encoder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    sections = tower_sections(tmp_path / "towers")
    sections["text_tower"] = {"name": "hf:org/encoder"}
    parts = initial_model(ModelConfig.model_validate(sections))
    assert parts.config["text_cfg"]["hf_pooler_type"] == "cls_last_hidden_state_pooler"
    assert parts.config["text_cfg"]["context_length"] == 20


def test_batch_norm_of_a_tower_with_random_weights_takes_statistics(towers: Path) -> None:
    sections = tower_sections(towers, weights="random", unlocked_blocks=None)
    assert not ModelConfig.model_validate(sections).rests_batch_norm
    assert ModelConfig.model_validate(tower_sections(towers)).rests_batch_norm
