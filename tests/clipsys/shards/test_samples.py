"""What is a sample, and what makes one unusable: in every reader alike."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipsys.corpora.packing import pack
from clipsys.corpora.sources import iterate_source
from clipsys.errors import DataError, SampleError
from clipsys.shards.checking import check_shards
from clipsys.shards.random_access import ShardReader, index_shard
from clipsys.shards.reading import iterate_raw, read_image
from clipsys.shards.samples import parse_sample, require_captions, split_name
from tests.conftest import encode_png, noise_image

IMAGE = encode_png(np.asarray(noise_image(1, (16, 16))))


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


#: One sample x of each kind, and the reason why it cannot be used.
HOSTILE: dict[str, tuple[list[tuple[str, bytes]], str]] = {
    "surrogate": ([("x.json", b'{"captions": ["a \\ud800"]}')], "text is not valid Unicode"),
    "surrogate in metadata": ([("x.json", b'{"k": ["\\udfff"]}')], "text is not valid Unicode"),
    "surrogate in bytes": ([("x.json", b'{"k": "\xed\xa0\x80"}')], "metadata is not JSON"),
    "deep": ([("x.json", b"[" * 200_000)], "metadata is not JSON"),
    "rather deep": ([("x.json", b'{"k":' * 99 + b"1" + b"}" * 99)], "metadata is not JSON"),
    "digits": ([("x.json", b'{"k": ' + b"9" * 5000 + b"}")], "metadata is not JSON"),
    "null byte": ([("x.txt", b"a\0b")], "null byte in a text"),
    "null byte in metadata": ([("x.json", b'{"k": "\\u0000"}')], "null byte in a text"),
    "list": ([("x.json", b"[1]")], "metadata is not a JSON object"),
    "objects": ([("x.json", _json({"captions": [{"raw": "a"}]}))], "caption is not a text"),
    "truth": ([("x.json", _json({"captions": True}))], "caption is not a text"),
    "lists": ([("x.json", _json({"captions": [["a"]]}))], "caption is not a text"),
    "label": ([("x.cls", b"\xff\x00")], "text is not UTF-8"),
    "latin": ([("x.txt", b"caf\xe9")], "text is not UTF-8"),
    "long": ([("x.txt", b"word " * 5000)], "text is too long"),
    "empty json": ([("x.json", b"")], "metadata is not JSON"),
    "twice": ([("x.txt", b"a"), ("x.txt", b"b")], "two members have the same name"),
    "two dotted": ([("x.a.png", IMAGE), ("x.b.png", IMAGE)], "several images (dots in names)"),
}


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def _sample(key: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", IMAGE), (f"{key}.txt", b"a dog")]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard for each kind, with a good sample before and behind."""
    folder = tmp_path_factory.mktemp("hostile")
    for number, (members, _) in enumerate(HOSTILE.values()):
        dotted = any(name.count(".") > 1 for name, _ in members)
        image = [] if dotted else [("x.png", IMAGE)]
        write_tar(folder / f"{number:02d}.tar", [*_sample("a"), *image, *members, *_sample("b")])
    name = b"x\xff.png".decode("utf-8", "surrogateescape")
    write_tar(folder / "99.tar", [*_sample("a"), (name, IMAGE), *_sample("b")])
    return folder


def _expected() -> Counter[str]:
    return Counter([*(reason for _, reason in HOSTILE.values()), "member name is not UTF-8"])


def test_checking_counts_each_hostile_sample_with_its_reason(hostile: Path) -> None:
    report = check_shards(hostile)
    assert {reason: len(places) for reason, places in report.unusable.items()} == _expected()
    assert report.num_samples == 3 * _expected().total()
    assert report.shard_faults == []


def test_packing_counts_each_hostile_sample_with_its_reason(hostile: Path, tmp_path: Path) -> None:
    report = pack(hostile, tmp_path)
    assert report.skipped == _expected()
    assert sum(info.num_samples for info in report.shards) == 2 * _expected().total()
    assert report.skipped_path is not None
    assert len(report.skipped_path.read_text(encoding="utf-8").splitlines()) == len(HOSTILE) + 1


def test_a_corpus_has_a_failing_record_for_each_hostile_sample(hostile: Path) -> None:
    reasons: Counter[str] = Counter()
    for record in iterate_source(hostile):
        record.uri.encode("utf-8")
        try:
            record.read()
        except SampleError as error:
            reasons[error.reason] += 1
    assert reasons == _expected()


def test_random_access_reads_a_hostile_shard_as_the_stream_does(hostile: Path) -> None:
    for shard in map(str, sorted(hostile.glob("*.tar"))):
        streamed = list(iterate_raw([shard]))
        reader = ShardReader([shard], [3])
        assert [reader.read(0, number) for number in range(3)] == streamed
        reader.close()


