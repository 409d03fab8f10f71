from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import pytest

from clipsys.errors import DataError
from clipsys.shards.manifest import read_manifest
from clipsys.shards.random_access import index_shard
from clipsys.shards.reading import (
    expand_shards,
    iterate_raw,
    iterate_samples,
    read_image,
    shard_failure,
)
from clipsys.shards.samples import Sample, parse_sample
from clipsys.shards.writing import write_shards


def _samples(count: int, size: int = 200) -> list[Sample]:
    return [
        Sample(
            f"{n:04d}", bytes([n % 256]) * size, "jpg", (f"one {n}", f"two {n}"), f"c{n}", {"n": n}
        )
        for n in range(count)
    ]


def _tar(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    samples = _samples(25)
    written = write_shards(samples, tmp_path, shard_bytes=20_000)
    assert len(written) > 1
    assert list(iterate_samples(expand_shards(tmp_path))) == samples


def test_the_manifest_counts_and_hashes_what_is_there(tmp_path: Path) -> None:
    import hashlib

    write_shards(_samples(25), tmp_path, shard_bytes=20_000)
    manifest = read_manifest(tmp_path)
    assert sum(info.num_samples for info in manifest) == 25
    for info in manifest:
        data = (tmp_path / info.name).read_bytes()
        assert (info.size_bytes, info.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert len(index_shard(str(tmp_path / info.name))) == info.num_samples


def test_two_prefixes_share_a_manifest(tmp_path: Path) -> None:
    write_shards(_samples(3), tmp_path, prefix="train")
    write_shards(_samples(2), tmp_path, prefix="val")
    assert {info.name: info.num_samples for info in read_manifest(tmp_path)} == {
        "train-00000.tar": 3,
        "val-00000.tar": 2,
    }


def test_the_bytes_depend_on_the_samples_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shards(_samples(5), tmp_path / name)
        os.utime(tmp_path / name)
    assert (tmp_path / "a/shard-00000.tar").read_bytes() == (
        tmp_path / "b/shard-00000.tar"
    ).read_bytes()


def test_an_interrupted_pack_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> object:
        yield from _samples(10)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(broken(), tmp_path, shard_bytes=3_000)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_existing_shards_are_not_overwritten(tmp_path: Path) -> None:
    write_shards(_samples(2), tmp_path)
    with pytest.raises(DataError, match="already has shard-"):
        write_shards(_samples(2), tmp_path)


def test_a_repeated_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the key '0000' occurs twice"):
        write_shards([*_samples(1), *_samples(1)], tmp_path)


def test_txt_caption_comes_first_and_repetitions_go() -> None:
    raw = {"__key__": "a", "jpg": b"x", "txt": b" a dog \n",
           "json": json.dumps({"captions": ["a dog", "a cat"], "year": 2020}).encode()}  # fmt: skip
    sample = parse_sample(raw)
    assert sample.captions == ("a dog", "a cat")
    assert sample.metadata == {"year": 2020}


def test_img2datasets_caption_field_is_understood() -> None:
    raw = {"__key__": "a", "jpg": b"x", "json": b'{"caption": "a dog", "url": "u"}'}
    assert parse_sample(raw).captions == ("a dog",)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"txt": b"a dog"}, "no image among the members"),
        ({"jpg": b"x", "json": b"{"}, "cannot be read"),
        ({"jpg": b"x", "json": b"[1]"}, "not an object"),
        ({"jpg": b"x", "txt": b"\xff\xfe\xff"}, "cannot be read"),
    ],
)
def test_a_bad_sample_names_its_place(members: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=rf"s\.tar#a: .*{message}"):
        parse_sample({"__key__": "a", "__url__": "s.tar", **members})


def test_one_image_is_read_as_the_stream_gives_it(tmp_path: Path) -> None:
    members = {"a/x.y.jpg": b"dotted", "b.txt": b"text", "b.PNG": b"upper", "b.jpg": b"second"}
    shard = _tar(tmp_path / "s.tar", members)
    for sample in iterate_samples([shard]):
        assert read_image(shard, sample.key) == sample.image
    with pytest.raises(DataError, match=r"s\.tar#c: the shard has no such sample any more"):
        read_image(shard, "c")


