from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from clipsys.errors import DataError
from clipsys.shards import random_access
from clipsys.shards.counting import count_shards, stated_counts, write_manifests
from clipsys.shards.manifest import read_manifest
from clipsys.shards.random_access import ShardReader, index_shard
from clipsys.shards.reading import expand_shards
from clipsys.shards.remote import ShardCache
from tests.clipsys.test_cli import run
from tests.conftest import write_training_shards


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", limit_bytes=10**9)


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    write_training_shards(tmp_path / "s", 30, shard_bytes=20_000)
    return expand_shards(tmp_path / "s")


def test_counting_in_processes_counts_what_is_there(shards: list[str], cache: ShardCache) -> None:
    stated = {str(Path(shard)): count for shard, count in stated_counts(shards).items()}
    counted = count_shards(shards * 3, cache)  # enough of them for several processes
    assert {shard: one.num_samples for shard, one in counted.items()} == stated
    Path(shards[0]).write_bytes(b"nothing")
    with pytest.raises(DataError, match="not a tar file"):
        count_shards(shards, cache)


def test_an_index_is_made_once_and_again_after_a_change(
    shards: list[str], cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    make = random_access._make_index
    monkeypatch.setattr(
        random_access, "_make_index", lambda shard, file: made.append(shard) or make(shard, file)
    )
    expected = list(index_shard(shards[0]).bounds)
    made.clear()
    for _ in range(3):  # as workers do, each for itself
        assert list(index_shard(shards[0], cache).bounds) == expected
    reader = ShardReader(shards[:1], [len(expected) // 2], cache=cache)
    assert reader.read(0, 0)["__key__"] == "0000"
    reader.close()
    assert made == [shards[0]]
    status = Path(shards[0]).stat()
    os.utime(shards[0], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    index_shard(shards[0], cache)
    assert len(made) == 2
    # A damaged index is as good as none.
    path = cache.index_path(shards[0])
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert list(index_shard(shards[0], cache).bounds) == expected
    assert len(made) == 3
    assert not list(path.parent.glob("*.lock")) + list(path.parent.glob("*.partial"))


def test_a_cache_that_cannot_be_written_to_is_done_without(
    shards: list[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    blocked = ShardCache(tmp_path / "file" / "cache", limit_bytes=1)
    assert list(index_shard(shards[0], blocked).bounds) == list(index_shard(shards[0]).bounds)


def test_a_manifest_for_existing_shards_is_what_packing_writes(
    shards: list[str], cache: ShardCache
) -> None:
    folder = Path(shards[0]).parent
    packed = read_manifest(folder)
    (folder / "shards.json").unlink()
    report = write_manifests(folder, cache, workers=2)
    assert read_manifest(folder) == packed
    assert (report.num_samples, report.num_kept, report.faults) == (30, 0, ())
    text = (folder / "shards.json").read_bytes()
    assert write_manifests(folder, cache).num_kept == len(shards)
    assert (folder / "shards.json").read_bytes() == text
    # One shard is written again, another is gone.
    Path(shards[1]).write_bytes(Path(shards[0]).read_bytes())
    Path(shards[2]).unlink()
    report = write_manifests(folder, cache)
    assert report.num_kept == len(shards) - 2
    listed = {info.name: info.sha256 for info in read_manifest(folder)}
    assert Path(shards[2]).name not in listed
    assert listed[Path(shards[1]).name] == packed[0].sha256


def test_the_command_lists_sound_shards_and_names_a_broken_one(
    shards: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shards[0]).parent
    (folder / "shards.json").unlink()
    data = Path(shards[0]).read_bytes()
    Path(shards[0]).write_bytes(data[: len(data) // 2])
    status, out, err = run("shards", str(folder), "--manifest", capsys=capsys)
    assert (status, out.strip()) == (1, str(folder / "shards.json"))
    assert f"not listed: {shards[0]}: the shard is truncated" in err
    document = json.loads((folder / "shards.json").read_text())
    assert [one["name"] for one in document["shards"]] == [Path(s).name for s in shards[1:]]


def test_a_manifest_for_remote_shards_is_refused(cache: ShardCache) -> None:
    with pytest.raises(DataError, match=r"is remote; write shards\.json where"):
        write_manifests("https://host/{0..3}.tar", cache)
