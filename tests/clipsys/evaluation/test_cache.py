"""The embedding cache: exact, shared by processes, and never in the way."""

from __future__ import annotations

import logging
import os
import resource
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clipsys.evaluation.cache import EmbeddingCache, default_folder

ENCODER = {"fingerprint": "f", "precision": "fp32"}
DIM = 8


def _key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def _vectors(numbers: range) -> dict[bytes, np.ndarray]:
    return {
        _key(n): np.random.default_rng(n).standard_normal(DIM).astype(np.float32) for n in numbers
    }


def _file(folder: Path) -> Path:
    (path,) = folder.glob("*.sqlite")
    return path


def test_vectors_come_back_to_the_bit_in_a_later_run(tmp_path: Path) -> None:
    vectors = _vectors(range(1200))  # more than one question
    with EmbeddingCache(tmp_path).open(ENCODER, DIM) as stored:
        stored.put(vectors)
    with EmbeddingCache(tmp_path).open(ENCODER, DIM) as stored:
        found = stored.get([*vectors, _key(5000)])
    assert found.keys() == vectors.keys()
    assert all(found[key].tobytes() == vectors[key].tobytes() for key in vectors)


@pytest.mark.parametrize("other", [({**ENCODER, "precision": "bf16"}, DIM), (ENCODER, 2 * DIM)])
def test_another_encoder_has_vectors_of_its_own(
    tmp_path: Path, other: tuple[dict[str, str], int]
) -> None:
    with EmbeddingCache(tmp_path).open(ENCODER, DIM) as stored:
        stored.put(_vectors(range(3)))
    with EmbeddingCache(tmp_path).open(*other) as stored:
        assert stored.get([_key(0)]) == {}


