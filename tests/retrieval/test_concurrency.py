"""One writer, many readers: in threads, and in other processes."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from clipsys.errors import CollectionError
from clipsys.retrieval import Collection
from clipsys.retrieval.storage.items import Batch, NewItem
from clipsys.retrieval.storage.store import Store
from clipsys.retrieval.writing import compaction
from tests.retrieval.colours import ColourEncoder, paint, paint_folder

ROOT = Path(__file__).parents[2]
BATCH = 7


def torn(collection: Collection) -> dict[str, int]:
    """Folders of which a search sees a part only: each is added and removed in one commit."""
    uris = [hit.uri for hit in collection.search("red", k=100_000)]
    assert len(set(uris)) == len(uris)
    return {k: n for k, n in Counter(Path(u).parent.name for u in uris).items() if n != BATCH}


@pytest.mark.parametrize(
    "seconds", [3.0, pytest.param(30.0, marks=[pytest.mark.slow, pytest.mark.timeout(120)])]
)
def test_sixteen_readers_beside_a_writer_each_see_one_generation(
    collection: Collection, tmp_path: Path, seconds: float
) -> None:
    stop, problems, searches = threading.Event(), list[object](), Counter[int]()
    own = Collection.open(collection.path, ColourEncoder())

    def read(number: int) -> None:
        reader = collection if number % 2 else own  # the writer's own object, and another one
        try:
            while not stop.is_set():
                found = torn(reader)
                if found:
                    problems.append(found)
                searches[number] += 1
        except Exception as error:
            problems.append(repr(error))
            raise

    threads = [threading.Thread(target=read, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    ends = time.monotonic() + seconds
    number = 0
    try:
        # On a busy machine it takes longer until every reader and the writer have done something.
        while (time.monotonic() < ends or number < 5 or len(searches) < 16) and not problems:
            folder = paint_folder(tmp_path / f"m{number}", num_images=BATCH, seed=number)
            collection.add(folder, batch_size=64, show_progress=False)
            if number % 3 == 2:
                gone = f"m{number - 2}"
                items = [i.id for i in collection.items() if Path(i.uri).parent.name == gone]
                collection.remove(items)
            if number % 4 == 3:
                collection.build_index()
            if number % 5 == 4:
                collection.compact()
            number += 1
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        own.close()
    assert problems == []
    assert min(searches.values()) > 0
    assert collection.verify() == []


_HOLD = """
import sys, time
from clipsys.retrieval import Collection
from tests.retrieval.colours import ColourEncoder
class Slow(ColourEncoder):
    def encode_pixels(self, pixels):
        print("writing", flush=True)
        sys.stdin.readline()
        return super().encode_pixels(pixels)
with Collection.open(sys.argv[1], Slow()) as photos:
    photos.add(sys.argv[2], show_progress=False)
print("done", flush=True)
"""


def test_another_process_writes_and_this_one_reads(
    collection: Collection, tmp_path: Path, photos: Path
) -> None:
    collection.add(photos, show_progress=False)
    more = paint_folder(tmp_path / "more", num_images=3)
    command = [sys.executable, "-c", _HOLD, str(collection.path), str(more)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        started = time.monotonic()
        for write in (lambda: collection.remove([1]), collection.compact, collection.repair):
            with pytest.raises(CollectionError, match=rf"another writer \(process {process.pid}\)"):
                write()
        assert time.monotonic() - started < 5, "a second writer waits instead of saying so"
        assert len(collection.search("red", k=99)) == 6
        assert collection.verify() == []
        process.stdin.write("go on\n")
        process.stdin.flush()
        assert process.stdout.readline() == "done\n"
    assert len(collection.search("red", k=99)) == 9


def test_what_add_returned_is_found_by_the_next_search_everywhere(
    collection: Collection, tmp_path: Path
) -> None:
    with Collection.open(collection.path, ColourEncoder()) as other:
        for number in range(5):
            path = paint(tmp_path / f"{number}" / "x.png", "red", mark=number)
            collection.add(path.parent, show_progress=False)
            for reader in (collection, other):
                assert str(path) in {hit.uri for hit in reader.search("red", k=99)}


def test_adding_a_thousand_to_a_big_collection_builds_no_index(
    collection: Collection,
    tmp_path: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    collection.add(photos, show_progress=False)
    store = Store(collection.path / "items.sqlite")
    vector = store.find_vector(next(collection.items()).content_hash)
    many = [NewItem(f"/{n}", "h", 1, 1, (), {}, location=vector) for n in range(20_000)]
    store.commit(Batch(new=many), None)
    store.close()
    collection.build_index()
    generation = collection.info().index_generation

    def unreachable(*_: object, **__: object) -> None:
        raise AssertionError("the index was built again")

    monkeypatch.setattr("clipsys.retrieval.indexes.building.build_index", unreachable)
    monkeypatch.setattr("clipsys.retrieval.indexes.building.extend_index", unreachable)
    folder = tmp_path / "thousand"
    for number in range(999):
        paint(folder / f"{number}.png", (number % 256, number // 256, 9))
    collection.add(folder, show_progress=False)
    assert collection.info().index_generation == generation
    assert collection.info().num_segments < compaction.SEGMENTS_PER_TIER
