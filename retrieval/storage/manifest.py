"""The manifest: which model a collection belongs to, and which index generation is current.

It is one small JSON file, replaced atomically, so a reader sees the old or the new one and never a
mixture. Item data is not here: that is the database's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clipsys.errors import CollectionError
from clipsys.retrieval.storage import durable

#: Kinds of index: `clipsys.retrieval.indexes.planning` says which is for what.
Kind = Literal["flat", "hnsw", "ivf-flat", "ivf-sq8", "ivf-pq", "ivf-rabitq"]

FILE_NAME = "manifest.json"


class EncoderPin(BaseModel):
    """The encoder that made the vectors; no other is accepted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="what people call the model")
    model: str = Field(description="what `clipsys.load` takes; an absolute path for a folder")
    fingerprint: str = Field(description="covers weights, preprocessing and tokenizer")
    dim: int = Field(gt=0, description="embedding width")

    def makes_same_vectors(self, other: EncoderPin) -> bool:
        """Whether vectors of both can be compared: the same weights, wherever they lie."""
        return (self.fingerprint, self.dim) == (other.fingerprint, other.dim)


class SearchEffort(BaseModel):
    """How hard a tuned index looks: what was found to reach the recall, and the recall found."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_probes: int = Field(ge=1, description="lists visited, or HNSW's efSearch")
    num_candidates: int = Field(ge=10, description="scored again exactly where 10 are wanted")
    recall: dict[str, float] = Field(
        description="recall@10 against exact search on held-out queries, by kind of query"
    )
    num_queries: int = Field(ge=1, description="held-out queries of each kind")


class IndexGeneration(BaseModel):
    """One published index file and what it covers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    generation: int = Field(ge=1)
    kind: Kind
    file: str = Field(description="name inside the collection's indexes folder")
    sha256: str
    num_items: int = Field(ge=0, description="vectors in the index")
    last_id: int = Field(ge=0, description="every item with an id up to this one was considered")
    num_trained: int = Field(default=0, ge=0, description="items that its lists were made for")
    num_lists: int = Field(default=0, ge=0, description="lists of an inverted file")
    effort: SearchEffort | None = Field(default=None, description="None: the index is exact")


class Manifest(BaseModel):
    """The content of ``manifest.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["clipsys-collection"] = "clipsys-collection"
    schema_version: Literal[1] = 1
    collection_id: str
    created_at: str = Field(description="ISO 8601, UTC")
    encoder: EncoderPin
    edition: str = Field(
        default="",
        pattern=r"^(edition-\d+)?$",
        description="folder of database, segments and indexes; empty: the collection's own",
    )
    index: IndexGeneration | None = None
    superseded: tuple[str, ...] = Field(
        default=(), description="files and folders of the edition before; deleted after a grace"
    )
    superseded_at: float = Field(default=0.0, description="seconds since 1970")


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks a collection's manifest.

    Raises:
        CollectionError: there is no collection here, or its manifest is damaged or of another
            version.
    """
    path = folder / FILE_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        remedy = "create it with `clipsys index`" if not folder.exists() else "check the path"
        raise CollectionError(f"{folder}: there is no collection here; {remedy}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CollectionError(f"{path}: cannot be read ({error})") from error
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise CollectionError(
            f"{path}: not a manifest of this version ({place}: {first['msg']}); restore it from a "
            "backup, or use the clipsys version that wrote it"
        ) from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Swaps the manifest atomically and durably.

    Raises:
        CollectionError: the disk refuses it; the manifest before stays.
    """
    text = manifest.model_dump_json(indent=2) + "\n"
    try:
        durable.replace(folder / FILE_NAME, text.encode("utf-8"))
    except OSError as error:
        raise CollectionError(
            f"{folder / FILE_NAME}: cannot be written ({error.strerror}); free some space and run "
            "the same command again"
        ) from error
