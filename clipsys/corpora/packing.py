"""Packing a corpus into shards: several processes, one order, and no work lost to a kill.

    source ──records, in order or shuffled──▶ worker processes ──checked, resized──▶ shards in order

The shards are a function of the source and the settings, not of the number of workers. After each
shard OUT/.PREFIX.packing.json says how far the source has come; a call that finds it goes on from
there, if source and settings are still the same. OUT/PREFIX-skipped.jsonl lists what could not be
used.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import logging
import random
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from clipsys.corpora.records import Record, to_sample
from clipsys.corpora.sources import iterate_source, source_kind
from clipsys.corpora.tables import Columns
from clipsys.errors import DataError, ImageDecodeError
from clipsys.images.decoding import decode_image
from clipsys.processes.pool import ordered_map
from clipsys.progress import Advance, progress
from clipsys.shards.manifest import ShardInfo
from clipsys.shards.reading import shard_failure
from clipsys.shards.samples import Sample
from clipsys.shards.writing import DEFAULT_SHARD_BYTES, hash_file, write_shards

_logger = logging.getLogger(__name__)

#: JPEG quality of images that were resized; smaller images keep their bytes.
_QUALITY = 95
#: How much larger than asked a JPEG is decoded before it is resized.
_MARGIN = 1.65


@dataclass(frozen=True)
class PackReport:
    """What was packed.

    Attributes:
        shards: one entry per shard.
        skipped: how many images could not be used, by reason.
        resumed: how many of the shards an interrupted call had written.
        skipped_path: the list of them, if there are any.
    """

    shards: list[ShardInfo]
    skipped: dict[str, int]
    resumed: int = 0
    skipped_path: Path | None = None


def pack(
    source: str | Path,
    out: str | Path,
    *,
    prefix: str = "shard",
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    shuffle_seed: int | None = None,
    columns: Columns = Columns(),
    resize: int | None = None,
    frames: bool = False,
    workers: int = 1,
) -> PackReport:
    """Packs a folder, a table or shards into WebDataset shards with a manifest.

    Each image is decoded once, so that none that cannot be used gets in. Without ``resize`` they
    keep their bytes. A table of texts (``columns.without_images``) becomes samples without images.

    Args:
        source: what `clipsys.corpora.sources.iterate_source` reads.
        out: folder for the shards. Where an interrupted call has left some, they are kept.
        prefix: shards are named ``PREFIX-00000.tar`` and onwards.
        shard_bytes: a new shard is begun when one has grown to this size.
        shuffle_seed: order of the samples; None keeps the order of the source.
        columns: what a table's columns mean.
        resize: pixels of the shorter side to which larger images are reduced, as JPEG.
        frames: the images of a folder are numbered frames; their metadata say which.
        workers: processes that read and decode.

    Raises:
        DataError: the source cannot be read or has changed since it was interrupted, none of its
            images can be used, or the folder already has shards of this prefix.
    """
    settings = {
        "source": str(source),
        "shard_bytes": shard_bytes,
        "shuffle_seed": shuffle_seed,
        "columns": [columns.path, list(columns.captions), columns.label]
        + ["no images"] * columns.without_images,
        "resize": resize,
    }
    if frames:
        settings["frames"] = True
    journal = _Journal(Path(out), prefix, settings)
    journal.load()
    resumed = len(journal.shards)
    broken: dict[str, str] = {}

    def note(shard: str, error: Exception) -> None:
        broken[shard] = shard_failure(shard, error)

    records: Iterable[Record] = iterate_source(
        source, columns=columns, frames=frames, on_error=note
    )
    total = None
    if shuffle_seed is not None or source_kind(source) != "shards":
        listed = list(records)
        total = len(listed)
        if shuffle_seed is not None:
            random.Random(shuffle_seed).shuffle(listed)
        records = listed
    if not any(Path(out).glob(f"{glob.escape(prefix)}-*.tar")):
        journal.save()  # from now on, what is there is this pack's
    unit = "texts" if columns.without_images else "images"
    with progress("Packing", total, unit=unit) as advance:
        samples = _samples(journal.follow(records, advance), journal, resize, workers)
        written = write_shards(
            samples,
            out,
            prefix=prefix,
            shard_bytes=shard_bytes,
            done=tuple(journal.shards),
            on_shard=journal.shard_done,
        )
    journal.path.unlink(missing_ok=True)
    for shard, text in broken.items():
        _logger.warning("%s; its first samples are packed", text)
        journal.skipped.append((shard, "truncated shard"))
    skipped = Counter(reason for _, reason in journal.skipped)
    if not written:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        raise DataError(
            f"{source}: none of the {journal.taken} {unit} can be used ({reasons}); "
            f"the first is {journal.skipped[0][0]}"
        )
    journal.list_skipped()
    return PackReport(written, dict(skipped), resumed, journal.skipped_path if skipped else None)


def _samples(
    records: Iterator[tuple[int, Record]], journal: _Journal, resize: int | None, workers: int
) -> Iterator[Sample]:
    """The usable samples, in order; notes in the journal which record each came from."""
    tasks = ((number, *_read(number, record)) for number, record in records)
    for number, uri, outcome in ordered_map(partial(_prepare, resize=resize), tasks, workers):
        if isinstance(outcome, str):
            journal.skip(number, uri, outcome)
        else:
            journal.sample(number)
            yield outcome
    journal.finish()


def _read(number: int, record: Record) -> tuple[str, Sample | str]:
    try:
        return record.uri, to_sample(record, f"{number:09d}")
    except DataError as error:
        return record.uri, getattr(error, "reason", "unreadable")


def _prepare(
    task: tuple[int, str, Sample | str], *, resize: int | None
) -> tuple[int, str, Sample | str]:
    """The sample as it is packed, or why it cannot be used; runs in a worker."""
    number, uri, sample = task
    if isinstance(sample, str) or not sample.suffix:  # unusable, or a text alone
        return number, uri, sample
    try:
        if resize is None:
            decode_image(sample.image, uri=uri)
            return number, uri, sample
        image = decode_image(sample.image, uri=uri, min_side=round(resize * _MARGIN))
    except ImageDecodeError as error:
        return number, uri, error.reason
    short = min(image.size)
    if short <= resize:
        return number, uri, sample
    size = (round(image.width * resize / short), round(image.height * resize / short))
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=_QUALITY)
    return number, uri, replace(sample, image=buffer.getvalue(), suffix="jpg")


@dataclass
class _Journal:
    """How far a pack has come: complete shards, and the records that they used up."""

    folder: Path
    prefix: str
    settings: dict[str, Any]
    shards: list[ShardInfo] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # uri, reason
    taken: int = 0  # records
    _done: int = 0  # records that need not be read again
    _expected: str = ""  # hash over their names
    _hash: Any = field(default_factory=hashlib.sha256)
    _hashes: deque[tuple[int, str]] = field(default_factory=deque)
    _samples: deque[int] = field(default_factory=deque)
    _skips: deque[tuple[int, str, str]] = field(default_factory=deque)

    @property
    def path(self) -> Path:
        """Where it is kept."""
        return self.folder / f".{self.prefix}.packing.json"

    @property
    def skipped_path(self) -> Path:
        """Where the list of what could not be used is written."""
        return self.folder / f"{self.prefix}-skipped.jsonl"

    def load(self) -> None:
        """Takes up what an interrupted call has left; removes the shard that it had begun."""
        if not self.path.is_file():
            return
        saved = json.loads(self.path.read_text(encoding="utf-8"))
        if saved["settings"] != self.settings:
            changed = [
                f"{key} was {saved['settings'].get(key)!r}, is {value!r}"
                for key, value in self.settings.items()
                if saved["settings"].get(key) != value
            ]
            raise DataError(
                f"{self.folder}: holds an unfinished pack with other settings "
                f"({', '.join(changed)}); repeat the same command, or empty the folder"
            )
        self.shards = [ShardInfo(**entry) for entry in saved["shards"]]
        self._done, self._expected = saved["records"], saved["hash"]
        self.skipped = [(uri, reason) for uri, reason in saved["skipped"]]
        names = {info.name for info in self.shards}
        for path in self.folder.glob(f"{glob.escape(self.prefix)}-*.tar*"):
            if path.name not in names:
                path.unlink()
        for info in self.shards:
            shard = self.folder / info.name
            if not shard.is_file() or hash_file(shard) != info.sha256:
                raise DataError(
                    f"{shard}: is not what the unfinished pack has written; empty the folder"
                )

    def follow(self, records: Iterable[Record], advance: Advance) -> Iterator[tuple[int, Record]]:
        """The records that are still to be packed, numbered from the beginning of the source.

        Raises:
            DataError: those that were packed already are no longer the same.
        """
        done = self._done
        for number, record in enumerate(records):
            line = f"{record.uri}\0{record.size_bytes}\0{record.mtime_ns}\n"
            self._hash.update(line.encode("utf-8", "surrogateescape"))
            self.taken = number + 1
            advance()
            if number < done:
                if self.taken == done and self._hash.hexdigest() != self._expected:
                    raise self._changed()
                continue
            self._hashes.append((number, self._hash.hexdigest()))
            yield number, record
        if self.taken < done:
            raise self._changed()

    def _changed(self) -> DataError:
        return DataError(
            f"{self.settings['source']}: has changed since the pack into {self.folder} was "
            "interrupted; empty that folder and start again"
        )

    def sample(self, number: int) -> None:
        """Record ``number`` has become a sample."""
        self._samples.append(number)

    def skip(self, number: int, uri: str, reason: str) -> None:
        """Record ``number`` could not be used."""
        self._skips.append((number, uri, reason))

    def shard_done(self, info: ShardInfo) -> None:
        """A shard is complete: its samples are the oldest ones of those noted."""
        self.shards.append(info)
        for _ in range(info.num_samples):
            last = self._samples.popleft()
        while self._hashes and self._hashes[0][0] <= last:
            _, digest = self._hashes.popleft()
        while self._skips and self._skips[0][0] < last:
            self.skipped.append(self._skips.popleft()[1:])
        self._done, self._expected = last + 1, digest
        self.save()

    def save(self) -> None:
        """Writes it down, whole or not at all."""
        document = {
            "settings": self.settings,
            "records": self._done,
            "hash": self._expected,
            "skipped": self.skipped,
            "shards": [vars(shard) for shard in self.shards],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".partial")
        unfinished.write_text(json.dumps(document), encoding="utf-8")
        unfinished.replace(self.path)

    def finish(self) -> None:
        """The source is used up: what was skipped after the last sample counts too."""
        self.skipped += [(uri, reason) for _, uri, reason in self._skips]
        self._skips.clear()

    def list_skipped(self) -> None:
        """Writes the list of what could not be used, if there is anything."""
        lines = [
            json.dumps({"uri": uri, "reason": reason}, ensure_ascii=False) + "\n"
            for uri, reason in self.skipped
        ]
        if lines:
            self.skipped_path.write_text(
                "".join(lines), encoding="utf-8", errors="backslashreplace"
            )
