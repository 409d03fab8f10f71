"""What a run's held-out data are made of: bad samples are left out and counted, as in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipsys.errors import DataError
from clipsys.images.preprocessing import Preprocessing
from clipsys.models.open_clip_models import build_model
from clipsys.training.validation.config import EvaluationConfig
from clipsys.training.validation.measuring import Validation
from tests.clipsys.shards.test_samples import write_tar
from tests.conftest import TINY_MODEL, encode_png, noise_image

IMAGE = encode_png(np.asarray(noise_image(1, (32, 32))))


def _validation(shards: Path | None, **settings: Any) -> Validation:
    parts = build_model(TINY_MODEL)
    caption_key = settings.pop("caption_key", None)
    return Validation(
        EvaluationConfig(**settings),
        str(shards) if shards else None,
        Preprocessing((32, 32)),
        parts.tokenizer,
        caption_key=caption_key,
    )


def _shard(path: Path, bad: list[tuple[str, bytes]]) -> Path:
    good = [member for key in "ab" for member in ((f"{key}.png", IMAGE), (f"{key}.txt", b"a dog"))]
    return write_tar(path, [*good, *bad, ("z.png", IMAGE), ("z.txt", b"a cat")])


def test_bad_samples_are_left_out_and_counted_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _shard(tmp_path / "0.tar", [("c.txt", b"no image"), ("d.png", b"nothing"), ("d.txt", b"d")])
    whole = _shard(tmp_path / "1.tar", [("e.png", IMAGE), ("e.json", b"[" * 200_000)]).read_bytes()
    (tmp_path / "2.tar").write_bytes(whole[: whole.index(b"z.png") + 600])
    validation = _validation(tmp_path)
    assert validation._num_images == 3 + 3 + 2
    (warning,) = (one for one in caplog.messages if "samples cannot be used" in one)
    assert "4 samples cannot be used" in warning
    assert "(1 no image, 1 not an image, 1 metadata is not JSON, 1 truncated shard)" in warning
    assert "0.tar#c: no image among the members" in warning


def test_a_set_without_any_usable_sample_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("c.txt", b"no image")])
    with pytest.raises(DataError, match=r"data\.validation: .*0\.tar#c: no image"):
        _validation(tmp_path)
    (tmp_path / "0.tar").write_bytes(b"nothing")
    with pytest.raises(DataError, match="not a tar file"):
        _validation(tmp_path)


def test_captions_come_from_the_key_that_training_uses(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.png", IMAGE), ("a.json", b'{"s": [{"raw": "a cat"}]}')])
    validation = _validation(tmp_path, caption_key="s.raw")
    assert validation._targets is not None
    assert validation._targets.texts == ["a cat"]


def test_numbered_classes_need_names(tmp_path: Path) -> None:
    members = [(f"{n}.png", IMAGE) if kind == "png" else (f"{n}.cls", b"%d" % (n % 2))
               for n in range(4) for kind in ("png", "cls")]  # fmt: skip
    write_tar(tmp_path / "0.tar", [*members, ("x.png", IMAGE)])
    with pytest.raises(DataError, match=r"labels are numbers \(0, 1\).*classnames\.txt"):
        _validation(None, zeroshot=str(tmp_path))
    (tmp_path / "classnames.txt").write_text("cat\ndog\n", encoding="utf-8")
    validation = _validation(None, zeroshot=str(tmp_path))
    assert validation._question.names == ["cat", "dog"]
    assert len(validation._labels) == 4  # x has no label
