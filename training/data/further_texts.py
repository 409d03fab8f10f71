"""Texts of a sample beside its caption: wrong captions that its metadata holds, or mined ones.

A list of mined texts is a folder of arrays that the workers map into memory::

    list.json        the step that it was mined at
    candidates.npy   (N, H) int64: numbers of the samples whose texts are hard negatives of each
                     sample, hardest first; -1 where there are fewer
    groups.npy       (N,) int64: group of each sample's text
    bounds.npy       (N + 1,) int64: where each text begins in
    texts.npy        uint8: the texts that were mined with, UTF-8, one after the other

Shapes: N samples, H candidates.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipsys.errors import ConfigError, DataError, SampleError, TrainingError
from clipsys.shards.random_access import ShardReader
from clipsys.shards.remote import is_remote
from clipsys.shards.sample_texts import captions_at, check_length
from clipsys.shards.samples import Sample, parse_sample
from clipsys.training.data.config import DataConfig
from clipsys.training.data.samples import FurtherText, normalise_caption
from clipsys.training.data.shard_set import ShardSet

Ints = npt.NDArray[np.int64]

_ARRAYS = ("candidates", "groups", "bounds", "texts")
_FORMAT = "clipsys-mined/1"
_SETTING = "objective.negatives_key"
#: Samples that are looked at for a metadata key.
_LOOKED_AT = 256


@dataclass(frozen=True)
class StatedNegatives:
    """Wrong captions from the metadata.

    Attributes:
        key: metadata key; dots lead into objects and lists of objects.
        count: texts drawn each time.
    """

    key: str
    count: int

    def drawn(self, sample: Sample, number: int, entropy: int) -> list[FurtherText]:
        """Different ones of the sample's, as many as there are up to ``count``.

        Raises:
            SampleError: what the key holds is no text.
        """
        texts = stated_texts(sample, self.key)
        chosen = _choose(len(texts), self.count, entropy)
        return [FurtherText(texts[place]) for place in chosen]


def stated_texts(sample: Sample, key: str) -> list[str]:
    """The texts at a metadata key that are no captions of the sample.

    Raises:
        SampleError: what is there is no text.
    """
    own = set(map(normalise_caption, sample.captions))
    try:
        texts = list(dict.fromkeys(captions_at(sample.metadata, key, _SETTING)))
        for text in texts:
            check_length(text)
    except SampleError as error:
        raise SampleError(f"sample {sample.key}: {error}", reason=error.reason) from error
    return [text for text in texts if normalise_caption(text) not in own]


def check_negatives_key(config: DataConfig, shard_set: ShardSet, key: str) -> float:
    """The share of samples that have texts at a metadata key, from a look at some of all shards.

    Raises:
        ConfigError: none has.
    """
    reader = ShardReader(shard_set.shards, shard_set.counts, cache=config.shard_cache)
    starts = np.cumsum([0, *shard_set.counts])
    # All shards, unless each would have to be fetched.
    last = starts[1 if any(map(is_remote, shard_set.shards)) else -1] - 1
    numbers = np.unique(np.linspace(0, last, _LOOKED_AT).astype(int))
    num_found, names = 0, set[str]()
    for number in numbers:
        shard = int(np.searchsorted(starts, number, side="right")) - 1
        try:
            raw = reader.read(shard, int(number - starts[shard]))
            sample = parse_sample(raw, caption_key=config.caption_key, needs_image=False)
            num_found += bool(stated_texts(sample, key))
        except DataError:  # counted and skipped in training
            continue
        names |= sample.metadata.keys()
    reader.close()
    if not num_found:
        listed = ", ".join(sorted(names)[:8]) or "no keys"
        raise ConfigError(
            f"{_SETTING} is {key!r}, and none of {len(numbers)} samples has texts "
            f"there (their metadata has {listed}); name the metadata key of the wrong captions"
        )
    return num_found / len(numbers)


class MinedList:
    """Mined texts of each sample. A pickled list begins with nothing read."""

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: what `write_mined_list` has written.

        Raises:
            TrainingError: it is no such list.
        """
        self.folder = folder
        self._arrays: dict[str, npt.NDArray[Any]] = {}
        try:
            document = json.loads((folder / "list.json").read_text(encoding="utf-8"))
            if document["format"] != _FORMAT:
                raise ValueError(f"its format is {document['format']!r}")
            self.step = int(document["step"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(f"{folder}: is no list of mined texts ({error})") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_arrays": {}}

    def _array(self, name: str) -> npt.NDArray[Any]:
        if name not in self._arrays:
            self._arrays[name] = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        return self._arrays[name]

    def candidates(self, number: int) -> Ints:
        """Numbers of the samples whose texts are hard negatives of a sample, hardest first."""
        row_H = self._array("candidates")[number]
        return np.asarray(row_H[row_H >= 0])

    def text(self, number: int) -> str:
        """The text of a sample that was mined with."""
        start, end = self._array("bounds")[number : number + 2]
        return self._array("texts")[start:end].tobytes().decode("utf-8")

    def group(self, number: int) -> int:
        """The group of that text."""
        return int(self._array("groups")[number])

    def fingerprint(self) -> str:
        """Equal for equal lists; all of it is read."""
        digest = hashlib.blake2b(f"{self.step}".encode(), digest_size=8)
        for name in _ARRAYS:
            digest.update(np.ascontiguousarray(self._array(name)).data)
        return digest.hexdigest()


def write_mined_list(
    folder: Path, *, step: int, candidates_NH: Ints, groups_N: Ints, texts: Sequence[str]
) -> None:
    """Writes a list, complete or not at all.

    Args:
        folder: where it is written; one that is there is replaced.
        step: steps that the model had done when it was mined.
        candidates_NH: numbers of samples, hardest first, -1 where there are fewer.
        groups_N: group of each sample's text.
        texts: text of each sample; empty where it cannot be used.
    """
    encoded = [text.encode("utf-8") for text in texts]
    arrays: dict[str, npt.NDArray[Any]] = {
        "candidates": candidates_NH.astype(np.int64),
        "groups": groups_N.astype(np.int64),
        "bounds": np.cumsum([0, *map(len, encoded)], dtype=np.int64),
        "texts": np.frombuffer(b"".join(encoded), np.uint8),
    }
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in _ARRAYS:
        np.save(partial / f"{name}.npy", arrays[name], allow_pickle=False)
    document = json.dumps({"format": _FORMAT, "step": step}) + "\n"
    (partial / "list.json").write_text(document, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


@dataclass(frozen=True)
class MinedNegatives:
    """Texts of other samples that the model takes for a sample's own.

    Attributes:
        mined: the list; None where nothing has been mined yet.
        count: texts drawn each time.
    """

    mined: MinedList | None
    count: int

    def drawn(self, sample: Sample, number: int, entropy: int) -> list[FurtherText]:
        """Texts of different candidates, as many as there are up to ``count``."""
        if self.mined is None:
            return []
        own = set(map(normalise_caption, sample.captions))
        numbers = self.mined.candidates(number)
        found: list[FurtherText] = []
        for place in _choose(len(numbers), len(numbers), entropy):
            other = int(numbers[place])
            text = self.mined.text(other)
            if normalise_caption(text) not in own:
                found.append(FurtherText(text, self.mined.group(other)))
            if len(found) == self.count:
                break
        return found


def _choose(available: int, count: int, entropy: int) -> list[int]:
    """Different places, in a random order."""
    order = np.random.default_rng(entropy).permutation(available)
    return [int(place) for place in order[:count]]
