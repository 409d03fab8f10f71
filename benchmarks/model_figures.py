"""Counts what open_clip's pretrained architectures take, for `clipsys models`: one minute.

    python benchmarks/model_figures.py

Writes ``clipsys/models/tables/architectures.csv``. Text towers of Hugging Face are counted from
the dimensions that their authors published, since their configurations are on the hub alone.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import open_clip

from clipsys.models.architectures import architecture_config, image_size_of
from clipsys.models.catalogue import ARCHITECTURES, COUNTED
from clipsys.models.counting import count


def _roberta(kind: str, vocabulary: int, layers: int, width: int) -> dict[str, Any]:
    return {
        "model_type": kind,
        "vocab_size": vocabulary,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": width // 64,
        "intermediate_size": 4 * width,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "pad_token_id": 1,
    }


def _nllb(layers: int, inner: int) -> dict[str, Any]:
    return {
        "model_type": "m2m_100",
        "is_encoder_decoder": True,
        "vocab_size": 256206,
        "d_model": 1024,
        "encoder_layers": layers,
        "decoder_layers": layers,
        "encoder_attention_heads": 16,
        "decoder_attention_heads": 16,
        "encoder_ffn_dim": inner,
        "decoder_ffn_dim": inner,
        "max_position_embeddings": 1024,
        "pad_token_id": 1,
    }


#: Liu et al. 2019 (RoBERTa), Conneau et al. 2020 (XLM-R), NLLB Team 2022 (NLLB-200 distilled).
TEXT_MODELS = {
    "roberta-base": _roberta("roberta", 50265, 12, 768),
    "xlm-roberta-base": _roberta("xlm-roberta", 250002, 12, 768),
    "xlm-roberta-large": _roberta("xlm-roberta", 250002, 24, 1024),
    "facebook/nllb-200-distilled-600M": _nllb(12, 4096),
    "facebook/nllb-200-distilled-1.3B": _nllb(24, 8192),
}


def main() -> None:
    rows = []
    for name in sorted({name for name, _ in open_clip.list_pretrained()}):
        config = architecture_config(name)
        counted = count(config, TEXT_MODELS.get(config["text_cfg"].get("hf_model_name")))
        numbers = (counted.image_gflop, counted.text_gflop, counted.activation_mb)
        rows.append(
            [name, image_size_of(config)[0], counted.image_parameters, counted.text_parameters]
            + [f"{number:.3f}" for number in numbers]
        )
        print(*rows[-1])
    with Path(ARCHITECTURES).open("w", encoding="utf-8", newline="") as file:
        file.write(f"# Counted by benchmarks/model_figures.py, open_clip {open_clip.__version__}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COUNTED)
        writer.writerows(rows)


if __name__ == "__main__":
    main()
