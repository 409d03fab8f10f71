"""Whole runs on texts without images: SCL, a text tower of Hugging Face, and a kill."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clipsys.models.open_clip_models import CONFIG_NAME, HEADS_NAME, load_model
from clipsys.shards.samples import Sample
from clipsys.shards.writing import write_shards
from clipsys.training.export import export_model
from clipsys.training.journal import read_metrics
from clipsys.training.model.initial import SMALLEST_IMAGE_TOWER
from tests.conftest import TINY_MODEL, write_training_shards
from tests.tiny_models import write_text_model
from tests.training.runs import (
    Attempt,
    Runs,
    have_same_weights,
    kill_ranks,
    train_in_group,
    write_recipe,
)

_LABELS = ("cat", "dog", "star")
_SCL: dict[str, Any] = {
    "model": {"architecture": {k: v for k, v in TINY_MODEL.items() if k != "vision_cfg"}},
    "objective": {"name": "scl"},
    "data": {"num_samples": 20, "label_noise": 0.2, "subset_seed": 3},
    "schedule": {"epochs": 3, "warmup_steps": 1},
    "evaluation": {"classifier": True},
    "augmentation": None,
}


def _text(number: int) -> str:
    return f"a {_LABELS[number % 3]} number {number}. It is red! Is it a square? It is."


def _write_texts(folder: Path) -> str:
    """40 texts whose word says their label, one without a text and one without a label."""
    texts = [Sample(f"{n:02d}", b"", "", (_text(n),), _LABELS[n % 3]) for n in range(40)]
    odd = [Sample("90", b"", "", (), "cat"), Sample("91", b"", "", ("no label",))]
    write_shards([*texts, *odd], folder, shard_bytes=30_000)
    return str(folder / "*.tar")


def _hf_sections(folder: Path) -> dict[str, Any]:
    from transformers import AutoModel

    encoder = write_text_model(folder, "bert")
    torch.manual_seed(5)
    model = AutoModel.from_config(_config_of(encoder), add_pooling_layer=False)
    model.save_pretrained(str(encoder))
    text = {
        "hf_model_name": str(encoder),
        "hf_tokenizer_name": str(encoder),
        "hf_model_pretrained": True,
        "hf_pooler_type": "mean_pooler",
        "hf_proj_type": None,
        "context_length": 12,
    }
    return {
        **_SCL,
        "model": {"architecture": {"embed_dim": 32, "text_cfg": text}},
        "data": {"max_bad_share": 0.2, "micro_batch_size": 2},
        "objective": {"name": "scl", "learn_temperature": True, "dropout": 0.1},
        "optimizer": {"lr": 1e-9, "weight_decay": 0.0},
        "schedule": {"epochs": 1},
    }


def _pretext_sections(encoder: Path, objective: dict[str, Any]) -> dict[str, Any]:
    text = {
        "hf_model_name": str(encoder),
        "hf_tokenizer_name": str(encoder),
        "hf_pooler_type": "mean_pooler",
        "hf_proj_type": "linear",
        "context_length": 24,
    }
    return {
        "model": {"architecture": {"embed_dim": 16, "text_cfg": text}},
        "objective": objective,
        "data": {"max_bad_share": 0.2, "validation": None},
        "optimizer": {"lr": 3e-3},
        "schedule": {"epochs": 12},
        "augmentation": None,
    }


def _config_of(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Runs of two ranks; one was killed in its third step."""
    folder = tmp_path_factory.mktemp("texts")
    shards = _write_texts(folder / "shards")
    images = write_training_shards(folder / "images", 50)
    sections: dict[str, tuple[str, dict[str, Any]]] = {
        "whole": (shards, _SCL),
        "killed": (shards, _SCL),
        "encoder": (shards, _hf_sections(folder / "bert")),
        "pairs": (shards, {}),
        "words": (shards, _pretext_sections(folder / "bert", {"name": "masked_words"})),
        "sentences": (
            shards,
            _pretext_sections(folder / "bert", {"name": "sentence_order", "task": "next"}),
        ),
        "images": (
            images,
            {
                "objective": {"name": "classification"},
                "evaluation": {"classifier": True},
                "schedule": {"epochs": 1},
            },
        ),
    }
    recipes = {}
    for name, (data, own) in sections.items():
        path = write_recipe(folder / name, data, **{k: v for k, v in own.items() if v is not None})
        if own.get("augmentation", ...) is None:
            _drop(path, "augmentation")
        recipes[name] = path
    kill_ranks(3, recipes["killed"], "checkpoint.every_steps=2")
    attempts = [Attempt(path, resume=name == "killed") for name, path in recipes.items()]
    outcomes = train_in_group(attempts, 2)[0]
    yield Runs(folder, dict(zip(recipes, outcomes, strict=True)))


