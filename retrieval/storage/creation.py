"""Making a collection's folder whole or not at all, and unmaking it."""

from __future__ import annotations

import glob
import os
import secrets
import shutil
from pathlib import Path

from clipsys.errors import CollectionError
from clipsys.retrieval.storage import durable
from clipsys.retrieval.storage.manifest import FILE_NAME, Manifest, write_manifest
from clipsys.retrieval.storage.store import FILE_NAME as DATABASE_NAME
from clipsys.retrieval.storage.store import Store

SEGMENTS, INDEXES, LOCK_NAME = "segments", "indexes", "writer.lock"


def create_folder(folder: Path, manifest: Manifest) -> None:
    """Makes an empty collection beside its place and renames it there.

    Raises:
        CollectionError: the place is taken, or cannot be written to.
    """
    check_name(folder)
    if (folder / FILE_NAME).exists():
        raise CollectionError(f"{folder}: there is a collection here already; open it")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CollectionError(
            f"{folder}: is not an empty folder and not a collection; choose another path"
        )
    folder = Path(os.path.realpath(folder))  # a link to an empty folder, or to none yet, stays one
    building = folder.with_name(f".{folder.name}.creating-{secrets.token_hex(4)}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        building.mkdir()
        with durable.writer_lock(building / LOCK_NAME, holder=str(folder)):
            (building / SEGMENTS).mkdir()
            (building / INDEXES).mkdir()
            Store.create(building / DATABASE_NAME).close()
            write_manifest(building, manifest)
            building.rename(folder)  # POSIX: also over an empty folder
        durable.sync_folder(folder.parent)
    except OSError as error:
        raise CollectionError(
            f"{folder}: the collection cannot be made there ({error.strerror})"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def check_name(folder: Path) -> None:
    """Refuses a path that FAISS, which takes text, cannot open.

    Raises:
        CollectionError: it is not UTF-8.
    """
    try:
        str(folder).encode("utf-8")
    except UnicodeEncodeError:
        raise CollectionError(
            f"{folder}: the path of a collection has to be UTF-8 text; name the folder otherwise"
        ) from None


def destroy_folder(folder: Path) -> None:
    """Deletes a collection's folder; called by the one that made it and could not fill it."""
    shutil.rmtree(folder)


def _remove_abandoned(folder: Path) -> None:
    """Deletes what a killed creation of the same folder left; a living one holds its lock."""
    for leftover in folder.parent.glob(f".{glob.escape(folder.name)}.creating-*"):
        try:
            with durable.writer_lock(leftover / LOCK_NAME, holder=str(leftover)):
                shutil.rmtree(leftover, ignore_errors=True)
        except (CollectionError, OSError):
            continue
