"""Every write, fsync, rename and statement fails once: the old state stays, and a second try works.

An operation runs once to count its fault points; then once for each of them, with the fault there,
on a fresh copy of the same collection.
"""

from __future__ import annotations

import errno
import itertools
import os
import resource
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss
import pytest

from clipsys.errors import ClipsysError, CollectionError
from clipsys.retrieval import Collection
from clipsys.retrieval.indexes.generation import SUFFIX
from clipsys.retrieval.ingest import pending
from clipsys.retrieval.maintenance.migration import MigrationOptions
from clipsys.retrieval.storage.items import Batch, NewItem
from clipsys.retrieval.storage.manifest import Kind
from tests.retrieval.clustered import clustered
from tests.retrieval.colours import ColourEncoder, paint_folder


class Faults:
    """Counts fault points, and fails at one of them; at none if ``fail_at`` is None."""

    def __init__(self, fail_at: int | None) -> None:
        self.fail_at = fail_at
        self.points: list[str] = []

    def point(self, name: str) -> bool:
        self.points.append(name)
        return len(self.points) - 1 == self.fail_at


def full(*_: object) -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


@contextmanager
def injected(faults: Faults) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((os, "fsync"), (os, "replace"), (os, "rename")):
            _wrap(patch, faults, owner, name)
        _wrap(patch, faults, os, "pwrite", half=_half_of_the_bytes)
        _wrap(patch, faults, faiss, "write_index", half=_half_an_index)
        real_open, real_connect = Path.open, sqlite3.connect

        def open_path(self: Path, mode: str = "r", *rest: Any, **named: Any) -> Any:
            file = real_open(self, mode, *rest, **named)
            return _File(file, faults) if "x" in mode or "w" in mode else file

        patch.setattr(Path, "open", open_path)
        patch.setattr(
            sqlite3,
            "connect",
            lambda *rest, **named: real_connect(*rest, **named, factory=_connection(faults)),
        )
        yield


def _wrap(
    patch: pytest.MonkeyPatch,
    faults: Faults,
    owner: Any,
    name: str,
    half: Callable[..., object] = lambda *_: None,
) -> None:
    real = getattr(owner, name)

    def wrapped(*rest: Any, **named: Any) -> Any:
        if name == "pwrite" and not isinstance(rest[1], memoryview):
            return real(*rest)  # the number in the lock, which is nobody's data
        if name == "write_index" and not isinstance(rest[1], str):
            return real(*rest)  # to memory
        if faults.point(name):
            half(*rest)
            raise full() if name != "write_index" else RuntimeError("write error")
        return real(*rest, **named)

    patch.setattr(owner, name, wrapped)


_pwrite = os.pwrite


