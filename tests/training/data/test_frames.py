"""Windows of ordered frames: which there are, where they lie, and what is refused."""

from __future__ import annotations

import itertools
import random
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipsys.corpora.packing import pack
from clipsys.errors import DataError, TrainingError
from clipsys.images.preprocessing import Preprocessing
from clipsys.shards.random_access import ShardReader
from clipsys.shards.reading import expand_shards, iterate_samples
from clipsys.shards.remote import ShardCache
from clipsys.shards.samples import Sample
from clipsys.shards.writing import write_shards
from clipsys.training.data.batches import TrainingBatches
from clipsys.training.data.config import DataConfig, FramesConfig
from clipsys.training.data.frames import FrameWindows, read_windows
from clipsys.training.data.ordering import sample_order
from clipsys.training.data.samples import Batch, Decoder
from clipsys.training.data.shard_set import ShardSet, open_shards
from tests.conftest import encode_png, no_tokenizer, noise_image

#: Frames of each sequence; the last one is too short for a window of 3 frames.
_LENGTHS = {"a": 5, "b/c": 4, "d": 2}


def _image(number: int) -> bytes:
    """An image whose colour is its number."""
    return encode_png(np.full((8, 8, 3), number, dtype=np.uint8))


def _write(folder: Path, metadata: list[dict[str, Any]], *, bad: Container[int] = ()) -> ShardSet:
    samples = [
        Sample(f"{number:03d}", b"-" if number in bad else _image(number), "png", (), None, one)
        for number, one in enumerate(metadata)
    ]
    write_shards(samples, folder, shard_bytes=4000)
    return open_shards(DataConfig(train=str(folder)))


@pytest.fixture
def shuffled(tmp_path: Path) -> tuple[ShardSet, list[dict[str, Any]]]:
    """Frames in no order, over several shards."""
    metadata = [
        {"sequence": name, "frame": 10 * frame, "other": 1}
        for name, length in _LENGTHS.items()
        for frame in range(length)
    ]
    random.Random(3).shuffle(metadata)
    return _write(tmp_path / "shards", metadata), metadata


def _read(config: FramesConfig, shard_set: ShardSet, folder: Path) -> FrameWindows:
    return read_windows(config, shard_set, ShardCache(folder / "cache", limit_bytes=10**9))


@pytest.mark.parametrize(("length", "stride"), [(3, 1), (2, 2), (2, 1)])
def test_windows_are_all_runs_of_consecutive_frames(
    shuffled: tuple[ShardSet, list[dict[str, Any]]], tmp_path: Path, length: int, stride: int
) -> None:
    shard_set, metadata = shuffled
    assert len(shard_set.shards) > 2
    windows = _read(FramesConfig(length=length, stride=stride), shard_set, tmp_path)
    span = (length - 1) * stride + 1
    expected = {
        (name, tuple(range(10 * first, 10 * (first + span), 10 * stride)))
        for name, count in _LENGTHS.items()
        for first in range(count - span + 1)
    }
    reader = ShardReader(shard_set.shards, shard_set.counts)
    samples = list(iterate_samples(list(shard_set.shards)))
    starts = [0, *itertools.accumulate(shard_set.counts)]
    found = set()
    for shard, count in enumerate(windows.counts):
        for window in range(count):
            frames = windows.frames(shard, window)
            assert frames[0][0] == shard
            seen = [samples[starts[one] + sample].metadata for one, sample in frames]
            keys = [reader.read(one, sample)["__key__"] for one, sample in frames]
            assert [metadata[int(key)] for key in keys] == seen
            (name,) = {one["sequence"] for one in seen}
            found.add((name, tuple(one["frame"] for one in seen)))
    assert found == expected
    assert windows.num_windows == len(expected) == sum(windows.counts)
    assert windows.length == length
    numbers = [windows.number(s, w) for s, count in enumerate(windows.counts) for w in range(count)]
    assert numbers == list(range(len(expected)))


def test_the_fingerprint_depends_on_the_windows(
    shuffled: tuple[ShardSet, list[dict[str, Any]]], tmp_path: Path
) -> None:
    one, again, other = (
        _read(FramesConfig(length=2, stride=stride), shuffled[0], tmp_path).fingerprint()
        for stride in (1, 1, 2)
    )
    assert one == again != other


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ([{"frame": 1}], r"data.frames.sequence: .*sample 0 has no metadata key 'sequence'; it "
                         "has frame; `clipsys shards FOLDER OUT --frames`"),
        ([{"sequence": 1}], "data.frames.index: .* no metadata key 'frame'; it has sequence"),
        ([{"sequence": 1, "frame": "7"}], "frame is '7'; expected a number"),
        ([{"sequence": 1, "frame": True}], "frame is True; expected a number"),
        ([{"sequence": 1, "frame": 1}] * 2, "'1' has several frames with the frame 1"),
        ([{"sequence": 1, "frame": n} for n in range(2)],
         "length 3 and stride 1 spans 3 frames, and the longest sequence has 2; lower"),
    ],
)  # fmt: skip
def test_metadata_that_make_no_windows_are_named(
    metadata: list[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    shard_set = _write(tmp_path / "shards", metadata)
    with pytest.raises(DataError, match=message):
        _read(FramesConfig(length=3), shard_set, tmp_path)


def test_a_folder_of_folders_of_numbered_frames_is_packed_with_both(tmp_path: Path) -> None:
    source = tmp_path / "clips"
    for name, count in (("park/one", 3), ("two", 12)):
        (source / name).mkdir(parents=True)
        for number in range(1, count + 1):
            noise_image(number, (8, 8)).save(source / name / f"take2 frame{number}.png")
    (source / "two" / "take2 frame3.json").write_text('{"speed": 4}')
    pack(source, tmp_path / "out", frames=True)
    packed = [one.metadata for one in iterate_samples(expand_shards(tmp_path / "out"))]
    assert {(one["sequence"], one["frame"]) for one in packed} == {
        *(("park/one", number) for number in range(1, 4)),
        *(("two", number) for number in range(1, 13)),
    }
    assert [one["frame"] for one in packed if "speed" in one] == [3]
    shard_set = open_shards(DataConfig(train=str(tmp_path / "out")))
    assert _read(FramesConfig(length=4), shard_set, tmp_path).num_windows == 9
    noise_image(1, (8, 8)).save(source / "two" / "last.png")
    with pytest.raises(DataError, match=r"last.png: its name has no number, by which --frames"):
        pack(source, tmp_path / "other", frames=True)
    with pytest.raises(DataError, match="--frames numbers the images of a folder of folders"):
        pack(tmp_path / "out", tmp_path / "other", frames=True)


def test_one_member_of_a_sample_is_read_without_the_others(
    shuffled: tuple[ShardSet, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shard_set, _ = shuffled
    reader = ShardReader(shard_set.shards, shard_set.counts)
    raw = reader.read(1, 0)
    assert reader.member(1, 0, "json") == raw["json"]
    assert reader.member(1, 0, "png") == raw["png"]
    assert reader.member(1, 0, "txt") is None
    monkeypatch.setattr("clipsys.shards.random_access.plain_member", lambda *_: None)
    assert reader.member(1, 0, "json") == raw["json"]  # by tarfile


def _batches(shard_set: ShardSet, windows: FrameWindows, **options: Any) -> TrainingBatches:
    frames = FramesConfig(length=windows.length)
    order = sample_order(DataConfig(train="x", frames=frames), shard_set, 5, windows)
    decoder = Decoder(
        preprocessing=Preprocessing((8, 8)),
        tokenizer=no_tokenizer,
        captions="first",
        positives="pair",
        label_key=None,
        max_image_pixels=1000,
        seed=5,
        needs_caption=False,
    )
    where: dict[str, Any] = {"rank": 0, "world_size": 1, "epochs": 2, "batch_size": 2} | options
    return TrainingBatches(shard_set, order, decoder, windows=windows, **where)


def _shown(batch: Batch) -> list[list[int]]:
    """The number of each frame of each row, which is its colour."""
    assert batch.image_BCHW is not None
    return batch.image_BCHW[:, 0, 4, 4].view(len(batch.keys), -1).tolist()


@pytest.mark.parametrize("pixel_cache_bytes", [0, 10**6])
def test_rows_are_whole_windows_each_once_an_epoch(
    shuffled: tuple[ShardSet, list[dict[str, Any]]], tmp_path: Path, pixel_cache_bytes: int
) -> None:
    shard_set, metadata = shuffled
    windows = _read(FramesConfig(length=3), shard_set, tmp_path)
    batches = list(_batches(shard_set, windows, pixel_cache_bytes=pixel_cache_bytes))
    assert len(batches) == 2 * (windows.num_windows // 2)
    rows = [row for batch in batches for row in _shown(batch)]
    for row in rows:
        places = [metadata[number] for number in row]
        assert len({one["sequence"] for one in places}) == 1
        first = places[0]["frame"]
        assert [one["frame"] for one in places] == [first, first + 10, first + 20]
    epochs = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    assert epochs[0] != epochs[1]
    for epoch in epochs:
        assert len({tuple(row) for row in epoch}) == len(epoch)
    numbers = [int(number) for batch in batches[:2] for number in batch.samples_B]
    assert [windows.samples_XT[number].tolist() for number in numbers] == rows[:4]


def test_a_resume_and_a_split_among_ranks_ask_for_the_same_windows(
    shuffled: tuple[ShardSet, list[dict[str, Any]]], tmp_path: Path
) -> None:
    shard_set, _ = shuffled
    windows = _read(FramesConfig(length=3), shard_set, tmp_path)
    whole = [_shown(batch) for batch in _batches(shard_set, windows)]
    resumed = [_shown(batch) for batch in _batches(shard_set, windows, start_step=3)]
    assert resumed == whole[3:]
    parts = [
        [_shown(batch) for batch in _batches(shard_set, windows, rank=rank, world_size=2)]
        for rank in range(2)
    ]
    assert [[*first, *second] for first, second in zip(*parts, strict=True)] == whole


def test_a_window_with_a_bad_frame_is_skipped(tmp_path: Path) -> None:
    metadata = [{"sequence": 1, "frame": number} for number in range(6)]
    shard_set = _write(tmp_path / "shards", metadata, bad={5})
    windows = _read(FramesConfig(length=2), shard_set, tmp_path)
    batches = list(_batches(shard_set, windows, batch_size=5, epochs=1))
    (skipped,) = [one for batch in batches for one in batch.skipped]
    assert (skipped.key, skipped.reason) == ("005", "not an image")
    rows = _shown(batches[0])
    assert len(rows) == 5 and not any(5 in row for row in rows)


def test_the_order_of_windows_has_a_fingerprint_of_its_own(
    shuffled: tuple[ShardSet, list[dict[str, Any]]], tmp_path: Path
) -> None:
    shard_set, _ = shuffled
    orders = []
    for length, stride in ((2, 1), (3, 1), (2, 2)):
        config = FramesConfig(length=length, stride=stride)
        windows = _read(config, shard_set, tmp_path)
        orders.append(sample_order(DataConfig(train="x", frames=config), shard_set, 5, windows))
    # The windows of (3, 1) and (2, 2) begin at the same frames.
    assert orders[1].counts == orders[2].counts
    assert len({order.fingerprint() for order in orders}) == 3
    with pytest.raises(TrainingError, match="the shards hold only 5 windows of frames; lower it"):
        orders[1].steps_per_epoch(6)
