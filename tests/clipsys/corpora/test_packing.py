from __future__ import annotations

import csv
import io
import json
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from clipsys.corpora.columns import Columns
from clipsys.corpora.packing import pack
from clipsys.corpora.sources import iterate_source
from clipsys.errors import ClipsysError, DataError
from clipsys.shards.manifest import read_manifest
from clipsys.shards.random_access import index_shard
from clipsys.shards.reading import expand_shards, iterate_samples
from tests.conftest import noise_image


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
    with pytest.raises(
        DataError, match=r"none of the 1 images can be used \(1 not an image\); .*bad\.png"
    ):
        pack(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Thirty images with captions, two of them bad."""
    root = tmp_path / "many"
    root.mkdir()
    for number in range(30):
        noise_image(number, (60, 80)).save(root / f"{number:02d}.png")
        (root / f"{number:02d}.txt").write_text(f"picture {number}\n")
    (root / "05.png").write_bytes(b"nothing")
    (root / "29.png").write_bytes(b"")
    return root


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_shards_do_not_depend_on_the_number_of_processes(many: Path, tmp_path: Path) -> None:
    for name, workers in (("one", 1), ("three", 3)):
        report = pack(
            many, tmp_path / name, shard_bytes=50_000, shuffle_seed=3, resize=40, workers=workers
        )
        assert report.skipped == {"not an image": 1, "empty": 1}
        assert report.skipped_path is not None
        lines = report.skipped_path.read_text().splitlines()
        assert {(Path(one["uri"]).name, one["reason"]) for one in map(json.loads, lines)} == {
            ("05.png", "not an image"), ("29.png", "empty")
        }  # fmt: skip
    assert _contents(tmp_path / "one") == _contents(tmp_path / "three")
    assert len(_contents(tmp_path / "one")) > 2


_KILLED_PACK = """
import os, signal, sys
from clipsys.corpora import packing

source, out, fatal, when, workers = sys.argv[1:]
shard_done = packing._Journal.shard_done

def mortal(self, info):
    if len(self.shards) == int(fatal) and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    shard_done(self, info)
    if len(self.shards) > int(fatal):
        os.kill(os.getpid(), signal.SIGKILL)

packing._Journal.shard_done = mortal
if __name__ == "__main__":
    packing.pack(source, out, shard_bytes=30_000, shuffle_seed=1, workers=int(workers))
"""


@pytest.mark.parametrize(
    ("fatal", "when", "workers"), [(0, "before", 1), (1, "before", 2), (2, "after", 1)]
)
def test_a_killed_pack_goes_on_and_ends_with_the_same_bytes(
    many: Path, tmp_path: Path, fatal: int, when: str, workers: int
) -> None:
    # Killed between a shard and its entry in the journal, or after the entry.
    script = tmp_path / "killed.py"
    script.write_text(_KILLED_PACK)
    out = tmp_path / "out"
    command = [sys.executable, str(script), str(many), str(out), str(fatal), when, str(workers)]
    killed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list(out.glob("*.tar"))) == fatal + 1
    options = {"shard_bytes": 30_000, "shuffle_seed": 1}
    report = pack(many, out, **options)  # type: ignore[arg-type]
    whole = pack(many, tmp_path / "whole", **options)  # type: ignore[arg-type]
    assert report.resumed == (fatal if when == "before" else fatal + 1)
    assert _contents(out) == _contents(tmp_path / "whole")
    assert (report.shards, report.skipped) == (whole.shards, whole.skipped)


def test_an_unfinished_pack_is_gone_on_with_only_as_it_was(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    script = tmp_path / "killed.py"
    script.write_text(_KILLED_PACK)
    subprocess.run(
        [sys.executable, str(script), str(many), str(out), "1", "after", "1"], check=False
    )
    with pytest.raises(
        DataError, match=r"with other settings \(shuffle_seed was 1, is None, resize was"
    ):
        pack(many, out, shard_bytes=30_000, resize=40)
    (many / "00.txt").write_text("a caption is not looked at")
    noise_image(99).save(many / "0.png")
    with pytest.raises(DataError, match=r"has changed since the pack .* was interrupted"):
        pack(many, out, shard_bytes=30_000, shuffle_seed=1)


def test_resized_images_have_the_asked_side_and_small_ones_their_bytes(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    noise_image(0, (300, 401)).save(source / "large.jpg", quality=90)
    noise_image(1, (64, 100)).save(source / "exact.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    noise_image(2, (200, 100)).save(source / "turned.jpg", exif=turned)
    pack(source, tmp_path / "out", resize=64)
    exact, large, upright = iterate_samples(expand_shards(tmp_path / "out"))
    assert exact.image == (source / "exact.png").read_bytes()
    sizes = [Image.open(io.BytesIO(sample.image)).size for sample in (large, upright)]
    assert sizes == [(86, 64), (128, 64)]
    assert {sample.suffix for sample in (large, upright)} == {"jpg"}


def test_tables_are_packed_with_captions_and_metadata(many: Path, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"path": f"{n:02d}.png", "caption": f"one {n}", "caption_2": f"two {n}", "year": 2000 + n}
        for n in range(4)
    ]
    (many / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (many / "t.tsv").write_text(
        "\n".join("\t".join(map(str, row)) for row in [list(rows[0]), *(r.values() for r in rows)])
    )
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(
            [{**row, "path": None, "jpg": (many / row["path"]).read_bytes()} for row in rows]
        ).drop_columns("path"),
        many / "t.parquet",
        row_group_size=3,
    )
    for name in ("t.jsonl", "t.tsv", "t.parquet"):
        pack(many / name, tmp_path / name)
        samples = list(iterate_samples(expand_shards(tmp_path / name)))
        assert [sample.captions for sample in samples] == [
            (f"one {n}", f"two {n}") for n in range(4)
        ]
        assert [sample.metadata for sample in samples] == [{"year": 2000 + n} for n in range(4)]
        assert samples[2].image == (many / "02.png").read_bytes()


def test_img2datasets_output_is_read_as_it_is(tmp_path: Path) -> None:
    # Its layout: NNNNN.tar with jpg, txt and json members, NNNNN.parquet and NNNNN_stats.json.
    folder = tmp_path / "laion"
    folder.mkdir()
    details = {"caption": "a red square", "url": "https://host/1.jpg", "key": "000000000",
               "status": "success", "width": 8, "height": 8, "sha256": "0" * 64}  # fmt: skip
    image = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(image, "JPEG")
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for suffix, data in (
            ("jpg", image.getvalue()), ("json", json.dumps(details).encode()),
            ("txt", b"a red square"),
        ):  # fmt: skip
            info = tarfile.TarInfo(f"000000000.{suffix}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (folder / "00000_stats.json").write_text("{}")
    (folder / "00000.parquet").write_bytes(b"")
    (record,) = iterate_source(folder)
    assert record.captions == ("a red square",)
    assert record.metadata["url"] == "https://host/1.jpg"
    assert record.read() == image.getvalue()
    assert len(index_shard(str(folder / "00000.tar"))) == 1


def test_shards_are_packed_anew(many: Path, tmp_path: Path) -> None:
    pack(many, tmp_path / "first", shard_bytes=20_000)
    pack(tmp_path / "first", tmp_path / "second", shuffle_seed=5, shard_bytes=60_000)
    first, second = (
        sorted(sample.captions for sample in iterate_samples(expand_shards(tmp_path / name)))
        for name in ("first", "second")
    )
    assert first == second
    assert sum(info.num_samples for info in read_manifest(tmp_path / "second")) == 28


_ROWS = "stars,review,link\n5,It is a good film,http://a\n1,Dull,\n5,It is a good film,\n2,,x\n"


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_a_table_of_texts_is_packed_without_images(kind: str, tmp_path: Path) -> None:
    table = tmp_path / f"reviews.{kind}"
    rows = list(csv.DictReader(io.StringIO(_ROWS)))
    if kind == "jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    else:
        table.write_text(_ROWS.replace(",", "\t" if kind == "tsv" else ","), encoding="utf-8")
    columns = Columns(captions=("review",), label="stars", without_images=True)
    report = pack(table, tmp_path / "out", columns=columns)
    assert report.skipped == {"no caption": 1}
    with tarfile.open(tmp_path / "out" / "shard-00000.tar") as tar:
        names = tar.getnames()
        text = tar.extractfile("000000000.txt")
        assert text is not None and text.read() == b"It is a good film"
    # The last two have no link, so no metadata.
    assert names == [f"{n:09d}.{ending}" for n in range(3)
                     for ending in ("cls", "json", "txt") if (n, ending) not in
                     ((1, "json"), (2, "json"))]  # fmt: skip
    assert [info.num_samples for info in read_manifest(tmp_path / "out")] == [3]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (Columns(without_images=True), "no column is the text; the columns are stars, review, lin"),
        (Columns("link", ("review",), without_images=True), "--path-column link names images"),
        (Columns(captions=("review",)), "no column holds files"),
    ],
)
def test_a_table_of_texts_needs_to_say_so(columns: Columns, message: str, tmp_path: Path) -> None:
    table = tmp_path / "reviews.csv"
    table.write_text(_ROWS, encoding="utf-8")
    with pytest.raises(ClipsysError, match=message):
        pack(table, tmp_path / "out", columns=columns)


def test_texts_without_any_text_are_an_error(tmp_path: Path) -> None:
    table = tmp_path / "reviews.csv"
    table.write_text("text,label\n,1\n,2\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"none of the 2 texts can be used \(2 no caption\)"):
        pack(table, tmp_path / "out", columns=Columns(without_images=True))
