from __future__ import annotations

from typing import Any

import pytest
import torch

from clipsys.errors import ModelError
from clipsys.models import hub
from clipsys.models.architectures import (
    architecture_config,
    check_patch_dropout,
    contrastive_pair,
    image_size_of,
    with_image_size,
)
from clipsys.models.catalogue import pretrained_models, pretrained_names
from clipsys.models.open_clip_models import build_model
from tests.conftest import TINY_MODEL
from tests.tiny_models import coca_config


def _changed(section: str, **keys: Any) -> dict[str, Any]:
    if not section:
        return {**TINY_MODEL, **keys}
    return {**TINY_MODEL, section: {**TINY_MODEL[section], **keys}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (_changed("", force_quick_gelu=True), "force_quick_gelu is not a key.*quick_gelu"),
        (_changed("", quick_gelu="yes"), "quick_gelu is 'yes', which should be a valid boolean"),
        (_changed("vision_cfg", widht=3), "vision_cfg.widht is not a key .*did you mean width"),
        (_changed("vision_cfg", context_length=9), "context_length is not .*belongs to text_cfg"),
        (_changed("vision_cfg", width=50, head_width=16), r"width is 50, .*head_width 16"),
        (_changed("vision_cfg", layers=0), "vision_cfg.layers is 0; expected 1 or more"),
        (_changed("vision_cfg", layers="x"), "vision_cfg.layers is 'x', which should be"),
        (_changed("vision_cfg", pool_type="mean"), "pool_type is 'mean'; expected one of tok, avg"),
        (_changed("vision_cfg", patch_size=64), "patch_size is 64, more than .*image_size 32"),
        (_changed("vision_cfg", timm_model_name="vit_x"), "'vit_x', which timm does not know"),
        (_changed("text_cfg", heads=3), "text_cfg.width is 32, which text_cfg.heads 3 does not"),
        (_changed("text_cfg", width=32.5), "text_cfg.width is 32.5, which should be"),
        (_changed("text_cfg", vocab_size=0), "text_cfg.vocab_size is 0; expected 1 or more"),
        (_changed("text_cfg", vocab_size=100), "vocab_size is 100, fewer than the 49408 tokens"),
        ({"vision_cfg": {}, "text_cfg": {}}, "embed_dim is missing"),
        ({"embed_dim": 32}, "vision_cfg is missing; text_cfg is missing"),
        (_changed("", vision_cfg=[]), r"vision_cfg is \[\], which should be an object"),
    ],
)
def test_a_fault_of_a_model_cfg_is_named_by_its_key(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        build_model(config)
    assert "\n" not in str(caught.value)


def test_every_architecture_that_open_clip_lists_passes_the_check() -> None:
    import open_clip

    for name in open_clip.list_models():
        config = architecture_config(name)
        architecture_config(config)  # raises where the model_cfg counts as faulty
        trunk = config["vision_cfg"].get("timm_model_name") or ""
        if trunk.rpartition("_")[2].isdigit():
            assert trunk.endswith(f"_{image_size_of(config)[0]}"), name


#: Kinds of Hugging Face text towers, by the names that open_clip's architectures have for them.
_TEXT_MODELS = {
    "roberta-base": "roberta",
    "xlm-roberta-base": "xlm-roberta",
    "xlm-roberta-large": "xlm-roberta",
    "google/mt5-base": "mt5",
    "google/mt5-xl": "mt5",
    "facebook/nllb-200-distilled-600M": "m2m_100",
    "facebook/nllb-200-distilled-1.3B": "m2m_100",
}


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Builds an architecture without memory for its weights, and without a hub."""
    from transformers import AutoConfig

    monkeypatch.setattr(hub, "_ask", lambda _: "")
    monkeypatch.setattr("open_clip.factory._set_model_device_and_precision", lambda *_: None)
    monkeypatch.setattr(
        AutoConfig, "from_pretrained", lambda name, **_: AutoConfig.for_model(_TEXT_MODELS[name])
    )

    def build(name: str) -> Any:
        with torch.device("meta"):
            return build_model(name, tokenizer=lambda texts: torch.zeros(len(texts), 77)).model

    return build


@pytest.mark.parametrize(
    "name",
    [
        *("ViT-B-16-SigLIP2", "ViT-H-14-worldwide-quickgelu", "xlm-roberta-base-ViT-B-32"),
        *("nllb-clip-base", "MobileCLIP2-S0", "PE-Core-T-16-384", "coca_ViT-B-32", "RN50"),
    ],
)
def test_one_of_each_kind_is_built_and_runs(name: str, on_meta: Any) -> None:
    model = on_meta(name).eval()
    image = torch.zeros(2, 3, *image_size_of(architecture_config(name)), device="meta")
    dim = architecture_config(name)["embed_dim"]
    assert model.encode_image(image).shape == (2, dim)
    assert any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.slow
def test_every_architecture_that_open_clip_lists_is_built(on_meta: Any) -> None:
    import open_clip

    for name in open_clip.list_models():
        assert on_meta(name).visual is not None, name


def test_an_image_size_that_the_trunk_has_not_is_mapped_or_refused() -> None:
    siglip = architecture_config("ViT-B-16-SigLIP")
    larger = with_image_size(siglip, 384)
    assert larger["vision_cfg"]["timm_model_name"] == "vit_base_patch16_siglip_384"
    with pytest.raises(ModelError, match=r"320 x 320, .*; timm has this trunk for 224, 256, 384"):
        with_image_size(siglip, 320)
    with pytest.raises(ModelError, match="240 x 224"):
        with_image_size(siglip, (240, 224))
    assert image_size_of(with_image_size(architecture_config("convnext_base"), 320)) == (320, 320)
    trunk = _changed("vision_cfg", timm_model_name="vit_base_patch16_siglip_256", image_size=None)
    assert image_size_of(architecture_config(trunk)) == (256, 256)


@pytest.mark.parametrize(
    ("name", "message"),
    [("RN50", "the image tower is a ResNet"), ("convnext_base", "convnext_base of timm has none")],
)
def test_patch_dropout_is_refused_where_a_tower_has_none(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=f"model.patch_dropout is for .*{message}"):
        check_patch_dropout(architecture_config(name), "model.patch_dropout")
    check_patch_dropout(architecture_config("ViT-B-16-SigLIP"), "model.patch_dropout")


def test_coca_is_its_pair_of_towers() -> None:
    pair = contrastive_pair(coca_config())
    assert "multimodal_cfg" not in pair
    model = build_model(coca_config(), for_training=True).model
    assert not any(name.startswith("text_decoder") for name, _ in model.named_parameters())
    assert model.encode_image(torch.zeros(1, 3, 32, 32)).shape == (1, 32)
    assert contrastive_pair(TINY_MODEL) == TINY_MODEL


def test_pretrained_models_are_counted(on_meta: Any) -> None:
    names = pretrained_names("vit-b-32/LAION2B_s34b")
    (model,) = pretrained_models(names)
    assert model.name == "ViT-B-32/laion2b_s34b_b79k"
    built = on_meta("ViT-B-32")
    assert model.parameters == sum(parameter.numel() for parameter in built.parameters())
    assert model.size_mb == pytest.approx(model.parameters * 4 / 1e6)
    assert (model.dim, model.image_size, model.tokenizer) == (512, 224, "")
    (multilingual,) = pretrained_models(pretrained_names("xlm-roberta-base-vit-b-32"))
    assert multilingual.tokenizer == "xlm-roberta-base" and multilingual.multilingual
