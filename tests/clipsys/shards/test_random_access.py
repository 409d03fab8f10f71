from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest

from clipsys.errors import DataError
from clipsys.shards.random_access import ShardReader, index_shard
from clipsys.shards.reading import iterate_raw
from clipsys.shards.samples import Sample, parse_sample
from clipsys.shards.writing import write_shards

_LONG = "a" * 180  # longer than a plain tar header holds


def _write(
    path: Path, members: list[tuple[str, bytes]], *, mtime: float = 0, **options: Any
) -> str:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.mtime = mtime
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


_MEMBERS = [
    ("0/a.jpg", b"x" * 700),
    ("0/a.txt", b"text of a"),
    ("README", b"no sample"),
    ("__meta__.json", b"{}"),
    ("0/b.d.JPG", b""),
    ("0/c.png", b"y" * 512),
    ("0/c.seg.png", b"z" * 513),
    (f"0/{_LONG}.jpg", b"long"),
    (f"0/{_LONG}.txt", b"text of long"),
    ("0/ü.jpg", b"umlaut"),
]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_samples_read_one_by_one_are_those_that_webdataset_streams(
    tmp_path: Path, form: int
) -> None:
    members = _MEMBERS
    if form == tarfile.USTAR_FORMAT:
        members = [(name, data) for name, data in members if _LONG not in name]
    # A fraction of a second: with PAX each member has an extended header, as webdataset writes.
    shard = _write(tmp_path / "a.tar", members, format=form, mtime=1.5)
    streamed = list(iterate_raw([shard]))
    reader = ShardReader([shard], [len(streamed)])
    assert len(index_shard(shard)) == len(streamed)
    # Backwards: nothing may depend on what was read before.
    for number in reversed(range(len(streamed))):
        assert reader.read(0, number) == streamed[number]
    reader.close()


def test_a_shard_of_our_own_is_read_back(tmp_path: Path) -> None:
    samples = [Sample(f"{n}", bytes([n]) * n * 300, "jpg", (f"text {n}",)) for n in range(1, 9)]
    infos = write_shards(samples, tmp_path, shard_bytes=4000)
    shards = [str(tmp_path / info.name) for info in infos]
    reader = pickle.loads(pickle.dumps(ShardReader(shards, [i.num_samples for i in infos])))
    read = [reader.read(s, n) for s, info in enumerate(infos) for n in range(info.num_samples)]
    assert [raw["jpg"] for raw in read] == [sample.image for sample in samples]
    reader.close()


@pytest.mark.parametrize("lost_bytes", [1025, 1536 + 1, 5000])
def test_the_sample_that_breaks_off_is_not_in_the_index(tmp_path: Path, lost_bytes: int) -> None:
    whole = Path(_write(tmp_path / "a.tar", [(f"{n}.jpg", b"x" * 2000) for n in range(9)]))
    end = len(index_shard(str(whole))) * 2560 + 1024  # the end mark; tarfile pads behind it
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole.read_bytes()[: end - lost_bytes])
    index = index_shard(str(cut))
    assert index.fault is not None and "truncated" in index.fault
    complete = (end - lost_bytes) // 2560
    # Of the last one that is there, more members might have followed.
    assert len(index) in (complete - 1, complete)
    assert index.broken_key == str(len(index))
    raws = list(iterate_raw([str(whole)]))
    reader = ShardReader([str(cut)], [len(index)])
    assert [reader.read(0, n) for n in range(len(index))] == [
        {**raw, "__url__": str(cut)} for raw in raws[: len(index)]
    ]
    reader.close()


def test_damage_in_the_middle_ends_the_shard_with_a_fault(tmp_path: Path) -> None:
    shard = Path(_write(tmp_path / "a.tar", [(f"{n}.jpg", b"x" * 2000) for n in range(9)]))
    data = bytearray(shard.read_bytes())
    data[5 * 2560 : 5 * 2560 + 20] = b"\xff" * 20  # the header of the sixth
    shard.write_bytes(data)
    index = index_shard(str(shard))
    assert index.fault is not None
    assert len(index) == 4


def test_two_members_of_one_name_spoil_their_sample_only(tmp_path: Path) -> None:
    members = [("a.jpg", b"1"), ("a.jpg", b"2"), ("b.jpg", b"3")]
    reader = ShardReader([_write(tmp_path / "a.tar", members)], [2])
    with pytest.raises(DataError, match=r"a\.tar#a: two members have the same name \(jpg\)"):
        parse_sample(reader.read(0, 0))
    assert reader.read(0, 1)["jpg"] == b"3"
    reader.close()


@pytest.mark.parametrize("content", [b"", b"nothing", b"\x1f\x8b" + bytes(600), bytes(10240)])
def test_what_holds_no_sample_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"not a tar file|no samples"):
        index_shard(str(tmp_path / "a.tar"))


def test_a_shard_that_does_not_hold_what_is_stated_is_said(tmp_path: Path) -> None:
    shard = _write(tmp_path / "a.tar", [("a.jpg", b"1")])
    reader = ShardReader([shard], [2])
    for _ in range(2):
        with pytest.raises(DataError, match=r"holds 1 samples, not the 2 .*--manifest"):
            reader.read(0, 0)
    reader.close()


def test_many_shards_keep_few_files_open(tmp_path: Path) -> None:
    shards = [_write(tmp_path / f"{n}.tar", [("a.jpg", bytes([n]))]) for n in range(5)]
    reader = ShardReader(shards, [1] * 5, max_open=2)
    for _ in range(2):
        assert [reader.read(n, 0)["jpg"] for n in range(5)] == [bytes([n]) for n in range(5)]
        assert len(reader._files) == 2
    reader.close()
