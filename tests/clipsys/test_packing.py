from __future__ import annotations

from pathlib import Path

import pytest

from clipsys.errors import DataError
from clipsys.packing import pack
from clipsys.shards import expand_shards, iterate_samples


def test_a_folder_is_packed_with_captions_labels_and_bytes(
    image_folder: Path, tmp_path: Path
) -> None:
    report = pack(image_folder, tmp_path / "out")
    samples = list(iterate_samples(expand_shards(tmp_path / "out")))
    assert sum(info.num_samples for info in report.shards) == len(samples) == 6
    assert [sample.label for sample in samples] == ["cats"] * 3 + ["dogs"] * 3
    assert samples[0].captions == ("picture 1", "number 1")
    assert samples[0].image == (image_folder / "cats" / "1.png").read_bytes()


def test_a_seed_shuffles_and_always_in_the_same_way(image_folder: Path, tmp_path: Path) -> None:
    orders = []
    for name, seed in (("a", 1), ("b", 1), ("c", None)):
        pack(image_folder, tmp_path / name, shuffle_seed=seed)
        samples = iterate_samples(expand_shards(tmp_path / name))
        orders.append([sample.captions[0] for sample in samples])
    assert orders[0] == orders[1] != orders[2]


def test_bad_images_are_counted_and_left_out(image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "cats" / "bad.png").write_bytes(b"nothing")
    (image_folder / "cats" / "empty.jpg").write_bytes(b"")
    report = pack(image_folder, tmp_path / "out")
    assert report.skipped == {"not an image": 1, "empty": 1}
    assert report.shards[0].num_samples == 6


def test_a_source_of_bad_images_only_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "bad.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"none of the 1 images can be used \(1 not an image\)"):
        pack(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))