def test_a_shard_that_was_written_again_is_read_anew(tmp_path: Path) -> None:
    shard = _tar(tmp_path / "s.tar", {"a.jpg": b"old"})
    assert read_image(shard, "a") == b"old"
    _tar(tmp_path / "s.tar", {"0.jpg": b"x" * 20_000, "a.jpg": b"newer"})
    assert read_image(shard, "a") == b"newer"
    Path(shard).unlink()
    with pytest.raises(DataError, match="No such file"):
        read_image(shard, "a")


def test_a_truncated_shard_gives_the_samples_before_the_break(tmp_path: Path) -> None:
    write_shards(_samples(20, 2_000), tmp_path)
    shard = tmp_path / "shard-00000.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    index = index_shard(str(shard))
    assert 0 < len(index) < 20
    assert index.fault is not None and "truncated" in index.fault
    with pytest.raises(DataError, match="truncated"):
        list(iterate_raw([str(shard)]))
    faults: list[str] = []
    given = list(iterate_raw([str(shard)], on_error=lambda name, error: faults.append(name)))
    assert (len(given), faults) == (len(index), [str(shard)])
    assert all({"jpg", "txt"} <= raw.keys() for raw in given)


@pytest.mark.parametrize("data", [b"", b"this is not a tar file" * 100])
def test_what_is_not_a_tar_is_said_so(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.tar"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"bad\.tar: not a tar file"):
        index_shard(str(path))


def test_a_tar_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no samples"):
        index_shard(_tar(tmp_path / "empty.tar", {}))


@pytest.mark.parametrize("url", ["pipe:cat secrets", "file:/etc/passwd", "ftp://host/a.tar"])
def test_urls_that_could_run_or_read_something_are_refused(url: str) -> None:
    with pytest.raises(DataError, match="urls are refused"):
        expand_shards(url)


def test_names_globs_ranges_and_folders_name_the_same_shards(tmp_path: Path) -> None:
    write_shards(_samples(30), tmp_path, shard_bytes=20_000)
    by_folder = expand_shards(tmp_path)
    assert by_folder == expand_shards(str(tmp_path / "*.tar"))
    assert by_folder == expand_shards(by_folder)
    last = len(by_folder) - 1
    assert by_folder == expand_shards(str(tmp_path / f"shard-{{00000..{last:05d}}}.tar"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gone.tar", "there is no such shard"),
        ("*.tar", "no file matches"),
        ("", "no such shard|no .tar files"),
        ("a-{0..2", "unbalanced braces|no such shard"),
    ],
)
def test_a_spec_that_names_nothing_is_an_error(tmp_path: Path, spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        expand_shards(str(tmp_path / spec))


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    (tmp_path / "shards.json").write_text("{")
    with pytest.raises(DataError, match=r"shards\.json: not a shard manifest"):
        read_manifest(tmp_path)


class _Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("exploded"),))


def test_pickles_are_neither_read_nor_taken_for_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bomb = pickle.dumps(_Bomb())
    members = {f"a.{ending}": bomb for ending in ("pyd", "pkl", "pickle", "pth", "npy")}
    (raw,) = iterate_raw([_tar(tmp_path / "bomb.tar", {**members, "a.txt": b"x"})])
    with pytest.raises(DataError, match="no image among the members"):
        parse_sample(raw)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(bomb)  # it would have gone off
    assert (tmp_path / "exploded").exists()


def test_a_range_that_would_fill_the_memory_is_refused_at_once() -> None:
    with pytest.raises(DataError, match="names more than"):
        expand_shards("shards/{0..99999999999}.tar")


@pytest.mark.parametrize("spec", ["*.tar", "", "pipe.tar"])
def test_a_pipe_among_the_shards_is_refused_and_not_waited_for(tmp_path: Path, spec: str) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(DataError, match=r"pipe\.tar: is a pipe or a device, not a shard"):
        expand_shards(tmp_path / spec)


def test_a_folder_with_the_name_of_a_shard_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tar").mkdir()
    with pytest.raises(DataError, match=r"x\.tar: is a folder, not a shard"):
        expand_shards(tmp_path)


def test_a_compressed_shard_is_called_that(tmp_path: Path) -> None:
    shard = tmp_path / "x.tar"
    shard.write_bytes(gzip.compress(bytes(1024)))
    message = shard_failure(str(shard), tarfile.ReadError("invalid header"))
    assert message.startswith(f"{shard}: not a tar file but one that gzip has compressed")
