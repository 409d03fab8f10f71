"""Small models of the families that people use, as open_clip lists them: few and narrow layers.

Each is the ``model_cfg`` of open_clip's list with other sizes, its tokenizer made on the spot, and
the same classes. Trunks of timm that come in one size only stand in `TRUNKS`, registered with timm
when this module is imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models import eva, fastvit, register_model, vision_transformer
from torch import nn

from clipsys.models.architectures import architecture_config
from tests.tiny_models import HF_TEXT_TOWERS
from tests.tiny_tokenizers import TOKENIZERS

#: Families by an architecture of each, and the kind of its tokenizer; empty for CLIP's own.
FAMILIES = {
    "ViT-B-16-SigLIP2": "gemma",
    "ViT-B-16-SigLIP": "t5",
    "ViT-B-16-SigLIP-i18n-256": "t5",
    "ViT-H-14-worldwide-quickgelu": "xlm-r",
    "ViT-L-14-worldwide-quickgelu": "t5",
    "ViT-L-14-CLIPA": "bert",
    "xlm-roberta-base-ViT-B-32": "xlm-r",
    "roberta-ViT-B-32": "roberta",
    "mt5-base-ViT-B-32": "t5",
    "nllb-clip-base": "nllb",
    "nllb-clip-base-siglip": "nllb",
    "MobileCLIP2-S0": "",
    "PE-Core-T-16-384": "",
    "ViT-B-16-quickgelu": "",
    "ViT-H-14-378-quickgelu": "",
    "coca_ViT-B-32": "",
    "coca_roberta-ViT-B-32": "roberta",
}
#: The kinds of text models behind the names that those architectures have for them.
_TEXT_MODELS = {
    "roberta-base": "roberta",
    "xlm-roberta-base": "xlm-roberta",
    "google/mt5-base": "mt5",
    "facebook/nllb-200-distilled-600M": "m2m_100",
}
#: Beginnings of the names of timm's trunks -> what stands for them.
TRUNKS = {
    "vit_base_patch16_siglip": "tiny_siglip_trunk",
    "fastvit": "tiny_fastvit_trunk",
    "vit_pe_core": "tiny_pe_trunk",
}
_SIDE = 64
_SMALL: dict[str, Any] = {"img_size": _SIDE, "embed_dim": 32, "depth": 1, "num_heads": 2}


@register_model
def tiny_siglip_trunk(pretrained: bool = False, **options: Any) -> nn.Module:
    """SigLIP's trunk: no class token, pooled by attention."""
    return vision_transformer.vit_base_patch16_siglip_224(**{**options, **_SMALL})


@register_model
def tiny_pe_trunk(pretrained: bool = False, **options: Any) -> nn.Module:
    """PE's trunk: rotary positions, pooled by attention."""
    own = {"attn_pool_num_heads": 2, "ref_feat_shape": (4, 4)}
    return eva.vit_pe_core_tiny_patch16_384(**{**options, **_SMALL, **own})


@register_model
def tiny_fastvit_trunk(pretrained: bool = False, **options: Any) -> nn.Module:
    """MobileCLIP's trunk: convolutions with batch norm, then attention."""
    own = {"layers": (1, 1, 1, 1), "embed_dims": (8, 16, 32, 64)}
    return fastvit.fastvit_mci0(**{**options, **own})


def tiny_family(name: str, folder: Path) -> dict[str, Any]:
    """The ``model_cfg`` of an architecture in small, with its files in a folder."""
    config = architecture_config(name)
    vision, text = config["vision_cfg"], config["text_cfg"]
    width = config["embed_dim"] = 32
    trunk = vision.get("timm_model_name")
    if trunk is None:
        vision.update(image_size=32, layers=1, width=32, head_width=16, patch_size=16)
    else:
        for beginning, small in TRUNKS.items():
            if trunk.startswith(beginning):
                vision["timm_model_name"] = small
        vision["image_size"] = _SIDE
    kind = FAMILIES[name]
    if kind:
        text["hf_tokenizer_name"] = str(TOKENIZERS[kind](folder))
        text["vocab_size"] = 500
    if text.get("hf_model_name"):
        _write_text_model(folder, _TEXT_MODELS[text["hf_model_name"]])
        text["hf_model_name"] = str(folder)
    text.update(
        width=width, heads=2, layers=1, context_length=min(text.get("context_length", 16), 16)
    )
    if "multimodal_cfg" in config:
        config["multimodal_cfg"].update(width=width, heads=2, layers=1, context_length=16)
    return config


def _write_text_model(folder: Path, kind: str) -> None:
    """The configuration of a Hugging Face text model beside its tokenizer."""
    from transformers import AutoConfig

    sizes: dict[str, Any] = {"vocab_size": 500, "max_position_embeddings": 80}
    sizes.update(HF_TEXT_TOWERS[kind])
    if kind in ("roberta", "xlm-roberta"):
        sizes["intermediate_size"] = 64
    AutoConfig.for_model(kind, **sizes).save_pretrained(str(folder))
