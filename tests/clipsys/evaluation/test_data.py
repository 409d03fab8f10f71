"""Data sets: each published layout as it is, splits, limits, labels."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipsys.corpora.columns import Columns
from clipsys.corpora.records import Record
from clipsys.errors import ConfigError, DataError
from clipsys.evaluation.data import DataSet, open_data
from tests.conftest import encode_png, noise_image


def _png(number: int) -> bytes:
    return encode_png(np.asarray(noise_image(number, (8, 8))))


def _write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def _write_image_folder(root: Path, classes: Sequence[str], count: int = 2) -> None:
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / f"{number}.png").write_bytes(_png(number))


def _write_parquet(path: Path, rows: dict[str, Any], features: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(rows)
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), path)


def _images(numbers: Sequence[int]) -> list[dict[str, Any]]:
    return [{"bytes": _png(number), "path": None} for number in numbers]


def _labels(data: DataSet) -> list[str | None]:
    return [record.label for record in data.records()]


class TestClipBenchmark:
    """root/{train,test}/N.tar with nshards.txt, class names and templates at the root."""

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        for split, shards in (("train", 1), ("test", 2)):
            for shard in range(shards):
                members = [
                    (f"s{shard}{n:06d}.{ending}", content)
                    for n in range(3)
                    for ending, content in (("webp", _png(n)), ("cls", f"{n}".encode()))
                ]
                _write_tar(tmp_path / split / f"{shard}.tar", members)
            (tmp_path / split / "nshards.txt").write_text(f"{shards}\n")
        (tmp_path / "classnames.txt").write_text("cat\ndog\ncow\n")
        return tmp_path

    def test_the_test_split_is_taken_and_said(
        self, root: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.INFO, "clipsys"):
            data = open_data(root)
        assert "split test of test, train; --split names another" in caplog.text
        assert data.split == "test"
        assert _labels(data) == ["0", "1", "2"] * 2
        assert next(data.records()).read() == _png(0)
        assert root in data.places

    def test_another_split_is_taken_by_name(self, root: Path) -> None:
        assert len(list(open_data(root, split="train").records())) == 3
        assert len(list(open_data(root / "train").records())) == 3

    def test_a_missing_split_is_an_error_that_lists_those_that_exist(self, root: Path) -> None:
        with pytest.raises(DataError, match="no split 'dev'; the splits are test, train"):
            open_data(root, split="dev")

    def test_each_line_of_a_retrieval_set_is_a_caption(self, tmp_path: Path) -> None:
        members = [("s0.jpg", _png(0)), ("s0.txt", b"a dog\na cat\r\n")]
        _write_tar(tmp_path / "test" / "0.tar", members)
        (tmp_path / "dataset_type.txt").write_text("retrieval\n")
        (record,) = open_data(tmp_path).records()
        assert record.captions == ("a dog", "a cat")

    def test_classes_of_a_multilabel_set_are_numbers_in_the_metadata(self, tmp_path: Path) -> None:
        def npy(values: list[float]) -> bytes:
            buffer = io.BytesIO()
            np.save(buffer, np.array(values))
            return buffer.getvalue()

        members = [("s0.webp", _png(0)), ("s0.npy", npy([1, 0, 1]))]
        _write_tar(tmp_path / "test" / "0.tar", members)
        (tmp_path / "dataset_type.txt").write_text("multilabel")
        (record,) = open_data(tmp_path, limit=5).records()
        assert record.metadata == {"labels": [0, 2]}
        _write_tar(tmp_path / "test" / "0.tar", [("s0.webp", _png(0)), ("s0.npy", b"\x93NUMPY")])
        with pytest.raises(DataError, match=r"s0: its \.npy cannot be read as labels"):
            list(open_data(tmp_path).records())

    def test_a_caption_of_other_shards_stays_whole(self, tmp_path: Path) -> None:
        _write_tar(tmp_path / "0.tar", [("s0.jpg", _png(0)), ("s0.txt", b"a dog\non grass")])
        (record,) = open_data(tmp_path).records()
        assert record.captions == ("a dog\non grass",)


class TestHuggingFace:
    """data/SPLIT-00000-of-00002.parquet with structs of bytes and named classes."""

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        features = {"labels": {"_type": "ClassLabel", "names": ["cat", "dog", "cow"]}}
        for part in range(2):
            rows = {"image": _images([part, 2 + part]), "labels": [0, part]}
            name = f"validation-0000{part}-of-00002.parquet"
            _write_parquet(tmp_path / "data" / name, rows, features)
        rows = {"image": _images([9]), "labels": [2]}
        _write_parquet(
            tmp_path / "data" / "train-00000-of-00001-0a1b2c3d4e.parquet", rows, features
        )
        return tmp_path

    def test_parts_of_a_split_are_read_in_order_with_class_names(self, root: Path) -> None:
        data = open_data(root)
        assert data.split == "validation"
        assert _labels(data) == ["cat", "cat", "cat", "dog"]
        assert [record.read() for record in data.records()] == [_png(n) for n in (0, 2, 1, 3)]
        assert data.class_names == ("cat", "dog", "cow")

    def test_a_split_is_found_by_another_word_for_it(self, root: Path) -> None:
        assert len(list(open_data(root, split="val").records())) == 4
        assert _labels(open_data(root, split="train")) == ["cow"]

    def test_folders_of_splits_below_a_configuration_are_found(self, tmp_path: Path) -> None:
        for split, number in (("test", 1), ("train", 2)):
            path = tmp_path / "default" / split / "0000.parquet"
            _write_parquet(path, {"image": _images([number])}, {})
        (record,) = open_data(tmp_path).records()
        assert record.read() == _png(1)

    def test_captions_come_from_lists_and_numbered_columns(self, tmp_path: Path) -> None:
        rows = {
            "image": _images([1]),
            "caption": [["a dog", "a cat"]],
            "caption_1": ["a cow"],
            "sentids": [[1, 2]],
            "split": ["test"],
        }
        _write_parquet(tmp_path / "test.parquet", rows, {})
        (record,) = open_data(tmp_path).records()
        assert record.captions == ("a dog", "a cat", "a cow")
        assert record.metadata == {"sentids": [1, 2], "split": "test"}

    def test_the_label_key_brings_its_class_names(self, tmp_path: Path) -> None:
        features = {
            "fine_label": {"_type": "ClassLabel", "names": ["rose", "oak"]},
            "coarse_label": {"_type": "ClassLabel", "names": ["flower", "tree"]},
        }
        rows = {"img": _images([1]), "fine_label": [1], "coarse_label": [1]}
        _write_parquet(tmp_path / "test.parquet", rows, features)
        assert _labels(open_data(tmp_path)) == [None]
        data = open_data(tmp_path, label_key="coarse_label")
        assert _labels(data) == ["tree"]
        assert data.class_names == ("flower", "tree")
        by_column = open_data(tmp_path, columns=Columns(label="fine_label"))
        assert by_column.class_names == ("rose", "oak")

    def test_several_data_sets_in_one_folder_are_an_error_that_lists_them(
        self, tmp_path: Path
    ) -> None:
        for name in ("en", "de"):
            _write_parquet(tmp_path / name / "x.parquet", {"image": _images([1])}, {})
        with pytest.raises(DataError, match=r"several data sets \(de, en\)"):
            open_data(tmp_path)


class TestFolders:
    def test_splits_of_an_image_folder_are_not_its_classes(self, tmp_path: Path) -> None:
        for split in ("train", "val"):
            _write_image_folder(tmp_path / split, ["cat", "dog"], 1)
        data = open_data(tmp_path)
        assert data.split == "val"
        assert _labels(data) == ["cat", "dog"]
        assert len(list(open_data(tmp_path, split="train").records())) == 2

    def test_a_class_called_train_is_a_class(self, tmp_path: Path) -> None:
        _write_image_folder(tmp_path, ["bus", "train"], 1)
        assert _labels(open_data(tmp_path)) == ["bus", "train"]

    def test_one_folder_is_one_class(self, tmp_path: Path) -> None:
        _write_image_folder(tmp_path, ["cat"], 1)
        assert _labels(open_data(tmp_path)) == ["cat"]

    def test_one_split_is_taken(self, tmp_path: Path) -> None:
        _write_image_folder(tmp_path / "train", ["cat", "dog"], 1)
        assert _labels(open_data(tmp_path)) == ["cat", "dog"]

    def test_splits_none_of_which_is_for_testing_have_to_be_named(self, tmp_path: Path) -> None:
        for split in ("train_a", "train_b"):
            _write_image_folder(tmp_path / split, ["cat"], 1)
        with pytest.raises(DataError, match="train_a, train_b, and none is for testing"):
            open_data(tmp_path)

    def test_shards_are_split_by_the_beginning_of_their_names(self, tmp_path: Path) -> None:
        for name in ("train-000", "train-001", "val-000", "held-out-000"):
            _write_tar(tmp_path / f"{name}.tar", [("a.png", _png(1))])
        assert open_data(tmp_path).split == "val"
        assert len(list(open_data(tmp_path, split="train").records())) == 2
        assert open_data(f"{tmp_path}/*.tar", split="held-out").split == "held-out"


class TestRecords:
    @staticmethod
    def _items(count: int = 6) -> list[Record]:
        return [
            Record(f"/x/{n}.png", lambda: b"", (), None, {"split": "ab"[n % 2], "kind": n // 2})
            for n in range(count)
        ]

    def test_a_metadata_key_is_the_label(self, tmp_path: Path) -> None:
        data = open_data(tmp_path, label_key="kind", records=self._items())
        assert _labels(data) == ["0", "0", "1", "1", "2", "2"]

    def test_an_unknown_label_key_is_an_error_that_lists_the_keys(self, tmp_path: Path) -> None:
        data = open_data(tmp_path, label_key="colour", records=self._items())
        with pytest.raises(DataError, match=r"'colour'.*the keys are kind, split"):
            list(data.records())

    def test_a_metadata_key_tells_the_splits(self, tmp_path: Path) -> None:
        data = open_data(tmp_path, split="b", records=self._items())
        assert [record.uri for record in data.records()] == ["/x/1.png", "/x/3.png", "/x/5.png"]
        data = open_data(tmp_path, split="c", records=self._items())
        with pytest.raises(DataError, match="no split 'c'; the splits are a, b"):
            list(data.records())


class TestLimit:
    def test_a_limit_is_spread_over_the_classes_and_keeps_the_order(self, tmp_path: Path) -> None:
        _write_image_folder(tmp_path, ["cat", "cow", "dog"], 10)
        every = [record.uri for record in open_data(tmp_path).records()]
        data = open_data(tmp_path, limit=9)
        assert set(_labels(data)) == {"cat", "cow", "dog"}
        taken = [record.uri for record in data.records()]
        assert len(taken) == 9
        assert taken == [uri for uri in every if uri in set(taken)]
        smaller = [record.uri for record in open_data(tmp_path, limit=4).records()]
        assert set(smaller) < set(taken)

    def test_a_moved_folder_gives_the_same_images(self, tmp_path: Path) -> None:
        _write_image_folder(tmp_path / "a", ["cat", "dog"], 8)
        before = [Path(record.uri).name for record in open_data(tmp_path / "a", limit=5).records()]
        (tmp_path / "a").rename(tmp_path / "b")
        after = [Path(record.uri).name for record in open_data(tmp_path / "b", limit=5).records()]
        assert before == after

    def test_shards_give_the_part_that_all_their_records_give(self, tmp_path: Path) -> None:
        from clipsys.evaluation.sampling import spread

        for shard in range(3):
            members = [
                (f"k{shard}{n}.{ending}", content)
                for n in range(5)
                for ending, content in (("png", _png(n)), ("txt", f"image {n}".encode()))
            ]
            _write_tar(tmp_path / f"{shard}.tar", members)
        # A key away from its first members: counted there, and unusable.
        _write_tar(tmp_path / "3.tar", [("a.png", b"1"), ("b.png", b"2"), ("a.txt", b"3")])
        for limit in (1, 6, 99):
            plain = spread(open_data(tmp_path).records(), limit, str(tmp_path))
            assert list(open_data(tmp_path, limit=limit).records()) == plain
        broken = next(r for r in open_data(tmp_path, limit=99).records() if r.uri.endswith("#a"))
        with pytest.raises(DataError, match="several places"):
            broken.read()

    def test_a_truncated_shard_is_an_error(self, tmp_path: Path) -> None:
        _write_tar(tmp_path / "0.tar", [("a.png", _png(1)), ("b.png", _png(2))])
        (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:700])
        with pytest.raises(DataError, match="truncated"):
            list(open_data(tmp_path, limit=1).records())

    def test_a_limit_of_none_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="limit is 0"):
            open_data(tmp_path, limit=0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [("", "an empty text"), ("nowhere", "no such folder"), (".", "no images")],
)
def test_what_is_no_data_set_is_an_error(
    spec: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        list(open_data(spec).records())