def test_the_folder_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CLIPSYS_CACHE", str(tmp_path / "a"))
    assert default_folder() == tmp_path / "a" / "embeddings"
    monkeypatch.delenv("CLIPSYS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert default_folder() == tmp_path / "b" / "clipsys" / "embeddings"


def test_a_vector_whose_bytes_have_changed_is_computed_again(tmp_path: Path) -> None:
    with EmbeddingCache(tmp_path).open(ENCODER, DIM) as stored:
        stored.put(_vectors(range(2)))
    with sqlite3.connect(_file(tmp_path)) as connection:
        connection.execute("UPDATE vectors SET vector = zeroblob(32) WHERE key = ?", (_key(0),))
    connection.close()
    with EmbeddingCache(tmp_path).open(ENCODER, DIM) as stored:
        assert stored.get([_key(0), _key(1)]).keys() == {_key(1)}
        assert stored.claim([_key(0), _key(1)]) == {_key(0)}
        stored.put(_vectors(range(1)))
        assert stored.get([_key(0)]).keys() == {_key(0)}


@pytest.mark.parametrize("damage", [b"this is not a database", b""], ids=["overwritten", "empty"])
def test_a_damaged_file_is_put_aside_with_one_line(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with EmbeddingCache(tmp_path).open(ENCODER, DIM) as stored:
        stored.put(_vectors(range(2)))
    path = _file(tmp_path)
    path.write_bytes(damage * 1000)
    with EmbeddingCache(tmp_path).open(ENCODER, DIM) as stored:
        assert stored.get([_key(0)]) == {}
        stored.put(_vectors(range(2)))
        assert len(stored.get([_key(0), _key(1)])) == 2
    assert len(caplog.messages) == (1 if damage else 0)
    assert all("put aside" in line and str(path) in line for line in caplog.messages)


def test_pages_overwritten_in_the_middle_are_noticed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with EmbeddingCache(tmp_path).open(ENCODER, DIM) as stored:
        stored.put(_vectors(range(4000)))
    path = _file(tmp_path)
    content = bytearray(path.read_bytes())
    content[16384:] = b"\xab" * (len(content) - 16384)
    path.write_bytes(content)
    with EmbeddingCache(tmp_path).open(ENCODER, DIM) as stored:
        assert stored.get([_key(0)]) == {}
        assert stored.claim([_key(0)]) == {_key(0)}
        stored.put(_vectors(range(2)))
        assert len(stored.get([_key(0), _key(1)])) == 2
    assert len(caplog.messages) == 1


def test_a_folder_that_cannot_be_written_to_means_no_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with EmbeddingCache(tmp_path / "file").open(ENCODER, DIM) as stored:
        stored.put(_vectors(range(2)))
        assert stored.get([_key(0)]) == {}
        assert stored.claim([_key(0)]) == {_key(0)}
    assert len(caplog.messages) == 1
    assert "not stored any more" in caplog.messages[0]


def test_a_full_drive_means_no_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stored = EmbeddingCache(tmp_path).open(ENCODER, DIM)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        stored.put(_vectors(range(5000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stored.get([_key(0)]) == {}
    assert len(caplog.messages) == 1
    with EmbeddingCache(tmp_path).open(ENCODER, DIM) as after:
        after.put(_vectors(range(2)))
        assert len(after.get([_key(0), _key(1)])) == 2


def test_the_encoders_that_were_not_used_for_longest_go_first(tmp_path: Path) -> None:
    for number in range(3):
        with EmbeddingCache(tmp_path).open({"fingerprint": str(number)}, DIM) as stored:
            stored.put(_vectors(range(2000)))
    files = sorted(tmp_path.glob("*.sqlite"), key=lambda path: path.stat().st_mtime)
    size_bytes = files[0].stat().st_size
    limit = 5 * size_bytes // 2  # two fit
    with EmbeddingCache(tmp_path, limit_bytes=limit).open({"fingerprint": "2"}, DIM):
        pass
    assert sorted(tmp_path.glob("*.sqlite")) == sorted(files[1:])


def test_an_encoder_that_fills_the_cache_stores_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with EmbeddingCache(tmp_path, limit_bytes=100_000).open(ENCODER, DIM) as stored:
        stored.put(_vectors(range(3000)))
        stored.put(_vectors(range(3000, 4000)))
    assert "limit of 0.0 GB" in caplog.text
    assert len(caplog.messages) == 1


def test_an_answer_is_remembered_for_its_question_only(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path)
    assert cache.recall({"model": "a"}) is None
    cache.remember({"model": "a"}, "bf16")
    assert EmbeddingCache(tmp_path).recall({"model": "a"}) == "bf16"
    assert cache.recall({"model": "b"}) is None


_WRITER = """
import sys, itertools, numpy as np
from clipsys.evaluation.cache import EmbeddingCache
with EmbeddingCache(sys.argv[1]).open({"fingerprint": "f", "precision": "fp32"}, 8) as stored:
    stored.claim([(10**9).to_bytes(32, "big")])
    for start in itertools.count(step=10):
        keys = [n.to_bytes(32, "big") for n in range(start, start + 10)]
        mine = stored.claim(keys)
        stored.put({key: np.full(8, int.from_bytes(key, "big"), np.float32) for key in mine})
        print(start + 10, flush=True)
"""


def test_a_killed_writer_leaves_its_vectors_and_no_claim(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = [sys.executable, "-c", _WRITER, str(tmp_path)]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    num_stored = 0
    for writer in writers:
        assert writer.stdout is not None
        for _ in range(30):
            num_stored = max(num_stored, int(writer.stdout.readline()))
    claimed = (10**9).to_bytes(32, "big")
    with EmbeddingCache(tmp_path).open(ENCODER, DIM) as stored:
        assert stored.claim([claimed]) == set()  # a living process has it
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            writer.wait()
            assert writer.stdout is not None
            writer.stdout.close()
        keys = [_key(number) for number in range(300)]
        found = stored.get(keys)
        assert found.keys() == set(keys)
        assert all((found[_key(n)] == n).all() for n in range(300))
        assert stored.claim([claimed]) == {claimed}
    assert num_stored >= 300
    assert [one for one in caplog.records if one.levelno >= logging.WARNING] == []
