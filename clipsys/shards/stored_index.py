"""The index of a shard as a file, so that only one process of a machine reads the shard's headers.

    16 bytes    magic, byte order, length of the header
    header      JSON: what the index is of (path or url, size, time) and what is known besides
    bounds      int64, mapped into memory: the pages are shared by all processes that read them

A file that is damaged, or is not of this shard as it is now, is as good as none.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import sys
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_MAGIC = b"clipidx2" if sys.byteorder == "little" else b"2xdipilc"
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of one local tar lie.

    Attributes:
        bounds: sample i is the bytes ``bounds[2 * i]`` to ``bounds[2 * i + 1]``.
        fault: why the shard ends early, or None; the sample that broke off is not in the index.
        broken_key: the key of that sample, where it is known.
        repeated: keys whose members lie in several places.
        crowded: keys of samples with several images, none of them without further dots.
    """

    bounds: Sequence[int]
    fault: str | None = None
    broken_key: str | None = None
    repeated: frozenset[str] = frozenset()
    crowded: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.bounds) // 2

    def warnings(self, shard: str) -> list[str]:
        """What looks wrong with the names in a shard, one line each."""
        found = []
        if self.repeated:
            key = min(self.repeated)
            found.append(
                f"{shard}: {len(self.repeated)} keys occur in several places (the first is "
                f"{key!r}), and only adjacent members are one sample; sort the tar by name "
                "(tar --sort=name)"
            )
        if self.crowded:
            found.append(
                f"{shard}: {len(self.crowded)} samples have several images (the first is "
                f"{self.crowded[0]!r}): a key ends at the first dot of a name, so names must have "
                "no further dots"
            )
        return found


def load_index(path: Path, shard: str, stamp: tuple[int, int]) -> ShardIndex | None:
    """The stored index, if there is one of just this shard.

    Args:
        path: path of the file.
        shard: path or url.
        stamp: its size and time.
    """
    try:
        with path.open("rb") as file:
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        start = len(_MAGIC) + _LENGTH_BYTES
        if mapped[: len(_MAGIC)] != _MAGIC:
            return None
        end = start + int.from_bytes(mapped[len(_MAGIC) : start], sys.byteorder)
        header = json.loads(bytes(mapped[start:end]))
        content = mapped[end:]
        if [header["shard"], *header["stamp"]] != [shard, *stamp]:
            return None
        if (header["num_bytes"], header["crc32"]) != (len(content), zlib.crc32(content)):
            return None
        return ShardIndex(
            content.cast("q"),
            header["fault"],
            header["broken_key"],
            frozenset(header["repeated"]),
            tuple(header["crowded"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_index(path: Path, shard: str, stamp: tuple[int, int], index: ShardIndex) -> None:
    """Stores an index; without a folder that can be written to, nothing happens."""
    content = array("q", index.bounds).tobytes()
    header = json.dumps(
        {
            "shard": shard,
            "stamp": list(stamp),
            "num_bytes": len(content),
            "crc32": zlib.crc32(content),
            "fault": index.fault,
            "broken_key": index.broken_key,
            "repeated": sorted(index.repeated),
            "crowded": index.crowded,
        }
    ).encode()
    header += b" " * (-len(header) % 8)  # the bounds must be aligned
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(_MAGIC + len(header).to_bytes(_LENGTH_BYTES, sys.byteorder))
            file.write(header + content)
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
