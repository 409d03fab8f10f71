"""Ctrl-C and SIGTERM: what is committed stays, it ends at once, and says how to go on."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

import clipsys
from clipsys.cli import main
from clipsys.errors import CollectionError, DataError
from clipsys.processes.interruption import Interruption, ending_in_order
from clipsys.retrieval import Collection
from clipsys.retrieval.indexes import building
from clipsys.retrieval.ingest import pending
from tests.retrieval.colours import ColourEncoder, paint_folder


class SendsItself(ColourEncoder):
    """Sends a signal to its own process after so many images."""

    def __init__(self, number: signal.Signals, after: int) -> None:
        super().__init__()
        self._number, self._after = number, after

    def encode_pixels(self, pixels_BCHW):  # type: ignore[no-untyped-def]
        if self.num_encoded >= self._after:
            os.kill(os.getpid(), self._number)
        return super().encode_pixels(pixels_BCHW)


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pending, "COMMIT_INTERVAL_S", 0.0)
    return paint_folder(tmp_path / "many", num_images=30)


def index(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        main(["index", *map(str, words)])
    return int(end.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_ending_while_encoding_keeps_what_is_committed_and_makes_no_index(
    tmp_path: Path,
    many: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    status: int,
    word: str,
) -> None:
    monkeypatch.setattr(clipsys, "load", lambda _, **__: SendsItself(number, after=12))
    before = signal.getsignal(signal.SIGTERM)
    command = [tmp_path / "c", many, "--model", "0", "--batch-size", "4"]
    found = index(capsys, *command)
    path = tmp_path / "c"
    said = f"{word}: {path} keeps 12 items; the same command goes on\n"
    assert (found[0], found[1].splitlines(keepends=True)[-1]) == (status, said)
    assert "Traceback" not in found[1]
    assert signal.getsignal(signal.SIGTERM) == before
    with Collection.open(path, ColourEncoder()) as photos:
        assert photos.index is None
        assert len(photos.search("red", k=99)) == len(photos) == 12
        assert photos.verify() == []
    monkeypatch.setattr(clipsys, "load", lambda _, **__: ColourEncoder())
    index(capsys, *command)
    with Collection.open(path) as photos:
        assert len(photos) == 30
        assert photos.index is not None


def test_ending_before_the_first_commit_leaves_no_collection(
    tmp_path: Path, many: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(clipsys, "load", lambda _, **__: SendsItself(signal.SIGINT, after=0))
    status, said = index(capsys, tmp_path / "c", many, "--model", "0")
    assert status == 130
    assert said.endswith(f"interrupted: nothing was added to {tmp_path / 'c'}\n")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("stage", ["_train", "_stream", "tune", "write_manifest"])
def test_ending_while_the_index_is_made_keeps_the_items_and_no_half_of_it(
    tmp_path: Path,
    many: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: str,
) -> None:
    monkeypatch.setattr("clipsys.retrieval.indexes.planning.EXACT_ITEMS", 12)
    monkeypatch.setattr(clipsys, "load", lambda _, **__: ColourEncoder())
    owner = "writing.writer" if stage == "write_manifest" else "indexes.building"

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"clipsys.retrieval.{owner}.{stage}", interrupted)
        status, said = index(capsys, tmp_path / "c", many, "--model", "0")
    assert (status, said.splitlines()[-1].split(":")[0]) == (130, "interrupted")
    assert "keeps 30 items" in said
    with Collection.open(tmp_path / "c", ColourEncoder()) as photos:
        assert photos.index is None
        assert len(photos.search("red", k=99)) == 30
        assert not list((tmp_path / "c" / "indexes").glob(".*"))
    index(capsys, tmp_path / "c", many)
    with Collection.open(tmp_path / "c", ColourEncoder()) as photos:
        assert photos.index is not None
        assert photos.index.kind != "flat"
        assert photos.verify() == []


def test_full_disk_is_said_without_trying_to_make_an_index(
    tmp_path: Path, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Collection.create(tmp_path / "c", ColourEncoder()) as photos:
        monkeypatch.setattr(
            "clipsys.retrieval.writing.writer.write_segment",
            lambda *_: (_ for _ in ()).throw(CollectionError("no room")),
        )
        monkeypatch.setattr(building, "build_planned", pytest.fail)
        with pytest.raises(CollectionError, match="no room"):
            photos.add(many, show_progress=False)


def test_what_a_source_gave_before_it_broke_off_is_indexed(
    tmp_path: Path, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clipsys.retrieval.ingest import adding, sources

    def breaks_off(source, **named):  # type: ignore[no-untyped-def]
        for number, record in enumerate(corpora_iterate(source, **named)):
            if number == 20:
                raise DataError("the shard breaks off")
            yield record

    with Collection.create(tmp_path / "c", ColourEncoder()) as photos:
        corpora_iterate = sources.iterate_source
        monkeypatch.setattr(adding, "count_records", lambda _, **named: None)
        monkeypatch.setattr(sources, "iterate_source", breaks_off)
        with pytest.raises(DataError, match="breaks off"):
            photos.add(many, show_progress=False)
        assert photos.index is not None
        assert photos.index.num_items == len(photos) == 20


def test_work_in_another_thread_is_left_to_the_main_one() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with ending_in_order(lambda: "nothing"):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_interruption_names_the_signal() -> None:
    raised = pytest.raises(Interruption, match="terminated: go on")
    with raised as caught, ending_in_order(lambda: "go on"):
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.status == 143