def test_damage_of_any_kind_is_an_error_of_ours(tmp_path: Path) -> None:
    """Bytes of a shard are changed at random; headers more often than pixels."""
    members = [*_sample("a"), ("b.png", IMAGE), ("b.json", b'{"captions": ["\\u00e9"], "n": [1]}'),
               ("b.cls", b"7"), ("c" * 150 + ".png", IMAGE), *_sample("d")]  # fmt: skip
    original = write_tar(tmp_path / "a.tar", members).read_bytes()
    dice = random.Random(0)
    path = tmp_path / "fuzzed.tar"
    for _ in range(150):
        data = bytearray(original)
        for _ in range(dice.choice([1, 3, 20])):
            at = dice.randrange(len(data) // 512) * 512 + dice.choice([0, 124, 135, 148, 156, 345])
            width = dice.choice([1, 2, 12])
            data[at : at + width] = dice.randbytes(width)
        path.write_bytes(data[: dice.choice([len(data), dice.randrange(len(data))])])
        _read_in_every_way(path)


def _read_in_every_way(path: Path) -> None:
    try:
        index = index_shard(str(path))
    except DataError:
        index = None
    if index is not None:
        reader = ShardReader([str(path)], [len(index)])
        for number in range(len(index)):
            _parse(lambda number=number: reader.read(0, number))  # type: ignore[misc]
        reader.close()
    for raw in iterate_raw([str(path)], on_error=lambda shard, error: None):
        _parse(lambda raw=raw: raw)  # type: ignore[misc]
        try:
            read_image(str(path), str(raw["__key__"]))
        except DataError:
            continue
    check_shards(path)


def _parse(read: Any) -> None:
    try:
        raw = read()
        require_captions(parse_sample(raw), raw)
    except DataError as error:
        str(error).encode("utf-8")


@pytest.mark.parametrize(
    ("members", "chosen"),
    [
        (["x.depth.png", "x.png"], "x.png"),
        (["x.seg.png"], "x.seg.png"),
        (["x.jpeg", "x.jpg", "x.png"], "x.jpeg"),
        (["x.PNG", "x.png"], "x.PNG"),
        (["x.depth.PNG", "x.JPG"], "x.JPG"),
    ],
)
def test_the_plain_image_goes_before_others(
    tmp_path: Path, members: list[str], chosen: str
) -> None:
    shard = str(write_tar(tmp_path / "a.tar", [(name, name.encode()) for name in members]))
    (raw,) = iterate_raw([shard])
    assert parse_sample(raw).image == chosen.encode() == read_image(shard, "x")


def test_captions_are_read_from_the_key_that_is_named() -> None:
    metadata = {"sentences": [{"raw": "a dog"}, {"raw": ["a", None]}], "alt": {"en": "b"}, "n": 1}
    raw = {"__key__": "a", "jpg": b"x", "txt": b"other", "json": _json(metadata)}
    for key, captions in {
        "sentences.raw": ("a dog", "a"),
        "alt.en": ("b",),
        "n": ("1",),
        "gone.raw": (),
    }.items():
        assert parse_sample(raw, caption_key=key).captions == captions
    with pytest.raises(SampleError, match=r"a caption is \{'raw'"):
        parse_sample(raw, caption_key="sentences")


def test_numbers_that_json_has_no_word_for_are_null() -> None:
    raw = {"__key__": "a", "jpg": b"x", "json": b'{"a": NaN, "b": [-Infinity, 1e999, 2.5]}'}
    assert parse_sample(raw).metadata == {"a": None, "b": [None, None, 2.5]}


def test_members_that_are_not_adjacent_are_named_as_the_cause(tmp_path: Path) -> None:
    members = [("a.png", IMAGE), ("b.png", IMAGE), ("a.txt", b"a"), ("b.txt", b"b"), *_sample("c")]
    shard = str(write_tar(tmp_path / "a.tar", members))
    assert index_shard(shard).repeated == {"a", "b"}
    assert "2 keys occur in several places" in index_shard(shard).warnings(shard)[0]
    reader = ShardReader([shard], [5])
    for number in range(4):
        raw = reader.read(0, number)
        with pytest.raises(SampleError, match="sort the tar by name"):
            require_captions(parse_sample(raw), raw)
    reader.close()
    assert {reason: len(found) for reason, found in check_shards(shard).unusable.items()} == {
        "members are not adjacent": 4
    }
    records = list(iterate_source(shard))
    assert [record.uri.rpartition("#")[2] for record in records] == ["a", "b", "c"]
    with pytest.raises(SampleError, match="sort the tar by name"):
        records[0].read()


def test_names_are_cut_as_webdataset_cuts_them() -> None:
    from webdataset.tariterators import base_plus_ext

    for name in ("a.jpg", "a.b.jpg", "d.e/a.jpg", "d/.a.jpg", "a", "d.e/a", "a.", ".jpg", "a\nb.c"):
        prefix, suffix = base_plus_ext(name)
        assert split_name(name) == ((prefix, suffix) if prefix is not None else None), name
    assert split_name("__meta__/a.jpg") is None
