"""Adapters on towers of every kind: which layers get them, what they compute, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clipsys.errors import ConfigError
from clipsys.inference.text_tower import _may_be_cut
from clipsys.models.adapters import Base
from clipsys.models.open_clip_models import ModelParts, build_model
from clipsys.training.model.adapter_check import Probe
from clipsys.training.model.adapter_layers import AttentionAdapter, Quantised
from clipsys.training.model.adapters import Adapters, LoraConfig
from clipsys.training.model.adding_adapters import add_adapters
from tests.conftest import TINY_MODEL
from tests.tiny_models import (
    HF_TEXT_TOWERS,
    coca_config,
    hf_text_config,
    siglip_config,
    write_text_model,
    write_tokenizer,
)

_TIMM: dict[str, dict[str, Any]] = {
    "vit": {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": ""},
    "efficientnet": {"timm_model_name": "test_efficientnet", "image_size": 64, "timm_pool": "avg"},
    "convnext": {"timm_model_name": "test_convnext", "image_size": 64, "timm_pool": "avg"},
    "nfnet": {"timm_model_name": "test_nfnet", "image_size": 64, "timm_pool": "avg"},
    # Convolutions that pad to the size of the image as TensorFlow's do.
    "lite0": {"timm_model_name": "tf_efficientnet_lite0", "image_size": 64, "timm_pool": "avg"},
}


def _config(kind: str, folder: Path) -> dict[str, Any]:
    if kind in _TIMM:
        return {**TINY_MODEL, "vision_cfg": {**_TIMM[kind], "timm_proj": "linear"}}
    if kind in HF_TEXT_TOWERS:
        return hf_text_config(write_text_model(folder / kind, kind))
    if kind == "resnet":
        sizes = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 32, "image_size": 64}
        return {**TINY_MODEL, "vision_cfg": sizes}
    if kind == "siglip":
        return siglip_config(write_tokenizer(folder / "tokenizer"))
    return coca_config() if kind == "coca" else TINY_MODEL


def _built(kind: str, folder: Path) -> ModelParts:
    torch.manual_seed(0)
    parts = build_model(_config(kind, folder), for_training=True)
    for name, parameter in parts.model.named_parameters():
        if name.endswith("bn3.weight"):  # zero in a ResNet that nothing has trained
            nn.init.ones_(parameter)
    return parts


def _features(parts: ModelParts) -> torch.Tensor:
    parts.model.eval()
    with torch.no_grad():
        return torch.cat(Probe(parts, ("image", "text")).features())


def _changed(parts: ModelParts, adapters: Adapters, size: float = 0.02) -> None:
    """Gives the adapters values as training does."""
    generator = torch.Generator().manual_seed(3)
    parameters = dict(parts.model.named_parameters())
    for name in adapters.names.values():
        up = parameters[f"{name}.lora_B.default.weight"].detach()
        up.copy_(torch.randn(up.shape, generator=generator) * size)


def _merged(parts: ModelParts, adapters: Adapters, kind: str, folder: Path) -> ModelParts:
    plain = _built(kind, folder)
    plain.model.load_state_dict(
        adapters.merged_weights(parts.model, parts.model.state_dict()), strict=True
    )
    return plain


_LAYERS = {
    "clip": {"attn", "c_fc", "c_proj"},
    "siglip": {"attn", "c_fc", "c_proj"},
    "coca": {"attn", "c_fc", "c_proj"},
    "resnet": {"conv1", "conv2", "conv3", "0", "attn", "c_fc", "c_proj"},
    "vit": {"qkv", "proj", "fc1", "fc2", "attn", "c_fc", "c_proj"},
    "efficientnet": {
        *("conv", "conv_exp", "conv_pw", "conv_pwl", "conv_head", "conv_reduce", "conv_expand"),
        *("attn", "c_fc", "c_proj"),
    },
    "lite0": {"conv_pw", "conv_pwl", "conv_head", "attn", "c_fc", "c_proj"},
    "convnext": {"fc1", "fc2", "1", "attn", "c_fc", "c_proj"},
    **{
        kind: {"query", "key", "value", "dense", "attn", "c_fc", "c_proj"}
        for kind in ("bert", "roberta", "xlm-roberta")
    },
    "mt5": {"q", "k", "v", "o", "wi_0", "wi_1", "wo", "attn", "c_fc", "c_proj"},
    "m2m_100": {
        *("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        *("attn", "c_fc", "c_proj"),
    },
}
_THIN = ("clip", "vit", "efficientnet", "bert")


@pytest.mark.parametrize(
    "kind",
    [kind if kind in _THIN else pytest.param(kind, marks=pytest.mark.slow) for kind in _LAYERS],
)
def test_adapters_of_every_kind_of_tower_begin_as_nothing_and_merge_exactly(
    kind: str, tmp_path: Path
) -> None:
    parts = _built(kind, tmp_path)
    before = _features(parts)
    heads = frozenset(
        name
        for name, _ in parts.model.named_parameters()
        if name.startswith(("visual.head.", "text.proj."))
    )
    adapters = add_adapters(parts, LoraConfig(rank=4, alpha=8), base=Base(), heads=heads)
    assert {name.rpartition(".")[2] for name in adapters.names} - {"out_proj"} == _LAYERS[kind] - {
        "out_proj"
    }
    torch.testing.assert_close(_features(parts), before, atol=3e-7, rtol=0)
    _changed(parts, adapters)
    adapted = _features(parts)
    assert (adapted - before).abs().max() > 0.01
    torch.testing.assert_close(
        _features(_merged(parts, adapters, kind, tmp_path)), adapted, atol=1e-6, rtol=0
    )
    trained = {name for name, one in parts.model.named_parameters() if one.requires_grad}
    beside = {name for name in trained if ".lora_" not in name}
    assert all(name.startswith(("visual.head.", "text.proj.", "logit_")) for name in beside)
    assert ("visual.head.proj.weight" in beside) is (kind in _TIMM)
    assert any(name.startswith("text.proj.") for name in beside) is (kind in HF_TEXT_TOWERS)


def test_convolutions_whose_weights_are_standardised_get_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no layer of the image tower can have an adapter"):
        add_adapters(_built("nfnet", tmp_path), LoraConfig(), base=Base())


def test_only_the_towers_of_the_recipe_are_adapted(tmp_path: Path) -> None:
    parts = _built("clip", tmp_path)
    adapters = add_adapters(parts, LoraConfig(towers=("text",)), base=Base())
    # peft matches endings, and the image tower's names end as the text tower's do.
    assert all(name.startswith("transformer.") for name in adapters.names)
    visual = dict(parts.model.visual.named_parameters())  # type: ignore[union-attr]
    assert all(one.requires_grad for one in visual.values())
    assert not parts.model.token_embedding.weight.requires_grad  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("kind", "targets", "message"),
    [
        (
            "clip",
            ("out_proj",),
            "visual.transformer.resblocks.0.attn.out_proj, .* would get adapters that receive no "
            "gradient",
        ),
        ("resnet", ("q_proj", "attn"), "visual.attnpool.q_proj would get .* no gradient"),
        ("efficientnet", ("conv_dw", "attn"), "conv_dw cannot .* a convolution of 128 groups"),
        ("clip", ("ln_1",), "ln_1 cannot have an adapter: a LayerNorm is no linear layer"),
        ("clip", ("query",), "the image tower has no layer .*; its layers: attn, c_fc, c_proj$"),
        (
            "bert",
            ("attn",),
            "the text tower has no layer .*; its layers: query, key, value, dense$",
        ),
        ("clip", ("attn", "c_fcc"), "targets names 'c_fcc', and no layer of the adapted towers"),
    ],
)
def test_layers_that_cannot_be_adapted_are_refused_by_name(
    kind: str, targets: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    parts = _built(kind, tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        add_adapters(parts, LoraConfig(targets=targets), base=Base())
    assert "\n" not in str(caught.value)


def test_names_of_layers_do_not_reach_into_a_head_that_is_trained_whole(tmp_path: Path) -> None:
    parts = _built("vit", tmp_path)
    settings = LoraConfig(towers=("image",), targets=("qkv", "proj"))
    adapters = add_adapters(parts, settings, base=Base())
    assert len(adapters.names) == 13  # and the convolution of the patches
    assert not any(name.startswith("visual.head") for name in adapters.names)


class _Doubled(nn.Linear):
    """A layer that uses its weight otherwise than as it is."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_adapters_that_would_merge_to_something_else_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = _built("clip", tmp_path)
    mlp: Any = parts.model.visual.transformer.resblocks[0].mlp  # type: ignore[union-attr]
    mlp.c_fc.__class__ = _Doubled
    from clipsys.training.model import adapter_targets

    usual = adapter_targets.why_unfit
    monkeypatch.setattr(
        adapter_targets, "why_unfit", lambda m: None if isinstance(m, _Doubled) else usual(m)
    )
    with pytest.raises(ConfigError, match="cannot be merged into its weights: embeddings would"):
        add_adapters(parts, LoraConfig(), base=Base())


