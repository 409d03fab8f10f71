"""Where the members of a tar lie, read from its headers alone.

The usual header, or an extended header and a header, is parsed here, ten times faster than by
tarfile; from the first unusual one on (links, GNU's long names, sparse files), tarfile takes over.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

from clipsys.shards.reading import BREAK, TAR_FAULTS
from clipsys.shards.samples import split_name

_BLOCK = tarfile.BLOCKSIZE
#: Extended attributes that leave a regular file one, with its content where it is.
_HARMLESS = frozenset(
    {b"path", b"size", b"mtime", b"atime", b"ctime", b"uid", b"gid", b"uname", b"gname"}
)
#: Extended headers are read whole; a larger one is left to tarfile.
_MAX_EXTENDED_BYTES = 1 << 20
#: A size with more digits than this is no size (2**63 has 19).
_MAX_SIZE_DIGITS = 18


def walk_members(file: io.BufferedReader[io.FileIO]) -> Iterator[tuple[str, str, int, int]]:
    """The key, ending, start and end of each member that belongs to a sample.

    Raises:
        tarfile.ReadError: the tar breaks off.
    """
    size = os.fstat(file.fileno()).st_size

    def read(offset: int, length: int) -> bytes:
        file.seek(offset)
        return file.read(length)

    offset = 0
    while (member := plain_member(read, offset)) is not None:
        start, offset = offset, member.end
        if (parts := split_name(member.name)) is not None:
            yield *parts, start, offset
        if offset > size:
            raise tarfile.ReadError(BREAK)
    header = read(offset, _BLOCK)
    # Every writer closes a tar with blocks of zeros. Without them it broke off between two members.
    if header == bytes(_BLOCK):
        return
    if offset and len(header) < _BLOCK:
        raise tarfile.ReadError(BREAK)
    file.seek(offset)
    yield from _other_members(file, beginning=offset == 0)


def _other_members(
    file: io.BufferedReader[io.FileIO], *, beginning: bool
) -> Iterator[tuple[str, str, int, int]]:
    """`walk_members` from the first unusual header on, by tarfile, which is ten times slower."""
    size = os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
                if member.isreg() and (parts := split_name(member.name)) is not None:
                    end = member.offset_data - -member.size // _BLOCK * _BLOCK
                    yield *parts, member.offset, end
                    if end > size:
                        raise tarfile.ReadError(BREAK)
            # tarfile takes anything that is not a header for the end.
            file.seek(tar.offset)
            if file.read(_BLOCK) != bytes(_BLOCK):
                raise tarfile.ReadError(BREAK)
    except TAR_FAULTS as error:
        if beginning or (isinstance(error, OSError) and not isinstance(error, tarfile.TarError)):
            raise
        raise tarfile.ReadError(BREAK) from error


class Member(NamedTuple):
    """A regular file in a tar.

    Attributes:
        name: with its folders.
        start: offset of its content, in bytes.
        size: size of its content, in bytes.
    """

    name: str
    start: int
    size: int

    @property
    def end(self) -> int:
        """Offset of the header that follows, in bytes."""
        return self.start + self.size + -self.size % _BLOCK


def plain_member(read: Callable[[int, int], bytes], offset: int) -> Member | None:
    """The regular file whose header, or extended header and header, lies at an offset.

    Reads just the fields that matter, much faster than tarfile. None for what is less usual: links,
    GNU's long names, sparse files, damage.

    Args:
        read: gives so many bytes from an offset.
        offset: offset of the header, in bytes.
    """
    header = read(offset, _BLOCK)
    extended: dict[bytes, bytes] = {}
    if header[156:157] == tarfile.XHDTYPE:  # webdataset's own writer has one for each member
        length = _checked_size(header)
        if length is None or length > _MAX_EXTENDED_BYTES:
            return None
        records = _extended(read(offset + _BLOCK, length))
        if records is None:
            return None
        extended = records
        offset += _BLOCK + length + -length % _BLOCK
        header = read(offset, _BLOCK)
    size = _checked_size(header)
    if size is None or header[156:157] not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        return None
    name = _text(header[:100])
    if header[257:263] == b"ustar\0" and header[345] != 0:
        name = f"{_text(header[345:500])}/{name}"
    if b"path" in extended:
        name = extended[b"path"].decode("utf-8", "surrogateescape")
    return Member(name, offset + _BLOCK, int(extended.get(b"size", size)))


def _checked_size(header: bytes) -> int | None:
    """The size that a whole header states; None where it or the checksum is not as usual."""
    if len(header) < _BLOCK:
        return None
    fields = [header[at].strip(b" \0") for at in (slice(124, 136), slice(148, 156))]
    if not all(field and not field.strip(b"01234567") for field in fields):
        return None
    size, checksum = (int(field, 8) for field in fields)
    return size if checksum == sum(header) - sum(header[148:156]) + 8 * ord(" ") else None


def _extended(data: bytes) -> dict[bytes, bytes] | None:
    """The records of a POSIX extended header; None if one of them changes what a member is."""
    records = {}
    while data and data[:1] != b"\0":
        length, _, _ = data.partition(b" ")
        if not _is_number(length) or not 0 < int(length) <= len(data):
            return None
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        if key not in _HARMLESS or (key == b"size" and not _is_number(value)):
            return None
        records[key] = value
        data = data[int(length) :]
    return records


def _is_number(digits: bytes) -> bool:
    return digits.isdigit() and len(digits) <= _MAX_SIZE_DIGITS


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode(tarfile.ENCODING, "surrogateescape")
