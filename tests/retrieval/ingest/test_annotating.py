"""Metadata that is written to items afterwards, and how it lives with what sources give."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from clipsys.errors import CollectionError, DataError
from clipsys.retrieval import Collection
from clipsys.retrieval.ingest import annotating
from clipsys.retrieval.ingest.texts import Texts, merge
from clipsys.retrieval.storage.segments import SegmentReader
from clipsys.retrieval.storage.sources import Claim
from tests.retrieval.colours import COLOURS, ColourEncoder, paint, paint_folder

ROOT = Path(__file__).parents[3]


@pytest.fixture
def indexed(collection: Collection, photos: Path) -> Collection:
    collection.add(photos, show_progress=False)
    collection.annotate({n: {"kind": "odd" if n % 2 else "even", "p": n / 10} for n in range(1, 7)})
    return collection


def kinds(collection: Collection) -> list[Any]:
    return [item.metadata.get("kind") for item in collection.items()]


def test_written_values_can_be_filtered_and_sorted_by(indexed: Collection) -> None:
    assert indexed.select("kind=odd") == [1, 3, 5]
    assert indexed.select(["kind=even", "p>=0.4"]) == [4, 6]
    assert [hit.id for hit in indexed.search(where="kind=odd", sort="-p")] == [5, 3, 1]
    assert indexed.metadata_keys() == indexed.annotations() == ["kind", "p"]
    assert indexed.explain_filter("kind=Odd") is not None
    assert indexed.verify() == []


def test_values_of_any_kind_are_entered_as_the_triggers_would(collection: Collection) -> None:
    """Against the index that is made of the items anew, over random changes."""
    folder = paint_folder(collection.path.parent / "many", num_images=12)
    collection.add(folder, show_progress=False)
    values = [1, 1.0, "1", True, None, "", "x" * 300, ["a", "b", "a"], {"b": [1]}, "größe", -2.5]
    generator = random.Random(0)
    expected: dict[int, dict[str, Any]] = {n: {} for n in range(1, 13)}
    for _ in range(40):
        given = {
            number: {
                key: generator.choice(values)
                for key in generator.sample(["a", "b c", 'q"'], generator.randrange(3))
            }
            for number in generator.sample(range(1, 14), 5)
        }
        assert collection.annotate(given) == len(given.keys() - {13})
        for number, keys in given.items():
            for key, value in keys.items():
                if number in expected and value is not None:
                    expected[number][key] = value
                elif number in expected:
                    expected[number].pop(key, None)
        assert collection.verify() == []
    assert {item.id: item.metadata for item in collection.items()} == expected


def test_batches_are_taken_from_a_stream(
    indexed: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(annotating, "BATCH_ITEMS", 2)
    assert indexed.annotate((n, {"kind": f"{n}"}) for n in (6, 1, 99, 2, -5, 3)) == 4
    assert kinds(indexed) == ["1", "2", "3", "even", "odd", "6"]
    indexed.remove([1])
    assert indexed.annotate({1: {"kind": "x"}}) == 0


def test_a_later_index_keeps_what_no_source_gives(indexed: Collection, photos: Path) -> None:
    before = kinds(indexed)
    (photos / "red.txt").write_text("another caption", encoding="utf-8")
    (photos / "blue.json").write_text('{"year": 2001}', encoding="utf-8")
    os.utime(photos / "green.png", ns=(1, 1))
    assert indexed.add(photos, show_progress=False).updated == 3
    indexed.add(photos, show_progress=False)
    table = photos / "t.csv"
    table.write_text(f"path,tag\n{photos / 'red.png'},wool\n", encoding="utf-8")
    indexed.add(table, photos, show_progress=False)
    table.write_text(f"path\n{photos / 'blue.png'}\n", encoding="utf-8")
    indexed.add(show_progress=False)
    indexed.forget_source(table)
    assert kinds(indexed) == before
    assert indexed.verify() == []


def test_moved_files_and_renamed_sources_keep_it(indexed: Collection, photos: Path) -> None:
    before = kinds(indexed)
    (photos / "sub").mkdir()
    (photos / "red.png").rename(photos / "sub" / "red.png")
    assert indexed.add(photos, show_progress=False).moved == 1
    assert kinds(indexed) == before
    photos.rename(photos.with_name("elsewhere"))
    indexed.rename_source(photos, photos.with_name("elsewhere"))
    indexed.add(show_progress=False)
    assert kinds(indexed) == before


def test_what_describes_an_image_goes_when_that_changes(indexed: Collection, photos: Path) -> None:
    indexed.annotate(((n, {"stars": n}) for n in range(1, 7)), of_image=False)
    indexed.annotate(((n, {"kind": "dog"}) for n in range(1, 7)), of_image=True)
    uri = indexed.item(1).uri
    paint(Path(uri), "yellow", mark=3)
    assert indexed.add(photos, show_progress=False).changed == 1
    (changed,) = (item for item in indexed.items() if item.uri == uri)
    assert (changed.metadata.get("kind"), changed.metadata["stars"]) == (None, 1)
    assert indexed.select("kind is missing") == [changed.id]


@pytest.mark.parametrize("way", ["compact", "migrate", "repair"])
def test_upkeep_keeps_it(
    indexed: Collection, photos: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    indexed.remove([2])
    before = kinds(indexed)
    encoder = ColourEncoder(seed=1) if way == "migrate" else ColourEncoder()
    if way == "compact":
        indexed.compact()
    elif way == "migrate":
        indexed.migrate(encoder, show_progress=False)
    else:
        (segment,) = indexed.path.glob("segments/*.npy")
        segment.write_bytes(b"damaged")
    with Collection.open(indexed.path, encoder, to_repair=True) as opened:
        if way == "repair":
            assert opened.repair().requeued == 5
            paint(photos / "late.png", "red", mark=5)
            before = [*before[:3], None, *before[3:]]  # in the order of the names
            opened.remove(opened.select("kind=none") or [2])
        opened.add(photos, show_progress=False)
        found = {Path(item.uri).stem: item.metadata.get("kind") for item in opened.items()}
        assert opened.verify() == []
        assert opened.annotations() == ["kind", "p"]
    assert found.pop("late", None) is None
    assert sorted(map(str, found.values())).count("odd") == 3


def test_a_key_of_a_source_is_refused_with_its_name(indexed: Collection, photos: Path) -> None:
    table = photos.with_name("t.csv")
    table.write_text(f"path,year\n{photos / 'red.png'},2001\n", encoding="utf-8")
    indexed.add(table, show_progress=False)
    with pytest.raises(DataError, match=f"year: is metadata that {table} gives") as caught:
        indexed.annotate({1: {"fine": 1, "year": 5}})
    assert "\n" not in str(caught.value)
    assert "fine" not in indexed.metadata_keys(), "nothing is written of a batch that is refused"
    for key in ("uri", "caption", "", " a"):
        with pytest.raises(DataError):
            indexed.annotate({1: {key: 1}})


def test_a_source_that_gives_a_written_key_has_it_from_then_on(
    indexed: Collection, photos: Path
) -> None:
    red = next(item for item in indexed.items() if item.uri.endswith("red.png"))
    (photos / "red.json").write_text('{"kind": "of the file"}', encoding="utf-8")
    for _ in range(2):
        indexed.add(photos, show_progress=False)
        assert indexed.item(red.id).metadata["kind"] == "of the file"
    assert len(indexed.select("kind is present")) == 6, "the others keep theirs"
    with pytest.raises(DataError, match=f"kind: is metadata that {photos} gives"):
        indexed.annotate({1: {"kind": "x"}})
    (photos / "red.json").unlink()
    indexed.add(photos, show_progress=False)
    assert "kind" not in indexed.item(red.id).metadata
    assert indexed.annotate({red.id: {"kind": "again"}}) == 1
    indexed.add(photos, show_progress=False)
    assert indexed.item(red.id).metadata["kind"] == "again"


def test_a_forgotten_key_is_gone_and_may_come_from_a_source(
    indexed: Collection, photos: Path
) -> None:
    (photos / "red.json").write_text('{"kind": "of the file"}', encoding="utf-8")
    indexed.add(photos, show_progress=False)
    assert indexed.forget_annotation("kind") == 5
    assert indexed.annotations() == ["p"]
    assert [kind for kind in kinds(indexed) if kind] == ["of the file"]
    assert indexed.verify() == []
    with pytest.raises(DataError, match=f"kind: was not written .*{photos} gives it"):
        indexed.forget_annotation("kind")
    with pytest.raises(DataError, match="written are p"):
        indexed.forget_annotation("nothing")


def test_a_retried_failure_does_not_bring_an_old_value_back(
    indexed: Collection, photos: Path
) -> None:
    first = indexed.item(1)
    data = Path(first.uri).read_bytes()
    Path(first.uri).write_bytes(b"broken")
    assert indexed.add(photos, show_progress=False).failed == 1
    indexed.annotate({1: {"kind": "new"}})
    indexed.forget_annotation("p")
    Path(first.uri).write_bytes(data)
    indexed.retry_failures(show_progress=False)
    found = {item.uri: item.metadata for item in indexed.items()}
    assert found[first.uri] == {"kind": "new"}


def test_random_changes_of_sources_and_annotations() -> None:
    """Whose the key ``k`` is, followed by hand."""
    generator = random.Random(1)
    for _ in range(300):
        origins: dict[str, Claim | None] = {}
        item, holder = Texts(), ""
        for step in range(14):
            source = generator.choice("abc#")
            if source == "#":  # an annotation, refused while a source holds the key
                if holder in ("", "#"):
                    item, holder = Texts(item.captions, {**item.metadata, "k": f"#{step}"}), "#"
                    value = f"#{step}"
                continue
            keys = {key: source + str(step) for key in "xk" if generator.random() < 0.4}
            fills = generator.random() < 0.3
            item, claims = merge(
                Texts((), keys), item, source, origins, fills=fills, annotated={"k"}
            )
            origins.setdefault(source, None)
            origins.update(claims)
            if "k" in keys and not (fills and holder not in ("", "#", source)):
                holder, value = source, keys["k"]
            elif "k" not in keys and holder == source:
                holder = ""
            assert item.metadata.get("k") == (value if holder else None)


KILLED = """
import sys, time
from pathlib import Path
from clipsys.retrieval import Collection
from clipsys.retrieval.ingest import annotating
from tests.retrieval.colours import ColourEncoder
annotating.BATCH_ITEMS = 3
def values(photos):
    for item in list(photos.items()):
        yield item.id, {"kind": sys.argv[2], "p": 0.5}
        print(item.id, flush=True)
