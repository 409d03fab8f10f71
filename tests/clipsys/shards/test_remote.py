"""Remote shards, read from a server on this machine that breaks off when it is told to."""

from __future__ import annotations

import multiprocessing
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from clipsys.errors import DataError
from clipsys.shards import remote
from clipsys.shards.manifest import remote_manifest
from clipsys.shards.random_access import ShardReader
from clipsys.shards.reading import iterate_raw
from clipsys.shards.remote import ShardCache
from clipsys.shards.samples import Sample
from clipsys.shards.writing import write_shards
from clipsys.training.data.config import DataConfig
from clipsys.training.data.shard_set import open_shards


class _Server(ThreadingHTTPServer):
    """Serves a folder. ``breaks[name]``: after how many bytes the next answers break off."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.breaks: dict[str, list[int]] = {}
        self.asked: Counter[str] = Counter()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        self.server.asked[name] += 1
        path = self.server.folder / name
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        breaks = self.server.breaks.get(name, [])
        sent = data[: breaks.pop(0)] if breaks else data
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    samples = [Sample(f"{n}", bytes([n]) * 700, "jpg", (f"text {n}",)) for n in range(30)]
    write_shards(samples, tmp_path / "shards", shard_bytes=20_000)
    with _Server(tmp_path / "shards") as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield http
        http.shutdown()


_NAME = "shard-00000.tar"


def _local(server: _Server) -> list[bytes]:
    return [raw["jpg"] for raw in iterate_raw([str(server.folder / _NAME)])]


def test_a_remote_shard_streams_like_a_local_one(server: _Server) -> None:
    assert [raw["jpg"] for raw in iterate_raw([server.url(_NAME)])] == _local(server)
    assert server.asked[_NAME] == 1


@pytest.mark.parametrize("breaks", [[5000], [0, 9000, 3000], [700, 512]])
def test_a_stream_that_breaks_off_goes_on_where_it_was(server: _Server, breaks: list[int]) -> None:
    server.breaks[_NAME] = list(breaks)
    assert [raw["jpg"] for raw in iterate_raw([server.url(_NAME)])] == _local(server)
    assert server.asked[_NAME] == len(breaks) + 1


def test_a_source_that_fails_each_time_is_reported_after_a_few(
    server: _Server, tmp_path: Path
) -> None:
    server.breaks[_NAME] = [5000] * 20
    with pytest.raises(DataError, match="broke off, asked 4 times") as caught:
        list(iterate_raw([server.url(_NAME)]))
    assert "\n" not in str(caught.value) and server.url(_NAME) in str(caught.value)
    assert server.asked[_NAME] == remote.ATTEMPTS
    reader = ShardReader(
        [server.url(_NAME)], [3], cache=ShardCache(tmp_path / "c", limit_bytes=10**9)
    )
    with pytest.raises(DataError, match="asked 4 times"):
        reader.read(0, 0)
    assert not list((tmp_path / "c").glob("*.tar*"))


def test_what_is_not_there_or_not_reachable_is_said(server: _Server) -> None:
    with pytest.raises(DataError, match="the server refuses it"):
        list(iterate_raw([server.url("gone.tar")]))
    with pytest.raises(DataError, match="no connection"):
        list(iterate_raw(["http://127.0.0.1:1/a.tar"]))


def test_manifests_are_read_where_they_are(server: _Server) -> None:
    infos = remote_manifest(server.url("shards.json").rpartition("/")[0])
    assert sum(info.num_samples for info in infos) == 30
    assert remote_manifest(server.url("nowhere")) == []


def test_a_remote_shard_is_fetched_once_and_read_anywhere(server: _Server, tmp_path: Path) -> None:
    server.breaks[_NAME] = [5000]
    expected = _local(server)
    cache = ShardCache(tmp_path / "c", limit_bytes=10**9)
    for _ in range(2):
        reader = ShardReader([server.url(_NAME)], [len(expected)], cache=cache)
        read = [reader.read(0, n)["jpg"] for n in reversed(range(len(expected)))]
        assert read == expected[::-1]
        reader.close()
    assert server.asked[_NAME] == 2  # the one that broke off, and one more


def test_counting_remote_shards_says_what_is_being_fetched(
    server: _Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("clipsys.progress.LINE_INTERVAL_S", 0.0)
    (server.folder / "shards.json").unlink()
    config = DataConfig(train=server.url(_NAME), cache_dir=str(tmp_path / "c"))
    assert open_shards(config).num_samples == len(_local(server))
    said = capsys.readouterr().err
    assert re.search(rf"Counting samples: 0/1 shards.* fetching {_NAME}: \d+ MB", said)
    assert "1/1 shards" in said


def test_the_copies_used_longest_ago_make_room(server: _Server, tmp_path: Path) -> None:
    names = sorted(path.name for path in server.folder.glob("*.tar"))
    assert len(names) >= 3
    size = max((server.folder / name).stat().st_size for name in names)
    cache = ShardCache(tmp_path / "c", limit_bytes=2 * size)
    first = cache.open(server.url(names[0]))
    for name in names[1:3]:
        cache.open(server.url(name)).close()
    assert len(list((tmp_path / "c").glob("*.tar"))) == 2
    # Whoever still reads a copy that has gone reads on.
    assert first.read() == (server.folder / names[0]).read_bytes()
    first.close()
    cache.open(server.url(names[2])).close()
    assert server.asked[names[2]] == 1
    cache.open(server.url(names[0])).close()
    assert server.asked[names[0]] == 2


def _open_shard(arguments: tuple[Path, str]) -> int:
    with ShardCache(arguments[0], limit_bytes=10**9).open(arguments[1]) as file:
        return len(file.read())


def test_processes_share_one_transfer(server: _Server, tmp_path: Path) -> None:
    with multiprocessing.get_context("forkserver").Pool(3) as pool:
        sizes = pool.map(_open_shard, [(tmp_path / "c", server.url(_NAME))] * 6, chunksize=1)
    assert set(sizes) == {(server.folder / _NAME).stat().st_size}
    assert server.asked[_NAME] == 1


class _Bucket(MemoryFileSystem):
    protocol = "s3"
    store: ClassVar[dict[str, Any]] = {}


def test_other_schemes_go_through_fsspec(monkeypatch: pytest.MonkeyPatch, server: _Server) -> None:
    with pytest.raises(DataError, match="s3fs"):
        list(iterate_raw(["s3://bucket/a.tar"]))
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "s3", _Bucket)  # type: ignore[attr-defined]
    _Bucket().pipe("s3://bucket/a.tar", (server.folder / _NAME).read_bytes())
    assert [raw["jpg"] for raw in iterate_raw(["s3://bucket/a.tar"])] == _local(server)
    with pytest.raises(DataError, match="asked 4 times"):
        list(iterate_raw(["s3://bucket/b.tar"]))