def _drop(recipe: Path, section: str) -> None:
    import yaml

    document = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    del document[section]
    recipe.write_text(yaml.safe_dump(document), encoding="utf-8")


def test_texts_without_images_train_a_classifier_whose_figures_are_written(runs: Runs) -> None:
    for name in ("whole", "killed", "encoder"):
        assert runs.outcomes[name].error == "", name
    log = runs.outcomes["whole"].log
    assert "20 of 42 samples in" in log and "3 epochs of 2 steps" in log
    assert "the last 4 samples of each epoch's order are dropped" in log
    assert "retrieval is not measured: the objective trains no image" in log
    assert "2 of 42 samples of data.validation cannot be used; the first: sample 90 has no" in log
    *_, last = (e for e in read_metrics(runs.folder / "whole" / "run") if "val/" in str(e))
    names = ("accuracy@1", "macro_precision", "macro_recall", "macro_f1")
    assert all(0 <= last[f"val/classifier/{name}"] <= 1 for name in names)
    assert last["val/classifier/samples"] == 40


def test_a_killed_run_on_a_noisy_subset_ends_bit_for_bit_the_same(runs: Runs) -> None:
    assert "resuming after step 2 of 6" in runs.outcomes["killed"].log
    assert have_same_weights(runs.folder / "whole" / "run", runs.folder / "killed" / "run")
    heads = [load_file(runs.folder / n / "run" / "model" / HEADS_NAME) for n in ("whole", "killed")]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])


def test_samples_without_text_or_label_are_skipped_and_counted(runs: Runs) -> None:
    skipped = (runs.folder / "encoder" / "run" / "skipped.jsonl").read_text().splitlines()
    assert {json.loads(line)["reason"] for line in skipped} <= {"no caption", "no label"}
    assert skipped
    assert not (runs.folder / "whole" / "run" / "skipped.jsonl").exists()


def test_objectives_that_need_images_refuse_texts_alone(runs: Runs) -> None:
    assert "no image" in runs.outcomes["pairs"].error


def test_a_text_tower_of_a_folder_begins_with_its_weights_and_travels(
    runs: Runs, tmp_path: Path
) -> None:
    run = runs.folder / "encoder" / "run"
    given = load_file(runs.folder / "bert" / "model.safetensors")
    export_model(run, tmp_path / "out", with_heads=True)
    (runs.folder / "bert").rename(runs.folder / "elsewhere")
    try:
        parts = load_model(tmp_path / "out")
    finally:
        (runs.folder / "elsewhere").rename(runs.folder / "bert")
    state = parts.model.state_dict()
    for name, tensor in given.items():  # the learning rate is next to nothing
        torch.testing.assert_close(
            state[f"text.transformer.{name}"], tensor, rtol=0, atol=1e-6, msg=name
        )
    assert parts.tokenizer(["a cat"]).shape == (1, 12)
    [checkpoint] = (run / "checkpoints").glob("step-*")
    for folder in (tmp_path / "out", run / "model", checkpoint / "model"):
        written = json.loads((folder / CONFIG_NAME).read_text())["model_cfg"]["text_cfg"]
        assert written["hf_model_name"] == written["hf_tokenizer_name"] == str(folder)
        assert written["hf_model_pretrained"] is False  # the weights lie in the folder
    assert parts.config["vision_cfg"] == SMALLEST_IMAGE_TOWER
    features = parts.model.encode_text(parts.tokenizer(["a cat", "a dog on the picture"]))  # type: ignore[operator]
    assert features.shape == (2, 32) and features.isfinite().all()
    heads = load_file(tmp_path / "out" / HEADS_NAME)
    assert heads["classifier.1.weight"].shape == (3, 32)


def test_a_classifier_of_images_is_measured_too(runs: Runs) -> None:
    assert runs.outcomes["images"].error == ""
    *_, last = (e for e in read_metrics(runs.folder / "images" / "run") if "val/" in str(e))
    assert last["val/classifier/samples"] == 50
    assert 0 <= last["val/classifier/macro_f1"] <= 1


@pytest.mark.parametrize("name", ["words", "sentences"])
def test_pretext_tasks_learn_from_texts_alone(name: str, runs: Runs) -> None:
    assert runs.outcomes[name].error == ""
    figures = [e for e in read_metrics(runs.folder / name / "run") if "loss" in e]
    assert figures[-1]["loss"] < figures[0]["loss"] * 0.9
    assert figures[-1]["accuracy"] > figures[0]["accuracy"]
    skipped = (runs.folder / name / "run" / "skipped.jsonl").read_text().splitlines()
    reasons = {json.loads(line)["reason"] for line in skipped}
    assert "no caption" in reasons
    assert ("too few sentences" in reasons) == (name == "sentences")
