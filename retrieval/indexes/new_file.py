"""An index file that appears whole under its final name, or not at all."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from clipsys.errors import CollectionError
from clipsys.retrieval.indexes.generation import SUFFIX
from clipsys.retrieval.storage import durable


@dataclass
class NewFile:
    """An index file that is being made: where it is written, its name and its hash afterwards."""

    beside: Path
    name: str
    sha256: str = ""


@contextmanager
def new_file(folder: Path, generation: int) -> Iterator[NewFile]:
    """Makes what is written durable at the end; on an error nothing stays."""
    name = f"{generation:06d}-{secrets.token_hex(4)}{SUFFIX}"
    file = NewFile(folder / f".{name}.new", name)
    try:
        yield file
        file.sha256 = durable.sha256_of(file.beside)
        durable.publish(file.beside, folder / name)
    except (OSError, RuntimeError) as error:  # FAISS raises RuntimeError where it cannot write
        raise CollectionError(
            f"{folder / name}: the index cannot be written ({' '.join(str(error).split())}); "
            "the collection works without it, more slowly"
        ) from error
    finally:
        file.beside.unlink(missing_ok=True)
