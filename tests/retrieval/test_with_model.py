"""The whole way with a real open_clip model, small and with random weights."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

import clipsys
from clipsys.cli import main
from clipsys.errors import CollectionError, DataError
from clipsys.models.open_clip_models import build_model, save_model
from clipsys.retrieval import Collection
from tests.conftest import TINY_MODEL, noise_image
from tests.retrieval.colours import paint_folder


def test_scores_are_the_encoders_cosines_and_the_model_is_found_again(
    tmp_path: Path, model_folder: Path
) -> None:
    pictures = paint_folder(tmp_path / "pictures", num_images=12)
    encoder = clipsys.load(model_folder)
    with Collection.create(tmp_path / "c", encoder) as made:
        made.add(pictures, batch_size=5, show_progress=False)
    with Collection.open(tmp_path / "c") as opened:
        hits = opened.search("a red square", k=12)
        assert opened.encoder.fingerprint == encoder.fingerprint
    text = encoder.encode_text(["a red square"])[0]
    images = encoder.encode_image([hit.uri for hit in hits])
    np.testing.assert_allclose([hit.score for hit in hits], images @ text, atol=2e-3)


def test_model_that_was_replaced_in_its_place_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_model(build_model(TINY_MODEL), model)
    pictures = paint_folder(tmp_path / "pictures", num_images=2)
    with Collection.create(tmp_path / "c", clipsys.load(model)) as made:
        made.add(pictures, show_progress=False)
    save_model(build_model(TINY_MODEL), model, overwrite=True)
    with (
        Collection.open(tmp_path / "c") as opened,
        pytest.raises(CollectionError, match="its vectors are of model"),
    ):
        opened.search("red")


def test_shard_is_indexed_and_a_truncated_one_keeps_what_it_gave(
    tmp_path: Path, model_folder: Path
) -> None:
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as tar:
        for number in range(20):
            path = tmp_path / f"{number}.bmp"
            noise_image(number, (90, 90)).save(path)
            tar.add(path, path.name)
    with Collection.create(tmp_path / "c", clipsys.load(model_folder)) as made:
        assert made.add(shard, show_progress=False).added == 20
        again = made.add(shard, show_progress=False)
        assert (again.unchanged, again.total) == (20, 20)
        assert made.search("red", k=1)[0].uri.startswith(f"{shard}#")
        cut = tmp_path / "cut.tar"
        cut.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
        with pytest.raises(DataError, match=r"cut\.tar"):
            made.add(cut, show_progress=False)
        assert made.verify() == []
        assert len(made) > 20


def test_a_collection_is_a_data_set(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["path,caption,label"]
    for number in range(8):
        noise_image(number).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,picture {number},class {number % 2}")
    (tmp_path / "t.csv").write_text("\n".join(rows), encoding="utf-8")
    with Collection.create(tmp_path / "c", clipsys.load(model_folder)) as made:
        made.add(tmp_path / "t.csv", show_progress=False)
        (made.path / "thumbnails").mkdir(exist_ok=True)
        noise_image(9).save(made.path / "thumbnails" / "0.png")  # no item
    for task in ("retrieval", "zeroshot", "probe"):
        found = []
        for data in ("c", "t.csv"):
            words = ["evaluate", str(model_folder), f"--task={task}", f"--data={tmp_path / data}"]
            with pytest.raises(SystemExit) as ended:
                main([*words, "--json"])
            assert not ended.value.code
            found.append(json.loads(capsys.readouterr().out)["metrics"])
        assert found[0] == found[1]
