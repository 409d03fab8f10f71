from __future__ import annotations

from pathlib import Path

import pytest

from clipsys.errors import DataError
from clipsys.retrieval.ingest.sources import Source, count_records
from tests.conftest import write_training_shards
from tests.retrieval.colours import paint_folder


def named(*sources: Path) -> list[Source]:
    return [Source(str(source)) for source in sources]


def test_records_of_folders_and_local_shards_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paint_folder(tmp_path / "photos", num_images=3)
    write_training_shards(tmp_path / "shards", 5)
    assert count_records(named(tmp_path / "photos")) == 3
    assert count_records(named(tmp_path / "photos", tmp_path / "shards")) == 8
    assert capsys.readouterr().err == ""
    assert count_records(named(tmp_path / "shards"), show_progress=True) == 5
    assert "counting samples" in capsys.readouterr().err


def test_of_a_shard_that_breaks_off_the_whole_samples_count(tmp_path: Path) -> None:
    write_training_shards(tmp_path, 6)
    shard = min(tmp_path.glob("*.tar"))
    whole = count_records(named(shard))
    assert whole is not None
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    assert 0 < (count_records(named(shard)) or 0) < whole


def test_nothing_and_a_missing_source_are_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to add"):
        count_records([])
    with pytest.raises(DataError, match="nowhere"):
        count_records(named(tmp_path / "nowhere"))
