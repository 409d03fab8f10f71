"""Tokenizers of the kinds that open_clip's models have, trained on the spot on a few sentences.

Each folder holds the files that the kind's repository of the hub holds, so that they are read as
those are: a sentencepiece model, a vocabulary with merges, a list of words, a ``tokenizer.json``.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SENTENCES = [
    f"{article} {colour} {thing} {place}"
    for article in ("a", "the", "one")
    for colour in ("red", "green", "blue", "big", "small")
    for thing in ("circle", "square", "dog", "cat", "photo of a star")
    for place in ("on the beach", "in the snow", "with two people", "", "runs")
] + [
    "un gatto rosso",
    "ein roter Hund läuft",
    "красная собака",
    "一只红色的狗",
    "pictures of 12345 67890",
]


def write_t5(folder: Path) -> Path:
    """SigLIP, mT5: a unigram model of sentencepiece; padding 0, end 1."""
    _write_sentencepiece(
        folder / "spiece.model", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, model_type="unigram"
    )
    return _with_class(folder, "T5Tokenizer", extra_ids=0)


def write_xlm_r(folder: Path) -> Path:
    """XLM-R and XLM-V: sentencepiece, with the ids that fairseq has; padding 1, end 2."""
    _write_sentencepiece(
        folder / "sentencepiece.bpe.model", unk_id=0, bos_id=1, eos_id=2, pad_id=-1
    )
    return _with_class(folder, "XLMRobertaTokenizer")


def write_nllb(folder: Path) -> Path:
    """NLLB: pieces merged in pairs; a text begins with the code of its language."""
    _write_sentencepiece(
        folder / "sentencepiece.bpe.model",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        model_type="bpe",
    )
    return _with_class(
        folder, "NllbTokenizer", src_lang="eng_Latn", extra_special_tokens=["eng_Latn"]
    )


def write_gemma(folder: Path) -> Path:
    """SigLIP 2: byte-pair encoding that falls back to bytes, as one file; padding 0, end 1."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.ByteFallback()
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=450, special_tokens=[*special, *bytes_])
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    return _with_class(folder, "GemmaTokenizer", padding_side="right", **names)


def write_roberta(folder: Path) -> Path:
    """RoBERTa: byte-pair encoding over bytes, as a vocabulary and its merges; padding 1."""
    from tokenizers import ByteLevelBPETokenizer

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(_SENTENCES, vocab_size=400, special_tokens=special)
    tokenizer.save_model(str(folder))
    return _with_class(folder, "RobertaTokenizer")


def write_bert(folder: Path) -> Path:
    """BERT: words and their parts, in lower case; padding 0."""
    from tokenizers import BertWordPieceTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = BertWordPieceTokenizer(lowercase=True)
    tokenizer.train_from_iterator(_SENTENCES, vocab_size=300)
    tokenizer.save_model(str(folder))
    return _with_class(folder, "BertTokenizer")


#: Kind -> what writes it into a folder.
TOKENIZERS: dict[str, Callable[[Path], Path]] = {
    "t5": write_t5,
    "xlm-r": write_xlm_r,
    "nllb": write_nllb,
    "gemma": write_gemma,
    "roberta": write_roberta,
    "bert": write_bert,
}


def _write_sentencepiece(path: Path, **options: Any) -> None:
    import sentencepiece

    path.parent.mkdir(parents=True, exist_ok=True)
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_SENTENCES),
        model_writer=written,
        vocab_size=160,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    path.write_bytes(written.getvalue())


def _with_class(folder: Path, name: str, **options: Any) -> Path:
    document = {"tokenizer_class": name, **options}
    (folder / "tokenizer_config.json").write_text(json.dumps(document), encoding="utf-8")
    return folder
