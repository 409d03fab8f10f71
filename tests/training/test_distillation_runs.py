"""Runs with a teacher: what it sees, what it leaves behind, and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clipsys.config import load_settings
from clipsys.errors import ConfigError
from clipsys.models.encoder import Encoder
from clipsys.models.open_clip_models import build_model, fingerprint, load_model, save_model
from clipsys.training.data.augmentation import augment, normalisation
from clipsys.training.journal import read_metrics
from clipsys.training.model.teacher import TEACHER_IMAGE, TEACHER_TEXT, Teacher, load_teacher
from clipsys.training.recipe import Recipe
from clipsys.training.run import build_run
from tests.conftest import TINY_MODEL, noise_image
from tests.ranks import run_ranks
from tests.tiny_models import SIGLIP_PREPROCESS, siglip_config, write_tokenizer
from tests.training.runs import Attempt, have_same_weights, train_in_group, weights_of, write_recipe


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of another width, image size, normalisation and tokenizer than the student."""
    folder = tmp_path_factory.mktemp("teacher")
    config = siglip_config(write_tokenizer(folder / "tokenizer"))
    config["embed_dim"] = 24
    config["vision_cfg"] = {**config["vision_cfg"], "image_size": 48}
    torch.manual_seed(7)
    save_model(build_model(config, preprocess=SIGLIP_PREPROCESS), folder / "model")
    return str(folder / "model")


def test_rows_are_the_vectors_of_an_encoder(teacher_folder: str) -> None:
    parts = load_model(teacher_folder)
    encoder = Encoder(load_model(teacher_folder), device="cpu", precision="fp32")
    teacher = Teacher(parts, device=torch.device("cpu"), precision="fp32")
    images, texts = [noise_image(seed) for seed in range(3)], ["a red dog", "a cat", "x"]
    pixels = torch.from_numpy(np.stack([encoder.preprocess(one) for one in images]))
    mean, std = teacher.normalisation
    rows = teacher.rows((pixels / 255 - mean) / std, teacher.tokenizer(texts))
    np.testing.assert_allclose(rows[TEACHER_IMAGE], encoder.encode_image(images), atol=1e-5)
    np.testing.assert_allclose(rows[TEACHER_TEXT], encoder.encode_text(texts), atol=1e-5)
    assert teacher.sizes == (24, pytest.approx(encoder.logit_scale))
    assert not any(one.requires_grad for one in parts.model.parameters())


def test_a_run_learns_from_its_teacher_keeps_nothing_of_it_and_resumes_bit_for_bit(
    teacher_folder: str, shards: str, tmp_path: Path
) -> None:
    objective = {"name": "distillation", "teacher": teacher_folder, "feature_weight": 100.0}
    sections: dict[str, Any] = {
        "objective": objective,
        "data": {"micro_batch_size": 2, "load_size": 48},
        "schedule": {"decay": "constant"},
        "evaluation": {"every_epochs": 0},
    }
    whole = write_recipe(tmp_path / "whole", shards, **sections)
    cut = write_recipe(tmp_path / "cut", shards, **sections)
    before = fingerprint(load_model(teacher_folder))
    attempts = [
        Attempt(whole), Attempt(cut, ("schedule.epochs=1",)), Attempt(cut, (), resume=True)
    ]  # fmt: skip
    outcomes = train_in_group(attempts, 2)
    assert [one.error for one in outcomes[0]] == [""] * 3
    assert "images of 48 x 48 px, vectors of width 24" in outcomes[0][0].log
    assert have_same_weights(tmp_path / "whole" / "run", tmp_path / "cut" / "run")
    assert fingerprint(load_model(teacher_folder)) == before
    run = tmp_path / "whole" / "run"
    figures = [one for one in read_metrics(run) if "teacher_image_cosine" in one]
    assert all(-1 <= one["teacher_text_cosine"] <= 1 for one in figures)
    assert figures[-1]["teacher_image_cosine"] > 0.1  # towards random vectors of width 24
    torch.manual_seed(0)
    student = build_model(TINY_MODEL).model.state_dict()
    assert weights_of(run).keys() == student.keys()


def test_stored_vectors_are_those_of_the_view_that_the_student_sees(
    teacher_folder: str, shards: str, tmp_path: Path
) -> None:
    objective = {
        "name": "distillation",
        "teacher": teacher_folder,
        "teacher_views": 3,
        "teacher_features": str(tmp_path / "stored"),
    }
    sections: dict[str, Any] = {"objective": objective, "evaluation": {"every_epochs": 0}}
    path = write_recipe(tmp_path, shards, **sections)
    (seen,) = run_ranks(_compare_with_live, 1, str(path), teacher_folder)
    assert seen["apart"] < 2e-3  # stored in float16
    assert seen["student apart"] == 0
    assert seen["views"] == [0, 1, 2]
    # Two ranks find what one has stored, and rows do not depend on the split.
    outcomes = train_in_group([Attempt(path)], 2)
    assert [one.error for one in outcomes[0]] == [""]
    assert "1 of 1 blocks are stored" in outcomes[0][0].log


def _compare_with_live(rank: int, world_size: int, path: str, teacher_folder: str) -> Any:
    recipe = load_settings(Recipe, path)
    run = build_run(recipe, torch.device("cpu"))
    stored: Any = run.step._teacher
    batches = run.batches(0)
    batch = next(batches)
    chosen = [int(view) for view in batch.stored_B2[:, 0]]  # type: ignore[index]
    for _ in range(3):
        chosen += [int(view) for view in next(batches).stored_B2[:, 0]]  # type: ignore[index]
    batches.close()
    (make,) = run.step._seeded_inputs([batch], 0)
    inputs = make()
    live = Teacher(load_teacher(teacher_folder), device=torch.device("cpu"), precision="fp32")

    def view(size: tuple[int, int], mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
        assert batch.image_BCHW is not None
        generators = stored.generators(batch)
        return augment(
            *(batch.image_BCHW, recipe.augmentation, size, mean, std, generators),
            drawn_for=run.model.preprocessing.size,
        )

    expected = live.rows(view(live.size, *live.normalisation), live.tokenizer([*batch.captions]))
    assert inputs.teacher is not None
    apart = max(float((inputs.teacher[n] - expected[n]).abs().max()) for n in expected)
    look = run.model.preprocessing
    own = view(look.size, *normalisation(look, torch.device("cpu")))
    return {
        "apart": apart,
        "student apart": float((own - inputs.views[0]).abs().max()),
        "views": sorted(set(chosen)),
    }


def test_a_teacher_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"objective\.teacher: .*there is no such model folder"):
        load_teacher(str(tmp_path / "nothing"))
