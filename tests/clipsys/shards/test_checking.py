from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from clipsys.shards.checking import check_shards
from clipsys.shards.samples import Sample
from clipsys.shards.writing import write_shards
from tests.clipsys.test_cli import run
from tests.conftest import encode_png, noise_image, write_training_shards


def _image(seed: int) -> bytes:
    return encode_png(np.asarray(noise_image(seed, (16, 16))))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_sound_set_is_found_sound(tmp_path: Path, workers: int) -> None:
    write_training_shards(tmp_path, 20, shard_bytes=20_000)
    report = check_shards(tmp_path, workers=workers)
    assert report.sound
    assert (report.num_samples, report.same_image) == (20, [])
    assert report.num_shards == len(list(tmp_path.glob("*.tar")))


def test_every_kind_of_fault_is_found(tmp_path: Path) -> None:
    samples = [
        Sample("good", _image(0), "png", ("a",)),
        Sample("bad", b"nothing", "png", ("b",)),
        Sample("cut", _image(1)[:-40], "png", ("c",)),
        Sample("silent", _image(2), "png", ()),
        Sample("labelled", _image(3), "png", (), "cat"),
        Sample("again", _image(0), "png", ("a",)),
        Sample("retold", _image(3), "png", ("another text",)),
    ]
    write_shards(samples, tmp_path)
    shard = tmp_path / "shard-00000.tar"
    report = check_shards(tmp_path)
    assert not report.sound
    assert {reason: len(places) for reason, places in report.unusable.items()} == {
        "not an image": 1,
        "truncated": 1,
    }
    assert report.without_text == [f"{shard}#silent"]
    assert report.repeated == [[f"{shard}#good", f"{shard}#again"]]
    assert [sorted(group) for group in report.same_image] == [
        [f"{shard}#labelled", f"{shard}#retold"]
    ]


def test_a_shard_that_is_not_what_its_manifest_says_is_found(tmp_path: Path) -> None:
    write_training_shards(tmp_path, 20, shard_bytes=20_000)
    first, second, *_ = sorted(tmp_path.glob("*.tar"))
    data = bytearray(first.read_bytes())
    data[2000] ^= 1  # inside an image or a text
    first.write_bytes(data)
    second.write_bytes(second.read_bytes().rstrip(b"\0")[:-300])
    faults = "\n".join(check_shards(tmp_path).shard_faults)
    assert f"{first}: its content is not what shards.json says" in faults
    assert f"{second}: the shard is truncated" in faults
    assert "samples, shards.json says" in faults
    second.unlink()
    assert f"{second}: is gone" in "\n".join(check_shards(tmp_path).shard_faults)


def test_the_command_prints_and_ends_with_the_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_training_shards(tmp_path / "s", 6)
    status, out, _ = run("shards", "--verify", str(tmp_path / "s"), capsys=capsys)
    assert (status, out) == (
        0,
        "6 samples in 1 shards\nall images decode, all samples have a text, none occurs twice\n",
    )
    write_shards([Sample("x", b"?", "png", ("y",))], tmp_path / "s", prefix="bad")
    status, out, err = run("shards", "--verify", str(tmp_path / "s"), "--json", capsys=capsys)
    report = json.loads(out)
    assert status == 1 and report["sound"] is False and report["num_samples"] == 7
    assert list(report["unusable"]) == ["not an image"]
    assert "the shards are not sound" in err


def test_the_command_shows_a_few_of_many_repetitions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = [
        Sample(f"{copy}-{number}", encode_png(np.full((2, 2, 3), number, np.uint8)), "png", ("y",))
        for copy in range(2)
        for number in range(8)
    ]
    write_shards(samples, tmp_path)
    _, out, _ = run("shards", "--verify", str(tmp_path), capsys=capsys)
    lines = out.splitlines()
    assert lines[1] == "8 images occur several times with the same text:"
    assert len(lines) == 6
    assert lines[-1].strip() == "and 5 more; --json lists all"


def test_packing_without_a_target_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run("shards", "somewhere", capsys=capsys)
    assert status == 2
    assert "name the folder to write into" in err


def test_texts_without_images_are_sound_unless_others_have_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [Sample(f"{n}", b"", "", ("the same text",), "good") for n in range(3)]
    write_shards(texts, tmp_path / "texts")
    report = check_shards(tmp_path / "texts")
    assert report.sound and len(report.without_image) == report.num_samples == 3
    status, out, _ = run("shards", "--verify", str(tmp_path / "texts"), capsys=capsys)
    assert status == 0 and "all samples are texts without images" in out
    write_shards([*texts, Sample("9", _image(0), "png", ("a",))], tmp_path / "mixed")
    report = check_shards(tmp_path / "mixed")
    assert not report.sound and len(report.without_image) == 3
    status, out, _ = run("shards", "--verify", str(tmp_path / "mixed"), capsys=capsys)
    assert status != 0 and "3 without an image, unlike others" in out


def test_a_sample_with_neither_image_nor_text_is_unusable(tmp_path: Path) -> None:
    write_shards([Sample("1", b"", "", (), "label"), Sample("2", b"", "", ("t",))], tmp_path)
    report = check_shards(tmp_path)
    assert not report.sound and list(report.unusable) == ["no caption"]


def test_a_table_of_texts_is_packed_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "reviews.csv"
    table.write_text("review,stars\ngood,5\nbad,1\n", encoding="utf-8")
    columns = ("--caption-column", "review", "--label-column", "stars")
    words = ("shards", str(table), str(tmp_path / "out"), *columns)
    status, _, err = run(*words, capsys=capsys)
    assert status != 0 and "`clipsys shards --no-images` packs texts alone" in err
    status, _, err = run(*words, "--no-images", "--resize", "64", capsys=capsys)
    assert status != 0 and "does nothing with --no-images" in err
    status, _, err = run(*words, "--no-images", capsys=capsys)
    assert status == 0 and "2 samples in 1 shards" in err
    status, _, err = run("shards", str(tmp_path / "out"), str(tmp_path / "b"), "--no-images",
                         capsys=capsys)  # fmt: skip
    assert status != 0 and "--no-images: for tables only" in err
