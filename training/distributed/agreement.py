"""Proof that all ranks are of one run: the same recipe, the same programs, the same files.

Ranks on several machines, or started from several folders, may differ in what each takes for
granted. The difference would show much later: as a collective that times out, or as weights that
belong to no recipe. So everything that every rank finds for itself is compared before the first
step, and an error names both ranks, what each has and the remedy. A group of one proves nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from clipsys.errors import ClipsysError, TrainingError
from clipsys.training.distributed.collectives import (
    broadcast_object,
    gather_objects,
    on_first_rank,
    rank,
    world_size,
)

T = TypeVar("T")

#: Network file systems show a new file to other machines after a while.
VISIBLE_WITHIN_S = 30.0


def on_every_rank(action: Callable[[], T]) -> T:
    """Runs ``action()``, without collectives inside, on every rank; all raise if any fails.

    Without this an exception on one rank leaves the others waiting in their next collective.

    Raises:
        ClipsysError: this rank's own, or that of the first rank that failed, named as such.
    """
    failure: ClipsysError | None = None
    result: list[T] = []
    try:
        result.append(action())
    except ClipsysError as error:
        failure = error
    found = gather_objects((place(), None if failure is None else str(failure)))
    if failure is not None:
        raise failure
    for where, message in found:
        if message is not None:
            raise TrainingError(f"{where}: {message}")
    return result[0]


def place() -> str:
    """This rank, its machine and its working directory, for messages."""
    return f"rank {rank()} on {socket.gethostname()} (in {Path.cwd()})"


def require_equal(values: Mapping[str, object], *, remedy: str) -> None:
    """Compares what every rank has found for itself.

    Args:
        values: values by name, picklable; the names are the same on every rank.
        remedy: what to do where they differ, as the end of a sentence.

    Raises:
        TrainingError: on every rank; it names the first difference and both ranks.
    """
    if world_size() == 1:
        return
    (first, expected), *others = gather_objects((place(), dict(values)))
    for where, found in others:
        for name, value in expected.items():
            if found[name] != value:
                raise TrainingError(
                    f"{where} has {name} {found[name]}, and {first} has {value}; {remedy}"
                )


def require_same_files(paths: Iterable[str], *, setting: str) -> None:
    """Checks that every rank sees the files that rank 0 has listed, of the same sizes.

    Raises:
        TrainingError: on every rank; it names a file and the rank.
    """
    if world_size() == 1:
        return
    listed = broadcast_object(list(paths))
    sizes = [_size_bytes(path) for path in listed]
    # Sizes travel only where they differ: there may be many thousand shards.
    digest = hashlib.blake2b(repr(sizes).encode(), digest_size=16).hexdigest()
    if len(set(gather_objects(digest))) == 1:
        return
    (_, expected), *others = gather_objects((place(), sizes))
    for where, found in others:
        for path, size, other in zip(listed, expected, found, strict=True):
            if size != other:
                raise TrainingError(
                    f"{setting}: {path} {_described(other)} for {where} and {_described(size)} "
                    "for rank 0; put the data on storage that every machine sees, under the same "
                    "path, or copy all of it to each"
                )


def _size_bytes(path: str) -> int | None:
    try:
        return Path(path).stat().st_size
    except OSError:
        return None


def _described(size_bytes: int | None) -> str:
    return "cannot be read" if size_bytes is None else f"has {size_bytes:,} bytes"


def require_shared(folder: Path, *, wait_s: float = VISIBLE_WITHIN_S) -> None:
    """Proves that every rank reads and writes the same folder; leaves nothing behind.

    Rank 0 writes a file with a random value; every other rank reads it, and answers with a file.

    Raises:
        TrainingError: on every rank; it names both ranks, the folder and the remedy.
    """
    if world_size() == 1:
        return
    token = broadcast_object(secrets.token_hex(16))
    # The folders that are made for the proof go again: a run that is refused leaves none.
    made = on_first_rank(lambda: _write_token(folder, token))
    try:
        fault = _answer(folder, token, wait_s) if rank() else None
        faults = gather_objects((place(), fault))
        unseen = on_first_rank(lambda: _unanswered(folder, token, wait_s, faults))
    finally:
        on_first_rank(lambda: _clean(folder, token, made))
    for where, problem in [*faults, *unseen]:
        if problem is not None:
            raise TrainingError(
                f"{folder}: {where} {problem}, which {faults[0][0]} uses as the run folder; set "
                "output to a folder on storage that every machine sees and may write to, under the "
                "same path"
            )


def _token_path(folder: Path, token: str, number: int) -> Path:
    return folder / f".ranks-{token}-{number}"


def _write_token(folder: Path, token: str) -> list[Path]:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _token_path(folder, token, 0).write_text(token)
    except OSError as error:
        raise TrainingError(
            f"{folder}: {place()} cannot write the run folder ({error.strerror}); set output to "
            "another one"
        ) from error
    return missing


def _answer(folder: Path, token: str, wait_s: float) -> str | None:
    """What is wrong with this rank's view of the folder; None if nothing is."""
    if not _appears(_token_path(folder, token, 0), token, wait_s):
        return "does not see the folder"
    try:
        _token_path(folder, token, rank()).write_text(token)
    except OSError as error:
        return f"cannot write to the folder ({error.strerror})"
    return None


def _unanswered(
    folder: Path, token: str, wait_s: float, faults: list[tuple[str, str | None]]
) -> list[tuple[str, str | None]]:
    return [
        (where, "writes to another folder")
        for number, (where, fault) in enumerate(faults)
        if number and fault is None
        and not _appears(_token_path(folder, token, number), token, wait_s)
    ]  # fmt: skip


def _appears(path: Path, content: str, wait_s: float) -> bool:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            if path.read_text() == content:
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def _clean(folder: Path, token: str, made: list[Path]) -> None:
    for path in folder.glob(f".ranks-{token}-*"):
        path.unlink(missing_ok=True)
    for path in made:
        with contextlib.suppress(OSError):  # another process has put something there
            path.rmdir()