def _half_of_the_bytes(descriptor: int, data: memoryview, offset: int) -> None:
    _pwrite(descriptor, data[: len(data) // 2], offset)


def _half_an_index(_: object, path: str) -> None:
    Path(path).write_bytes(b"IxFI half of it")


class _File:
    def __init__(self, file: Any, faults: Faults) -> None:
        self._file, self._faults = file, faults

    def write(self, data: bytes) -> int:
        if self._faults.point("write"):
            self._file.write(bytes(data)[: len(data) // 2])
            raise full()
        return int(self._file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _connection(faults: Faults) -> type[sqlite3.Connection]:
    class Faulty(sqlite3.Connection):
        def execute(self, statement: str, *rest: Any) -> sqlite3.Cursor:
            verb = statement.split(maxsplit=1)[0]
            if verb in ("INSERT", "UPDATE", "DELETE", "COMMIT") and faults.point(verb):
                raise sqlite3.OperationalError("database or disk is full")
            return super().execute(statement, *rest)

    return Faulty


def _add(photos: Collection, pictures: Path) -> None:
    photos.add(pictures / "more", show_progress=False)


def _prune(photos: Collection, pictures: Path) -> None:
    photos.add(pictures / "first", show_progress=False, prune_vanished=True, prune_limit=1.0)


def _remove(photos: Collection, _: Path) -> None:
    photos.remove([3, 4])


def _compact(photos: Collection, _: Path) -> None:
    photos.compact()


def _rebuild(photos: Collection, _: Path) -> None:
    photos.build_index()


def _migrate(photos: Collection, _: Path) -> None:
    options = MigrationOptions(loss_limit=1.0)
    photos.migrate(ColourEncoder(seed=9), options=options, show_progress=False)


def _annotate(photos: Collection, _: Path) -> None:
    photos.annotate({number: {"kind": "red", "p": number / 10} for number in range(1, 10)})


def _forget(photos: Collection, _: Path) -> None:
    photos.forget_annotation("stars")


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A collection of nine in three segments, one deleted and one image vanished; the pictures."""
    monkeypatch.setattr(pending, "COMMIT_INTERVAL_S", 0.0)
    pictures = tmp_path / "pictures"
    paint_folder(pictures / "first", num_images=9)
    paint_folder(pictures / "more", num_images=5, seed=5)
    with Collection.create(tmp_path / "template", ColourEncoder()) as photos:
        photos.add(pictures / "first", batch_size=3, show_progress=False)
        photos.remove([2])
        photos.annotate({3: {"stars": 1}, 4: {"stars": 2}})
    (pictures / "first" / "0001.png").unlink()
    (pictures / "first" / "0006.png").rename(pictures / "0006.png")
    monkeypatch.setattr(pending, "COMMIT_INTERVAL_S", 1e9)
    return tmp_path / "template", pictures


def state_of(folder: Path) -> tuple[str, list[tuple[object, ...]]]:
    """The model, and items with metadata; everything is verified and searched on the way."""
    for seed in (0, 9):
        try:
            opened = Collection.open(folder, ColourEncoder(seed=seed))
        except CollectionError as error:
            assert "of model" in str(error)
            continue
        with opened:
            assert opened.verify() == []
            items = [(item.id, item.uri, item.metadata) for item in opened.items()]
            found = sorted(hit.id for hit in opened.search("red", k=99))
            assert found == [item_id for item_id, *_ in items]
            return opened.info().model_name, items
    raise AssertionError("the collection is of no known model")


Operation = Callable[[Collection, Path], None]


@pytest.mark.parametrize(
    "operation", [_add, _prune, _remove, _compact, _rebuild, _migrate, _annotate, _forget]
)
def test_fault_anywhere_leaves_the_old_or_the_new_state(
    tmp_path: Path, prepared: tuple[Path, Path], operation: Operation
) -> None:
    check_every_fault(tmp_path, prepared, operation)


@pytest.fixture
def streamed(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Path]:
    """As `prepared`, where the index is of three lists of the kind that is asked for."""
    kind: Kind = request.param
    wishes: list[tuple[Kind, str]] = [(kind, "asked for")]
    monkeypatch.setattr("clipsys.retrieval.indexes.planning._wishes", lambda *_: wishes)
    monkeypatch.setattr("clipsys.retrieval.indexes.planning.num_lists_for", lambda _: 3)
    made: tuple[Path, Path] = request.getfixturevalue("prepared")
    with Collection.open(made[0]) as photos:
        assert photos.index is not None
        assert photos.index.kind == kind
        assert photos.index.num_lists == 3
    return made


@pytest.mark.parametrize(
    ("streamed", "operation"),
    [
        *itertools.product(["ivf-pq", "ivf-sq8", "ivf-rabitq"], [_compact, _rebuild]),
        ("ivf-pq", _migrate),
    ],
    indirect=["streamed"],
)
def test_fault_while_lists_are_written_leaves_the_old_or_the_new_state(
    tmp_path: Path, streamed: tuple[Path, Path], operation: Operation
) -> None:
    points = check_every_fault(tmp_path, streamed, operation)
    assert points.count("pwrite") >= 4  # codes and ids of each list that is not empty


def check_every_fault(
    tmp_path: Path, prepared: tuple[Path, Path], operation: Operation
) -> list[str]:
    """Does what the module says. Returns the fault points that there were."""
    template, pictures = prepared

    def attempt(name: str, fail_at: int | None) -> Faults:
        shutil.copytree(template, tmp_path / name)
        faults = Faults(fail_at)
        with Collection.open(tmp_path / name, ColourEncoder()) as photos, injected(faults):
            # The connection that is open already was made before the faults were put in.
            photos._store = type(photos._store)(photos._store.path)
            photos._view._store = photos._store
            operation(photos, pictures)
        return faults

    before = state_of(template)
    points = attempt("whole", None).points
    after = state_of(tmp_path / "whole")
    assert len(points) >= 3
    for number, point in enumerate(points):
        name = f"fault-{number}-{point}"
        with pytest.raises(ClipsysError, match=r"full|No space|write error"):
            attempt(name, number)
        assert state_of(tmp_path / name) in (before, after), name
        assert list((tmp_path / name).rglob(f".*{SUFFIX}.new")) == [], name
        with Collection.open(tmp_path / name) as again:
            seed = 9 if again.info().model_name == "colours-9" else 0
        if (operation, seed) != (_migrate, 9):
            with Collection.open(tmp_path / name, ColourEncoder(seed=seed)) as photos:
                operation(photos, pictures)
        assert state_of(tmp_path / name)[1] == after[1], name
        shutil.rmtree(tmp_path / name)
    return points


def test_fault_while_it_is_made_leaves_nothing(tmp_path: Path) -> None:
    whole = Faults(None)
    with injected(whole):
        Collection.create(tmp_path / "whole", ColourEncoder()).close()
    for number in range(len(whole.points)):
        folder = tmp_path / "c"
        with pytest.raises(CollectionError), injected(Faults(number)):
            Collection.create(folder, ColourEncoder())
        left = [path.name for path in tmp_path.iterdir() if path.name != "whole"]
        assert left in ([], ["c"])  # renamed, and only its folder's fsync failed
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small tmpfs cannot be mounted here (needs the rights to)")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_full_disk_keeps_what_was_committed_and_goes_on_when_there_is_room(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pending, "COMMIT_INTERVAL_S", 0.0)
    folder = paint_folder(tmp_path / "many", num_images=120)
    encoder = ColourEncoder(dim=512)
    with Collection.create(small_disk / "c", encoder) as photos:
        photos.add(paint_folder(tmp_path / "first", num_images=6, seed=3), show_progress=False)
        ballast = small_disk / "ballast"
        free = shutil.disk_usage(small_disk).free
        ballast.write_bytes(bytes(max(0, free - 60_000)))
        with pytest.raises(ClipsysError, match=r"No space left|full"):
            photos.add(folder, batch_size=4, show_progress=False)
    with Collection.open(small_disk / "c", encoder) as photos:
        assert photos.verify() == []
        committed = len(photos)
        assert 6 <= committed < 126
        assert len(photos.search("red", k=999)) == committed
        ballast.unlink()
        report = photos.add(folder, batch_size=4, show_progress=False)
        assert report.added == 126 - committed
        assert photos.verify() == []


RECALL = 0.5


def with_lists(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Collection:
    """600 vectors of width 64 and an IVF-PQ of them, whose file has some 50 kB."""
    monkeypatch.setattr("clipsys.retrieval.indexes.planning.EXACT_ITEMS", 50)
    photos = Collection.create(folder, ColourEncoder(dim=64))
    new = [NewItem(f"/{n}.jpg", f"{n}", 1, 1, (), {}) for n in range(600)]
    with photos._writing() as writer:
        writer.commit(Batch(new=new), clustered(600, 64))
    photos.build_index(recall=RECALL)
    return photos


def check_refused_build(photos: Collection, message: str) -> None:
    """A build fails; the index of before is in place, is found sound and answers."""
    before = photos.index
    assert before is not None
    assert before.kind == "ivf-pq"
    query_D = clustered(1, 64, seed=3)[0]
    answers = [hit.id for hit in photos.search_vector(query_D)]
    with pytest.raises(CollectionError, match=message):
        photos.build_index(recall=RECALL)
    assert photos.index == before
    assert [path.name for path in (photos.path / "indexes").iterdir()] == [before.file]
    with Collection.open(photos.path, ColourEncoder(dim=64)) as again:
        assert again.verify() == []
        assert [hit.id for hit in again.search_vector(query_D)] == answers


def size_of_index(photos: Collection) -> int:
    assert photos.index is not None
    return (photos.path / "indexes" / photos.index.file).stat().st_size


def test_disk_that_fills_up_under_an_index_keeps_the_one_before(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with with_lists(small_disk / "c", monkeypatch) as photos:
        ballast = small_disk / "ballast"
        size = size_of_index(photos)
        for room in (0, size - 8_000):  # for nothing, for all but some lists
            ballast.unlink(missing_ok=True)
            ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - room))
            check_refused_build(photos, "No space left")
        ballast.unlink()
        photos.build_index(recall=RECALL)
        assert photos.verify() == []


def test_limit_on_the_size_of_files_is_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Needs no rights, so it runs where a disk cannot be mounted.
    with with_lists(tmp_path / "c", monkeypatch) as photos:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        for limit in (size_of_index(photos) // 8, size_of_index(photos) - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            try:
                check_refused_build(photos, "File too large")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        photos.build_index(recall=RECALL)
        assert photos.verify() == []


def test_lock_is_held_where_its_file_takes_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Collection.create(tmp_path / "c", ColourEncoder()) as photos:
        monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(full()))
        refused = pytest.raises(CollectionError, match=r"another writer \(process unknown\)")
        with photos._writing(), Collection.open(photos.path) as other, refused:
            other.remove([1])


def test_lock_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    with Collection.create(tmp_path / "c", ColourEncoder()) as photos:
        (photos.path / "writer.lock").unlink()
        (photos.path / "writer.lock").mkdir()
        with pytest.raises(
            CollectionError, match=r"c: the folder is not writable \(Is a directory\)"
        ):
            photos.remove([1])