# ---- the attention -------------------------------------------------------------------------------


def _attention(dropout: float = 0.0) -> AttentionAdapter:
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["attn"])
    plain = nn.MultiheadAttention(16, 2, batch_first=True)
    layer = AttentionAdapter(plain, "default", config, r=4, lora_alpha=8)
    for name, parameter in layer.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return layer


def _factors(layer: nn.Module) -> dict[str, nn.Parameter]:
    return {name: one for name, one in layer.named_parameters() if "lora_" in name}


def _merged_attention(
    layer: AttentionAdapter, *inputs: torch.Tensor, out_proj_times: int = 1, **options: Any
) -> torch.Tensor:
    """Plain attention in float64 with W + 2 B A in the place of its weights."""
    weights = {
        name.replace("base_layer.", ""): value.double()
        for name, value in layer.state_dict().items()
        if "lora_" not in name
    }
    factors = {name: one.double() for name, one in _factors(layer).items()}
    for place, prefix, times in (
        ("in_proj_weight", "", 1),
        ("out_proj.weight", "base_layer.out_proj.", out_proj_times),
    ):
        up, down = (factors[f"{prefix}lora_{which}.default.weight"] for which in "BA")
        weights[place] = weights[place] + times * 2 * up @ down
    plain = nn.MultiheadAttention(16, 2, batch_first=True).double()
    double = tuple(one.double() for one in inputs)
    output: torch.Tensor = torch.func.functional_call(
        plain, weights, double, {"need_weights": False, **options}
    )[0]
    return output