with Collection.open(Path(sys.argv[1]), ColourEncoder()) as photos:
    while True:
        photos.annotate(values(photos))
"""


def test_a_killed_process_leaves_whole_batches(collection: Collection, tmp_path: Path) -> None:
    collection.add(paint_folder(tmp_path / "many", num_images=60), show_progress=False)
    collection.annotate({n: {"kind": "0", "p": 0.5} for n in range(1, 61)})
    command = [sys.executable, "-c", KILLED, str(collection.path)]
    for number in (1, 2):
        with subprocess.Popen(
            [*command, str(number)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(17 * number)]
            process.send_signal(signal.SIGKILL)
        assert lines[-1]
        found = kinds(collection)
        assert collection.verify() == []
        # Fifteen and thirty-three at least were committed, in whole batches from the first id on.
        assert all(
            found[start : start + 3] == [found[start]] * 3 and found[start] is not None
            for start in range(0, 60, 3)
        )
        assert found[: 15 * number] == [str(number)] * 15 * number
    assert collection.annotate({n: {"kind": "last"} for n in range(1, 61)}) == 60
    assert set(kinds(collection)) == {"last"}


def test_readers_see_each_batch_whole(collection: Collection, tmp_path: Path) -> None:
    collection.add(paint_folder(tmp_path / "many", num_images=30), show_progress=False)
    collection.annotate({n: {"kind": "a"} for n in range(1, 31)})
    stop, problems = threading.Event(), list[object]()

    def read() -> None:
        with Collection.open(collection.path, ColourEncoder()) as reader:
            while not stop.is_set():
                counts = [len(reader.search(where=f"kind={kind}", k=100)) for kind in "ab"]
                if not {*counts} & {0, 30} or len(reader.select("kind in a,b")) != 30:
                    problems.append(counts)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for kind in itertools.islice(itertools.cycle("ba"), 30):
        collection.annotate({n: {"kind": kind} for n in range(1, 31)})
    stop.set()
    for thread in threads:
        thread.join()
    assert problems == []


def test_only_one_writes(indexed: Collection) -> None:
    with (
        indexed._writing(),
        Collection.open(indexed.path, ColourEncoder()) as other,
        pytest.raises(CollectionError, match="another"),
    ):
        other.annotate({1: {"kind": "x"}})


def test_a_collection_of_before_annotations_gets_their_table(indexed: Collection) -> None:
    indexed.forget_annotation("kind")
    with indexed._store.changing() as (connection, _):
        connection.execute("DROP TABLE annotations")
    with Collection.open(indexed.path, ColourEncoder()) as opened:
        assert opened.annotations() == []
        opened.annotate({1: {"kind": "x"}})
        assert opened.annotations() == ["kind"]


def test_stored_vectors_are_those_of_the_items(
    indexed: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    indexed.remove([3])
    blocks = list(indexed.stored_vectors(block=2))
    assert [len(items) for items, _ in blocks] == [2, 2, 1]
    for items, vectors_BD in blocks:
        assert vectors_BD.shape == (len(items), indexed.encoder_pin.dim)
        for item, vector_D in zip(items, vectors_BD, strict=True):
            assert vector_D @ indexed.vector(item.id) == pytest.approx(1, abs=1e-3)
    assert [i.id for items, _ in indexed.stored_vectors("kind=even") for i in items] == [2, 4, 6]
    stream = indexed.stored_vectors(block=2)
    next(stream)
    indexed.remove([5])
    indexed.compact()
    monkeypatch.setattr(SegmentReader, "_open", {}, raising=False)
    assert [item.id for items, _ in stream for item in items] == [4, 6], "what went is left out"


def test_the_metadata_of_items_stay_in_one_form(indexed: Collection) -> None:
    """A migration compares them as text."""
    indexed.annotate({1: {"a": "größe", "kind": 1}})
    ((text,),) = indexed._store.read("SELECT metadata FROM items WHERE id = 1")
    assert text == json.dumps(json.loads(text), sort_keys=True, ensure_ascii=False)
    assert set(COLOURS) <= {Path(item.uri).stem for item in indexed.items()}
