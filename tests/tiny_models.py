"""Small models of the kinds that people use, with tokenizers that are made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.conftest import TINY_MODEL

_WORDS = "a an the of photo picture image number cat dog red green blue square circle star on is"


def write_tokenizer(folder: Path, *, pad_id: int = 0) -> Path:
    """A WordPiece tokenizer of Hugging Face: letters and a few words, end token, padding."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + list("0123456789")
    special = ["<pad>", "</s>", "<s>", "<unk>"]
    special.insert(pad_id, special.pop(0))
    words = [*special, *letters, *(f"##{one}" for one in letters), *_WORDS.split()[1:]]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(one, vocabulary[one]) for one in ("<s>", "</s>")]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        unk_token="<unk>",
    ).save_pretrained(str(folder))
    return folder


def siglip_config(tokenizer: Path) -> dict[str, Any]:
    """A model_cfg built as SigLIP is: no causal mask, pooled at the last token, with a bias."""
    return {
        "embed_dim": 32,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {**TINY_MODEL["vision_cfg"], "pool_type": "avg", "no_ln_pre": True},
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 100,
            "hf_tokenizer_name": str(tokenizer),
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "width": 32,
            "heads": 2,
            "layers": 1,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
        },
    }


#: preprocess_cfg of SigLIP's weights.
SIGLIP_PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}

#: The small sizes of each kind of Hugging Face text tower that open_clip lists.
HF_TEXT_TOWERS: dict[str, dict[str, Any]] = {
    "roberta": {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2},
    "xlm-roberta": {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2},
    "bert": {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2},
    "mt5": {"num_layers": 1, "d_model": 32, "num_heads": 2, "d_kv": 16, "d_ff": 64},
    "m2m_100": {
        "encoder_layers": 1,
        "decoder_layers": 1,
        "d_model": 32,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
    },
}


def write_text_model(folder: Path, kind: str) -> Path:
    """A folder with tokenizer and configuration of a Hugging Face text model, without weights."""
    from transformers import AutoConfig

    write_tokenizer(folder, pad_id=1 if kind in ("roberta", "xlm-roberta", "m2m_100") else 0)
    sizes = {"vocab_size": 100, "max_position_embeddings": 80, **HF_TEXT_TOWERS[kind]}
    if kind in ("roberta", "xlm-roberta", "bert"):
        sizes["intermediate_size"] = 64
    AutoConfig.for_model(kind, **sizes).save_pretrained(str(folder))
    return folder


def hf_text_config(text_model: Path) -> dict[str, Any]:
    """A model_cfg as those with a Hugging Face text tower are."""
    return {
        "embed_dim": 32,
        "vision_cfg": TINY_MODEL["vision_cfg"],
        "text_cfg": {
            "hf_model_name": str(text_model),
            "hf_tokenizer_name": str(text_model),
            "hf_proj_type": "mlp",
            "hf_pooler_type": "mean_pooler",
        },
    }


def coca_config() -> dict[str, Any]:
    """A model_cfg of CoCa: two towers and a decoder."""
    tower = {"context_length": 15, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    return {
        "embed_dim": 32,
        "custom_text": True,
        "vision_cfg": {
            **TINY_MODEL["vision_cfg"],
            "attentional_pool": True,
            "attn_pooler_heads": 2,
            "output_tokens": True,
        },
        "text_cfg": {**tower, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**tower, "attn_pooler_heads": 2},
    }


def write_stock_folder(folder: Path, config: dict[str, Any], preprocess: dict[str, Any]) -> Path:
    """A model folder as open_clip's own tools write it, with random weights of ``config``."""
    import open_clip
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    document = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(document), encoding="utf-8")
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder
