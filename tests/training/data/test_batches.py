from __future__ import annotations

import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from clipsys.errors import DataError, TrainingError
from clipsys.images.preprocessing import Preprocessing
from clipsys.models.open_clip_models import build_model
from clipsys.training.data.batches import TrainingBatches
from clipsys.training.data.config import DataConfig
from clipsys.training.data.loader import load_batches
from clipsys.training.data.ordering import sample_order
from clipsys.training.data.samples import Batch, Decoder, group_id, normalise_caption
from clipsys.training.data.shard_set import open_shards
from tests.conftest import TINY_MODEL, write_training_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_training_shards(tmp_path_factory.mktemp("shards"), 50, shard_bytes=40_000)


def _decoder(**options: Any) -> Decoder:
    settings: dict[str, Any] = {
        "preprocessing": Preprocessing((32, 32)),
        "tokenizer": build_model(TINY_MODEL).tokenizer,
        "captions": "random",
        "positives": "pair",
        "label_key": None,
        "max_image_pixels": 10_000,
        "seed": 3,
    }
    return Decoder(**(settings | options))


def _dataset(
    shards: str, *, rank: int = 0, world_size: int = 1, epochs: int = 1, start: int = 0,
    batch_size: int = 8, micro_batch_size: int | None = None, pixel_cache_bytes: int = 0,
    data: dict[str, Any] | None = None, **options: Any,
) -> TrainingBatches:  # fmt: skip
    config = DataConfig(**{"train": shards, **(data or {})})
    shard_set, decoder = open_shards(config), _decoder(**options)
    return TrainingBatches(
        shard_set, sample_order(config, shard_set, decoder.seed), decoder, batch_size=batch_size,
        micro_batch_size=micro_batch_size, rank=rank, world_size=world_size, epochs=epochs,
        start_step=start, pixel_cache_bytes=pixel_cache_bytes,
    )  # fmt: skip


def _same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        a.keys == b.keys
        and torch.equal(a.image_BCHW, b.image_BCHW)
        and torch.equal(a.texts[0], b.texts[0])
        and torch.equal(a.groups_B, b.groups_B)
        for a, b in zip(first, second, strict=True)
    )


def test_an_epoch_has_every_sample_once_but_for_the_uneven_end(shards: str) -> None:
    batches = list(_dataset(shards))
    keys = Counter(key for batch in batches for key in batch.keys)
    assert len(batches) == 50 // 8
    assert set(keys.values()) == {1}


