"""The tokenizer that belongs to a text tower: CLIP's own, or one of Hugging Face's.

A Hugging Face tokenizer stands in the model folder with its files, so that a model that was fetched
or trained once needs no hub afterwards. Before it stands there, ``text_cfg.hf_tokenizer_name`` says
where it comes from: a folder, or a repository of the hub.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipsys.errors import ModelError
from clipsys.models import hub

if TYPE_CHECKING:
    import torch

#: texts -> int64 (N, context_length)
Tokenizer = Callable[[list[str]], "torch.Tensor"]

#: Texts that tokenizers of different vocabularies or rules tell apart.
PROBE_TEXTS = [
    "a photo of a cat",
    "Two DOGS, running… don't!",
    "un été à Zürich, 日本語, русский",
    "x" * 40,
    "1234 5.6 - <b>",
]
#: Each of them is enough for a Hugging Face tokenizer, by its kind.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)


def make_tokenizer(config: Mapping[str, Any], *, folder: Path | None = None) -> Tokenizer:
    """The tokenizer of a ``model_cfg``.

    Args:
        config: open_clip's ``model_cfg``.
        folder: the model folder, whose own tokenizer files come first.

    Raises:
        ModelError: the tokenizer's files are missing or damaged.
    """
    from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer

    text = config.get("text_cfg") or {}
    options = dict(text.get("tokenizer_kwargs") or {})
    length = text.get("context_length") or DEFAULT_CONTEXT_LENGTH
    name = text.get("hf_tokenizer_name")
    if not name:
        tokenizer: Tokenizer = SimpleTokenizer(context_length=length, **options)
        return tokenizer
    mode = text.get("tokenizer_mode")
    source = _local_source(name, folder)
    try:
        if source:
            with hub.without_hub():
                return HFTokenizer(source, length, tokenizer_mode=mode, **options)  # type: ignore[no-any-return]
    except Exception as error:
        # transformers and tokenizers raise anything here, plain Exceptions too.
        raise ModelError(
            f"{source}: its tokenizer cannot be read ({_first_line(error)}); expected the files "
            "that a Hugging Face tokenizer's save_pretrained writes"
        ) from error
    with hub.quiet_hub() as unreachable:
        try:
            return HFTokenizer(name, length, tokenizer_mode=mode, **options)  # type: ignore[no-any-return]
        except Exception as error:  # as above
            where = f"{folder}: " if folder else ""
            if unreachable:
                raise ModelError(
                    f"{where}the tokenizer {name} of its text tower is not on this machine, and "
                    f"{unreachable}; set text_cfg.hf_tokenizer_name to a folder with the "
                    f"tokenizer's files, or {hub.HINT}"
                ) from error
            raise ModelError(
                f"{where}the tokenizer {name} (text_cfg.hf_tokenizer_name) cannot be loaded "
                f"({_first_line(error)}); expected a repository of the hub or a folder"
            ) from error


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds the files of a Hugging Face tokenizer."""
    return any((folder / one).is_file() for one in _TOKENIZER_FILES)


def _local_source(name: str, folder: Path | None) -> str | None:
    if folder is not None and has_tokenizer(folder):
        return str(folder)
    place = Path(name).expanduser()
    return str(place) if place.is_dir() else None


def with_context_length(tokenizer: Tokenizer, length: int) -> Tokenizer:
    """The same tokenizer, for texts of another length."""
    changed: Any = copy.copy(tokenizer)
    changed.context_length = length
    return changed  # type: ignore[no-any-return]


def vocabulary_size(tokenizer: Any) -> int | None:
    """How many token ids a tokenizer gives, without those that were added to it; None: unknown."""
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    size = getattr(inner, "vocab_size", None)
    return int(size) if isinstance(size, int) else None


def vocabulary_digest(tokenizer: Any) -> str:
    """Equal for equal vocabularies of Hugging Face tokenizers, whatever folder they are from."""
    inner = getattr(tokenizer, "tokenizer", None)
    tokens = {} if inner is None else inner.get_vocab()
    return "vocabulary " + hashlib.sha256(json.dumps(sorted(tokens.items())).encode()).hexdigest()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
