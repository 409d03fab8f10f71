"""What a collection holds, in numbers."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clipsys.retrieval.storage.creation import INDEXES
from clipsys.retrieval.storage.manifest import read_manifest
from clipsys.retrieval.storage.schema import python_text
from clipsys.retrieval.storage.store import Store


@dataclass(frozen=True)
class CollectionInfo:
    """What a collection holds.

    Attributes:
        num_indexed: live and deleted items that the current index generation covers.
        size_bytes: of all files in the folder.
        failures: the ledger's entries by reason.
        sources: where the items came from, by absolute path or address.
        index: what the manifest says of the published generation, its measured recall too.
        searched_on: the CPU or GPUs on which this machine searches that index, and why.
    """

    path: Path
    created_at: str
    model_name: str
    model: str
    fingerprint: str
    dim: int
    num_items: int
    num_deleted: int
    num_failures: int
    num_segments: int
    num_indexed: int
    index_generation: int | None
    size_bytes: int
    failures: dict[str, int]
    sources: tuple[str, ...]
    index: dict[str, Any] | None
    searched_on: str | None

    def to_dict(self) -> dict[str, Any]:
        """As ``clipsys info --json`` prints it."""
        return {**asdict(self), "path": str(self.path)}


def describe(folder: Path, store: Store) -> CollectionInfo:
    """Reads counts, model, index and size."""
    manifest = read_manifest(folder)
    pin, index = manifest.encoder, manifest.index
    return CollectionInfo(
        path=folder,
        created_at=manifest.created_at,
        model_name=pin.name,
        model=pin.model,
        fingerprint=pin.fingerprint,
        dim=pin.dim,
        num_items=store.count_items(),
        num_deleted=store.count_deleted(),
        num_failures=store.count_failures(),
        num_segments=len(store.segments()),
        num_indexed=index.num_items if index else 0,
        index_generation=index.generation if index else None,
        size_bytes=_folder_bytes(folder),
        failures=dict(
            store.read("SELECT reason, count(*) FROM failures GROUP BY reason ORDER BY 2 DESC")
        ),
        sources=tuple(
            python_text(name) for (name,) in store.read("SELECT name FROM sources ORDER BY name")
        ),
        index=index.model_dump(mode="json") if index else None,
        searched_on=_searched_on(folder / manifest.edition / INDEXES / index.file, index.kind)
        if index
        else None,
    )


def _searched_on(path: Path, kind: str) -> str:
    from clipsys.retrieval.indexes.gpu import placement_of  # imports faiss

    return str(placement_of(kind, path.stat().st_size if path.exists() else 0))


def _folder_bytes(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += Path(parent, name).stat().st_size
            except FileNotFoundError:  # a writer swapped it meanwhile
                continue
    return total