def test_epochs_differ_in_order_and_in_caption(shards: str) -> None:
    batches = list(_dataset(shards, epochs=2))
    first, second = batches[:6], batches[6:]
    assert [b.keys for b in first] != [b.keys for b in second]
    tokens = [
        {key: row for batch in part for key, row in zip(batch.keys, batch.texts[0], strict=True)}
        for part in (first, second)
    ]
    shared = set(tokens[0]) & set(tokens[1])
    assert any(not torch.equal(tokens[0][key], tokens[1][key]) for key in shared)


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_ranks_share_the_single_process_batches(shards: str, world_size: int) -> None:
    whole = list(_dataset(shards))
    parts = [list(_dataset(shards, rank=rank, world_size=world_size)) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        assert sum((part[step].keys for part in parts), ()) == batch.keys


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_micro_batches_are_the_batch_in_parts(shards: str, workers: int) -> None:
    options: dict[str, Any] = {"rank": 1, "world_size": 2, "epochs": 2, "start": 4}
    whole = list(_dataset(shards, **options))
    parts = list(load_batches(_dataset(shards, micro_batch_size=2, **options), workers))
    assert len(parts) == 2 * len(whole)
    for number, batch in enumerate(whole):
        first, second = parts[2 * number : 2 * number + 2]
        assert first.keys + second.keys == batch.keys
        assert torch.equal(torch.cat([first.image_BCHW, second.image_BCHW]), batch.image_BCHW)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_order_does_not_depend_on_the_number_of_workers(shards: str, workers: int) -> None:
    # 50 samples lie in fewer shards than there are workers in the last case.
    expected = list(_dataset(shards, epochs=2))
    assert _same(list(load_batches(_dataset(shards, epochs=2), workers)), expected)


@pytest.mark.parametrize("start", [1, 5, 6, 11])
def test_a_resumed_stream_continues_with_the_same_batches(shards: str, start: int) -> None:
    whole = list(_dataset(shards, epochs=2))
    assert _same(list(_dataset(shards, epochs=2, start=start)), whole[start:])


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_are_kept_are_decoded_once_and_give_the_same_batches(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    damaged = _damage(shards, tmp_path / "d", {"0007.png": b"nothing"})
    expected = list(_dataset(damaged, epochs=3))
    decoded: Counter[str] = Counter()
    pixels = Decoder.pixels

    def counted(self: Decoder, data: bytes, place: str) -> Any:
        decoded[place] += 1
        return pixels(self, data, place)

    monkeypatch.setattr(Decoder, "pixels", counted)
    kept = _dataset(damaged, epochs=3, pixel_cache_bytes=50 * (3 * 32 * 32 + 9))
    assert _same(list(load_batches(kept, workers)), expected)
    if workers == 0:
        bad = {place for place in decoded if place.endswith("#0007")}
        assert {decoded[place] for place in decoded.keys() - bad} == {1}
        assert {decoded[place] for place in bad} <= {2, 3}  # tried again each time


def test_what_does_not_fit_is_not_kept(shards: str) -> None:
    size = 50 * (3 * 32 * 32 + 9)
    assert _dataset(shards, epochs=3, pixel_cache_bytes=size)._pixels is not None
    assert _dataset(shards, epochs=3, pixel_cache_bytes=size - 1)._pixels is None
    assert _dataset(shards, epochs=1, pixel_cache_bytes=size)._pixels is None


def test_without_space_images_are_decoded_again(
    shards: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    caplog.set_level("INFO")
    assert _dataset(shards, epochs=2, pixel_cache_bytes=10**9)._pixels is None
    assert "decoded images are not kept: No space left on device" in caplog.text


def test_seeds_give_different_orders(shards: str) -> None:
    assert not _same(list(_dataset(shards)), list(_dataset(shards, seed=4)))


def test_first_caption_is_the_first(shards: str) -> None:
    (batch, *_) = _dataset(shards, captions="first")
    decoder = _decoder()
    expected = decoder.tokenizer([f"picture number {int(key)}" for key in batch.keys])
    assert torch.equal(batch.texts[0], expected)


@pytest.mark.parametrize(
    ("options", "same_group"),
    [
        ({"positives": "pair"}, lambda a, b: a == b),
        ({"positives": "image"}, lambda a, b: a == b),
        ({"positives": "label"}, lambda a, b: a % 4 == b % 4),
        ({"positives": "label", "label_key": "family"}, lambda a, b: a // 2 == b // 2),
    ],
)
def test_groups_are_what_positives_says(shards: str, options: Any, same_group: Any) -> None:
    (batch, *_) = _dataset(shards, batch_size=50, **options)
    for a, group_a in zip(batch.keys, batch.groups_B, strict=True):
        for b, group_b in zip(batch.keys, batch.groups_B, strict=True):
            assert bool(group_a == group_b) == same_group(int(a), int(b))


def test_captions_that_differ_in_case_and_stops_are_equal() -> None:
    assert normalise_caption("A  Dog runs .") == normalise_caption("a dog runs")
    assert group_id("a") == group_id("a") != group_id("b")
    assert 0 <= group_id("x") < 2**63


def _damage(shards: str, folder: Path, replace: dict[str, bytes | None]) -> str:
    """Copies shards with some members replaced or left out."""
    import io

    folder.mkdir()
    for source in sorted(Path(shards).parent.glob("*.tar")):
        with tarfile.open(source) as old, tarfile.open(folder / source.name, "w") as new:
            for member in old:
                data = replace.get(member.name, old.extractfile(member).read())  # type: ignore[union-attr]
                if data is not None:
                    info = tarfile.TarInfo(member.name)
                    info.size = len(data)
                    new.addfile(info, io.BytesIO(data))
    return str(folder / "*.tar")


def test_a_bad_sample_is_replaced_by_its_neighbour_and_listed(shards: str, tmp_path: Path) -> None:
    damaged = _damage(
        shards, tmp_path / "d",
        {"0007.png": b"nothing", "0021.png": None, "0033.json": b"{", "0040.png": b""},
    )  # fmt: skip
    batches = list(_dataset(damaged))
    skipped = {one.key: one.reason for batch in batches for one in batch.skipped}
    assert set(skipped) <= {"0007", "0021", "0033", "0040"} and len(skipped) >= 3
    assert len(batches) == 50 // 8
    for batch in batches:
        assert len(batch.keys) == 8
        # The twin shares its neighbour's group, so it is never taken for a negative.
        groups = dict(zip(batch.keys, batch.groups_B.tolist(), strict=True))
        assert [groups[key] for key in batch.keys] == batch.groups_B.tolist()
        assert not {one.key for one in batch.skipped} & set(batch.keys)


def test_bad_samples_do_not_make_the_order_depend_on_workers(shards: str, tmp_path: Path) -> None:
    damaged = _damage(shards, tmp_path / "d", {"0007.png": b"nothing", "0008.png": b"nothing"})
    assert _same(list(load_batches(_dataset(damaged), 2)), list(_dataset(damaged)))


def test_a_batch_without_any_usable_sample_stops_in_one_line(shards: str, tmp_path: Path) -> None:
    damaged = _damage(shards, tmp_path / "d", {f"{n:04d}.png": b"x" for n in range(50)})
    with pytest.raises(TrainingError, match="none of the 8 samples of this rank") as caught:
        list(load_batches(_dataset(damaged), 1))
    assert "\n" not in str(caught.value)


def test_a_truncated_shard_is_reported_and_its_beginning_used(
    shards: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = Path(sorted(Path(shards).parent.glob("*.tar"))[0]).read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: len(data) * 2 // 3])
    shard_set = open_shards(DataConfig(train=str(tmp_path / "cut.tar")))
    assert "truncated" in caplog.text
    batches = list(_dataset(str(tmp_path / "cut.tar"), batch_size=2))
    assert len(batches) == shard_set.num_samples // 2


def test_counts_come_from_the_manifest_unless_a_shard_has_changed(shards: str) -> None:
    folder = Path(shards).parent
    path = folder / "shards.json"
    document = json.loads(path.read_text())
    original = path.read_text()
    try:
        document["shards"][0]["num_samples"] += 100
        path.write_text(json.dumps(document))
        assert open_shards(DataConfig(train=shards)).num_samples == 150
        document["shards"][0]["size_bytes"] += 1
        path.write_text(json.dumps(document))
        assert open_shards(DataConfig(train=shards)).num_samples == 50
    finally:
        path.write_text(original)


def test_too_little_data_for_one_batch_is_said(shards: str) -> None:
    with pytest.raises(TrainingError, match="batch_size is 51, but the shards hold only 50"):
        _dataset(shards, batch_size=51)


def test_what_is_no_shard_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"nothing")
    with pytest.raises(DataError, match="not a tar file"):
        open_shards(DataConfig(train=str(tmp_path)))
