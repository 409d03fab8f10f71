"""CLIP's tokenizer without torch: byte-pair encoding with the vocabulary that open_clip ships.

open_clip's own tokenizer module imports torch, which takes seconds; a text query needs none. The
algorithm is that of Radford et al. 2021 (https://github.com/openai/CLIP): the text is cleaned and
split into words; each word's bytes become symbols, and neighbouring symbols are merged in the order
of the vocabulary's merges. That it gives the same tokens as open_clip is tested, and verified again
for each model before it is relied on (`clipsys.inference.numpy_text_tower`).

The tokenizers library was measured beside it in processes of their own (import, vocabulary, one
query; two cores, best of 8): 45 ms here, 61 ms there with the vocabulary made again, and 61 ms from
a tokenizer.json. It would still need the cleaning and the vocabulary's layout from here.
"""

from __future__ import annotations

import gzip
import html
from functools import cached_property
from importlib.util import find_spec
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
_NUM_MERGES = 48_894
_SPECIAL = ("<start_of_text>", "<end_of_text>")
_WORD = r"""<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"""
_END = "</w>"


def vocabulary_path() -> Path | None:
    """Where the installed open_clip keeps its vocabulary; None where it does not."""
    found = find_spec("open_clip")
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).with_name(_VOCABULARY)
    return path if path.is_file() else None


class BytePairTokenizer:
    """Turns texts into CLIP's token ids."""

    def __init__(self, vocabulary: Path, context_length: int) -> None:
        self._vocabulary = vocabulary
        self._context_length = context_length

    def encode(self, text: str) -> list[int]:
        """Token ids with their start and end, cut at the context length; no padding."""
        start, end = (self._ids[token] for token in _SPECIAL)
        tokens = [start]
        for word in self._words.findall(clean(text).lower()):
            tokens += self._word_ids(word)
        return [*tokens[: self._context_length - 1], end]

    @cached_property
    def _words(self) -> Any:
        import regex  # knows Unicode's classes, which `re` does not

        return regex.compile(_WORD, regex.IGNORECASE)

    @cached_property
    def _merges(self) -> list[str]:
        # The first line is a heading; CLIP uses a fifth of those that follow.
        with gzip.open(self._vocabulary) as file:
            lines = b"".join(islice(file, 1, 1 + _NUM_MERGES))
        return lines.decode("utf-8").split("\n")[:_NUM_MERGES]

    @cached_property
    def _ranks(self) -> dict[str, int]:
        """Rank of a merge by its two symbols with a space between, as the file has them."""
        return {merge: rank for rank, merge in enumerate(self._merges)}

    @cached_property
    def _ids(self) -> dict[str, int]:
        symbols = list(_BYTE_SYMBOLS.values())
        merged = [merge.replace(" ", "") for merge in self._merges]
        tokens = [*symbols, *(symbol + _END for symbol in symbols), *merged, *_SPECIAL]
        return {token: number for number, token in enumerate(tokens)}

    def _word_ids(self, word: str) -> list[int]:
        if word in _SPECIAL:
            return [self._ids[word]]
        symbols = [_BYTE_SYMBOLS[byte] for byte in word.encode("utf-8")]
        symbols[-1] += _END
        while len(symbols) > 1:
            pairs = {f"{one} {two}" for one, two in pairwise(symbols)}
            best = min(pairs, key=lambda pair: self._ranks.get(pair, _NUM_MERGES))
            if best not in self._ranks:
                break
            symbols = _merged(symbols, *best.split(" "))
        return [self._ids[symbol] for symbol in symbols]


def _merged(symbols: list[str], one: str, two: str) -> list[str]:
    """Symbols with every ``one two``, from left to right, made into one."""
    result: list[str] = []
    for symbol in symbols:
        if result and result[-1] == one and symbol == two:
            result[-1] = one + two
        else:
            result.append(symbol)
    return result


def clean(text: str) -> str:
    """What open_clip cleans each text to before it is lowered or split, with single spaces."""
    plain = text.isascii() and text.replace("\n", " ").replace("\t", " ").isprintable()
    if not plain or "&" in text:
        import ftfy  # mends wrongly decoded text; in printable ASCII there is nothing to mend

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


def _byte_symbols() -> dict[int, str]:
    """A printable character for each byte: itself where it is one, else the next from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable}
    return symbols | {byte: chr(256 + number) for number, byte in enumerate(others)}


_BYTE_SYMBOLS = _byte_symbols()