@pytest.mark.parametrize("mask", ["none", "causal", "of each head", "boolean"])
@pytest.mark.parametrize("of", ["itself", "others"])
def test_attention_with_an_adapter_equals_plain_attention_with_merged_weights(
    mask: str, of: str
) -> None:
    layer = _attention()
    generator = torch.Generator().manual_seed(1)
    query, key, value = torch.randn(3, 3, 5, 16, generator=generator)
    inputs = (query, query, query) if of == "itself" else (query, key, value)
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    causal = torch.zeros(5, 5).masked_fill(hidden, float("-inf"))
    each = torch.stack([causal, torch.zeros(5, 5)] * 3)
    chosen = {"none": None, "causal": causal, "boolean": hidden, "of each head": each}[mask]
    output, weights = layer(*inputs, need_weights=False, attn_mask=chosen)
    assert weights is None
    output.square().sum().backward()
    actual = {name: one.grad for name, one in _factors(layer).items()}
    layer.zero_grad()
    double = chosen.double() if chosen is not None and chosen.is_floating_point() else chosen
    expected = _merged_attention(layer, *inputs, attn_mask=double)
    expected.square().sum().backward()
    torch.testing.assert_close(output, expected.float(), atol=1e-5, rtol=1e-5)
    assert len(actual) == 4
    for name, one in _factors(layer).items():
        torch.testing.assert_close(actual[name], one.grad, atol=1e-4, rtol=1e-4)


