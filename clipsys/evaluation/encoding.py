"""From a data set to vectors, each content once: through the cache, by one process or several.

    records --read, hash--> contents --cache--> known
                               |
                               '--claim--> misses --blocks--> decode, corrupt, encode --> cache

**The same bits in every process.** A vector depends on its image alone: the encoder takes its
images in groups of one fixed size (`Encoder.encode_pixels_fixed`), in which neither place nor
neighbours count, and neither does the number of threads; `clipsys.inference.threads` says what was
measured. Texts go in groups of one size and length. So misses need not be cut in the same blocks by
each process, and a part of the vectors that comes from the cache has the bits of the rest. A
corruption draws from a seed made of the image's content.

**Nothing twice.** Misses are claimed in the cache before they are encoded. What another run has
claimed is waited for; if that run ends without it, it is encoded here.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Literal, TypeAlias, TypeVar

import numpy as np

from clipsys.corpora.records import Record
from clipsys.corpora.sources import read_uri
from clipsys.errors import DataError
from clipsys.evaluation.block_encoding import (
    BLOCK,
    Block,
    BlockEncoder,
    Corruption,
    ImageReading,
    LocalBlocks,
    WorkerBlocks,
    can_have_workers,
)
from clipsys.evaluation.cache import EmbeddingCache, StoredVectors
from clipsys.evaluation.data import DataSet
from clipsys.evaluation.embedded import EmbeddedImages, Floats
from clipsys.models.encoder import Encoder
from clipsys.processes.interruption import bounded_threads
from clipsys.progress import Advance, progress

__all__ = ["Corruption", "Decode", "encode_images", "encode_texts"]

Decode: TypeAlias = Literal["exact", "fast"]
_Item = TypeVar("_Item")

#: Images that are read and looked up together.
_WINDOW = 2 * BLOCK
#: Texts that are tokenized and looked up together.
_TEXT_WINDOW = 4096
#: Images that are compared with fp32 before a precision is final, and how many decide nothing.
_SETTLED_ON, _SETTLED_MIN = 16, 8
#: Unusable images that a warning names.
_NAMED = 3
_POLL_S = 0.1

_logger = logging.getLogger(__name__)


def encode_images(
    encoder: Encoder,
    data: DataSet,
    *,
    cache: EmbeddingCache | None,
    corruption: Corruption | None = None,
    num_processes: int = 1,
    decode: Decode = "exact",
) -> EmbeddedImages:
    """Encodes every usable image of a data set; equal images once.

    What is encoded by the time of an interruption stays in the cache. Images that cannot be used
    are counted, and named in one warning.

    Args:
        encoder: its precision becomes final by the first images, or by an earlier run's.
        data: the images.
        cache: vectors of earlier runs, and of those that run now; None: nothing is stored.
        corruption: changes the pixels that the encoder sees.
        num_processes: above 1, worker processes load the same model and share the work.
        decode: ``exact`` decodes images whole, as open_clip does; ``fast`` as training does, within
            40 dB of that.

    Raises:
        DataError: the data cannot be read, or none of the images can be used.
    """
    reading = ImageReading(is_fast=decode == "fast", corruption=corruption)
    with contextlib.ExitStack() as stack:
        threads = stack.enter_context(bounded_threads(_num_threads(), "clipsys-read"))
        advance = stack.enter_context(progress("Encoding images"))
        windows = _read_ahead(threads, data.records())
        first = next(windows, [])
        precision = _settled(encoder, first, cache, threads)
        stored = stack.enter_context(_open(cache, encoder, precision))
        if num_processes > 1 and can_have_workers(encoder):
            blocks: BlockEncoder = WorkerBlocks(encoder, precision, reading, num_processes)
        else:
            blocks = LocalBlocks(encoder, precision, reading, threads)
        stack.enter_context(blocks)
        work = _Work(stored, blocks, reading, advance)
        work.take(first)
        for window in windows:
            work.take(window)
        work.finish()
    return work.images(data.name, encoder.dim)


def encode_texts(encoder: Encoder, texts: Sequence[str], *, cache: EmbeddingCache | None) -> Floats:
    """Encodes texts, equal ones once: (M, D) float32 of unit norm.

    They are cut to the model's context as `Encoder.encode_text` does. After `encode_images`, in the
    precision that the images decided for.
    """
    keys = [
        _key("text", hashlib.sha256(text.encode("utf-8", "replace")).digest()) for text in texts
    ]
    unique = dict(zip(keys, texts, strict=True))
    vectors: dict[bytes, Floats] = {}
    precision = "bf16" if encoder.precision == "bf16" else "fp32"
    with _open(cache, encoder, precision) as stored:
        for window in _cut(unique, _TEXT_WINDOW):
            found = stored.get(window)
            missing = [key for key in window if key not in found]
            made = encoder.encode_text_fixed([unique[key] for key in missing])
            new = dict(zip(missing, made, strict=True))
            stored.put(new)
            vectors |= found | new
    if not texts:
        return np.zeros((0, encoder.dim), np.float32)
    return np.stack([vectors[key] for key in keys])


@dataclass(frozen=True)
class _Read:
    """A record with its bytes, or why it has none."""

    record: Record
    content: bytes = field(repr=False, default=b"")
    digest: bytes = b""
    failure: DataError | None = None


class _Work:
    """What is known of the images so far, and the blocks that are being encoded."""

    def __init__(
        self, stored: StoredVectors, blocks: BlockEncoder, reading: ImageReading, advance: Advance
    ) -> None:
        self._stored, self._blocks, self._advance = stored, blocks, advance
        self._form = f"image {'fast' if reading.is_fast else 'exact'}"
        if reading.corruption is not None:
            self._form += f" {reading.corruption.key}"
        self._records: list[tuple[Record, bytes, str]] = []
        self._vectors: dict[bytes, Floats] = {}
        self._failures: dict[bytes, DataError] = {}
        self._unreadable: list[DataError] = []
        self._asked: set[bytes] = set()
        #: What another process has claimed, by its key.
        self._elsewhere: dict[bytes, Record] = {}
        self._pending: Block = []
        self._running: deque[tuple[Block, Future[list[Floats | DataError]]]] = deque()

    def take(self, window: Sequence[_Read]) -> None:
        """Looks up images, and begins to encode those that nobody has encoded."""
        new: dict[bytes, _Read] = {}
        for one in window:
            if one.failure is not None:
                self._unreadable.append(one.failure)
                self._advance(1)
                continue
            key = _key(self._form, one.digest)
            self._records.append((_without_bytes(one.record), key, one.digest.hex()))
            if key in self._asked:
                self._advance(1)
            else:
                new.setdefault(key, one)
        self._asked |= new.keys()
        found = self._stored.get(list(new))
        self._vectors |= found
        self._advance(len(found))
        missing = [key for key in new if key not in found]
        mine = self._stored.claim(missing) if missing else set()
        for key in missing:
            one = new[key]
            if key in mine:
                self._pending.append((key, one.digest, one.content, one.record.uri))
            else:
                self._elsewhere[key] = one.record
        self._submit(BLOCK)

    def finish(self) -> None:
        """Encodes the rest, and waits for what other processes have claimed."""
        self._submit(1)
        self._collect(0)
        while self._elsewhere:
            found = self._stored.get(list(self._elsewhere))
            self._vectors |= found
            self._advance(len(found))
            for key in found:
                del self._elsewhere[key]
            mine = self._stored.claim(list(islice(self._elsewhere, BLOCK)))
            for key in [key for key in self._elsewhere if key in mine]:
                self._take_over(key, self._elsewhere.pop(key))
            if mine:
                self._submit(1)
                self._collect(0)
            elif self._elsewhere:
                time.sleep(_POLL_S)

    def images(self, name: str, dim: int) -> EmbeddedImages:
        """All usable images in their order.

        Raises:
            DataError: there are none.
        """
        failures = [*self._unreadable]
        kept = []
        for record, key, content in self._records:
            if key in self._failures:
                failures.append(self._failures[key])
            else:
                kept.append((record, key, content))
        _warn(failures)
        if not kept:
            raise DataError(f"{name}: none of the images can be used")
        vectors_ND = np.empty((len(kept), dim), np.float32)
        for row, (_, key, _) in enumerate(kept):
            vectors_ND[row] = self._vectors[key]
        return EmbeddedImages(
            [record for record, _, _ in kept], vectors_ND, [content for _, _, content in kept]
        )

    def _take_over(self, key: bytes, record: Record) -> None:
        """An image whose process ended without it; its bytes are read again."""
        one = _read(record)
        if one.failure is not None or _key(self._form, one.digest) != key:
            self._failures[key] = one.failure or DataError(
                f"{record.uri}: has changed since it was first read; run the evaluation again"
            )
            self._advance(1)
        else:
            self._pending.append((key, one.digest, one.content, record.uri))

    def _submit(self, least: int) -> None:
        while len(self._pending) >= least:
            block, self._pending = self._pending[:BLOCK], self._pending[BLOCK:]
            self._running.append((block, self._blocks.submit(block)))
            self._collect(self._blocks.ahead)

    def _collect(self, most: int) -> None:
        """Waits until no more than ``most`` blocks are being encoded."""
        while len(self._running) > most:
            block, future = self._running.popleft()
            made: dict[bytes, Floats] = {}
            for (key, *_), result in zip(block, future.result(), strict=True):
                if isinstance(result, DataError):
                    self._failures[key] = result
                else:
                    made[key] = result
            self._stored.put(made)
            self._vectors |= made
            self._advance(len(block))


def _open(cache: EmbeddingCache | None, encoder: Encoder, precision: str) -> StoredVectors:
    if cache is None:
        return StoredVectors(None, encoder.dim, 0)
    import torch

    return cache.open(
        {
            "fingerprint": encoder.fingerprint,
            "precision": precision,
            "device": encoder.device.type,
            "torch": torch.__version__,
            "cpu": torch.backends.cpu.get_cpu_capability(),
        },
        encoder.dim,
    )


def _settled(
    encoder: Encoder, first: Sequence[_Read], cache: EmbeddingCache | None, threads: Executor
) -> str:
    """The precision of this run: it must be final before vectors are looked up.

    Where images decide, the first ones of the first run do; later runs go by that.
    """
    if encoder.settled_precision is not None:
        return encoder.settled_precision
    question = {
        "fingerprint": encoder.fingerprint,
        "device": str(encoder.device),
        "precisions": " ".join(encoder.precision_choices),
    }
    known = cache.recall(question) if cache is not None else None
    if known in encoder.precision_choices or known == "fp32":
        encoder.settle_for(str(known))
        _logger.info("precision: %s (an earlier run compared it)", known)
        return str(known)
    plain = ImageReading()
    usable = (one for one in first if one.failure is None)
    pixels = []
    for part in _cut(usable, _SETTLED_ON):
        made = threads.map(
            lambda one: plain(encoder, one.content, one.digest, one.record.uri), part
        )
        pixels += [one for one in made if not isinstance(one, DataError)]
        if len(pixels) >= _SETTLED_ON:
            break
    if len(pixels) < _SETTLED_MIN:
        return "fp32"
    encoder.encode_pixels(np.stack(pixels[:_SETTLED_ON]))
    settled = encoder.settled_precision or "fp32"
    if cache is not None:
        cache.remember(question, settled)
    return settled


def _read_ahead(threads: Executor, records: Iterator[Record]) -> Iterator[list[_Read]]:
    """Windows of records with their bytes; the next one is read meanwhile."""
    waiting: deque[list[Future[_Read]]] = deque()
    for window in _cut(records, _WINDOW):
        waiting.append([threads.submit(_read, record) for record in window])
        if len(waiting) > 1:
            yield [future.result() for future in waiting.popleft()]
    while waiting:
        yield [future.result() for future in waiting.popleft()]


def _read(record: Record) -> _Read:
    try:
        content = record.read()
    except DataError as error:
        return _Read(record, failure=error)
    return _Read(record, content, hashlib.sha256(content).digest())


def _without_bytes(record: Record) -> Record:
    """The record; one of a remote shard, which holds its image, reads it again instead."""
    if isinstance(record.read, partial) and record.read.func is bytes:
        return replace(record, read=partial(read_uri, record.uri))
    return record


def _key(form: str, digest: bytes) -> bytes:
    return hashlib.sha256(form.encode() + b"\0" + digest).digest()


def _cut(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part


def _warn(failures: Sequence[DataError]) -> None:
    if not failures:
        return
    counts = Counter(getattr(error, "reason", "unreadable") for error in failures)
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    named = "; ".join(str(error) for error in failures[:_NAMED])
    more = "; …" if len(failures) > _NAMED else ""
    _logger.warning("%d images cannot be used: %s (%s%s)", len(failures), reasons, named, more)


def _num_threads() -> int:
    return min(32, (os.cpu_count() or 1) + 2)