def test_peft_adds_the_adapter_of_the_output_projection_twice() -> None:
    """Why folders that peft wrote are read so; fails when peft has mended it (its #3774)."""
    import peft
    from peft.tuners.lora.layer import MultiheadAttention

    layer = _attention()
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["attn"])
    plain = nn.MultiheadAttention(16, 2, batch_first=True)
    theirs = MultiheadAttention(plain, "default", config, r=4, lora_alpha=8)
    theirs.load_state_dict(layer.state_dict())
    input_BLD = torch.randn(3, 5, 16)
    actual = theirs(input_BLD, input_BLD, input_BLD, need_weights=False)[0]
    expected = _merged_attention(layer, input_BLD, input_BLD, input_BLD, out_proj_times=2)
    torch.testing.assert_close(actual, expected.float(), atol=1e-5, rtol=1e-5)


def test_attention_keeps_its_frozen_weights_and_drops_out() -> None:
    layer = _attention(dropout=0.5)
    weight = layer.base_layer.in_proj_weight
    kept = weight.detach().clone()
    input_BLD = torch.randn(2, 5, 16)
    for _ in range(3):
        layer(input_BLD, input_BLD, input_BLD)
    assert layer.base_layer.in_proj_weight is weight
    assert torch.equal(weight, kept)
    first, second = (layer(input_BLD, input_BLD, input_BLD)[0] for _ in range(2))
    assert not torch.equal(first, second)
    layer.eval()
    first, second = (layer(input_BLD, input_BLD, input_BLD)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_causal_text_tower_with_adapters_is_still_cut_to_its_longest_caption(
    tmp_path: Path,
) -> None:
    for kind, cut in (("clip", True), ("siglip", False)):
        parts = _built(kind, tmp_path)
        adapters = add_adapters(parts, LoraConfig(rank=4), base=Base())
        _changed(parts, adapters)
        assert _may_be_cut(parts.model) is cut, kind


# ---- weights in NF4 ------------------------------------------------------------------------------


def test_a_quantised_layer_is_the_product_with_its_unpacked_weight() -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = nn.Linear(40, 24)  # no multiple of a block
    layer = Quantised(plain.weight, plain.bias)
    error = (layer.weight - plain.weight).norm() / plain.weight.norm()
    assert 0.05 < error < 0.12  # a uniform weight; the normal ones of a model are off by 9 %
    input_XI = torch.randn(3, 7, 40, requires_grad=True)
    output = layer(input_XI)
    output.square().sum().backward()
    copied = input_XI.detach().clone().requires_grad_()
    expected = copied @ layer.weight.T + plain.bias
    expected.square().sum().backward()
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(input_XI.grad, copied.grad)


@pytest.mark.parametrize(
    "kind", ["clip", "bert", *(pytest.param(k, marks=pytest.mark.slow) for k in ("vit", "mt5"))]
)
def test_adapters_over_quantised_weights_merge_into_the_unpacked_ones(
    kind: str, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    parts = _built(kind, tmp_path)
    before = _features(parts)
    settings = LoraConfig(rank=4, alpha=8, quantised=True)
    adapters = add_adapters(parts, settings, base=Base())
    assert any(isinstance(module, Quantised) for module in parts.model.modules())
    assert 1e-3 < (_features(parts) - before).abs().max() < 0.3
    _changed(parts, adapters)
    plain = _merged(parts, adapters, kind, tmp_path)
    torch.testing.assert_close(_features(plain), _features(parts), atol=1e-6, rtol=0)
    parts.model.train()
    Probe(parts, ("image", "text")).backward()
    for name, parameter in parts.model.named_parameters():
        if ".lora_" in name:
            assert parameter.grad is not None and parameter.grad.any(), name


def test_quantising_without_bitsandbytes_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clipsys.models import quantisation

    monkeypatch.setattr(quantisation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"install clipsys\[qlora\], or leave the setting out"):
        add_adapters(_built("clip", tmp_path), LoraConfig(quantised=True), base=Base())
