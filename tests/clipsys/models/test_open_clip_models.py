from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import clipsys
from clipsys.errors import ModelError
from clipsys.models.hub import without_hub
from clipsys.models.open_clip_models import (
    build_model,
    fingerprint,
    load_model,
    read_card,
    save_model,
)
from clipsys.models.tokenization import make_tokenizer
from tests.conftest import TINY_MODEL, noise_image
from tests.tiny_models import (
    HF_TEXT_TOWERS,
    SIGLIP_PREPROCESS,
    coca_config,
    hf_text_config,
    siglip_config,
    write_text_model,
    write_tokenizer,
)


def test_stock_open_clip_loads_an_export_with_the_same_embeddings(model_folder: Path) -> None:
    import open_clip

    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{model_folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{model_folder}")
    images = [noise_image(seed) for seed in range(4)]
    texts = ["a dog", "two cats on a very long wall " * 5, ""]
    with torch.no_grad():
        image_ND = model.encode_image(torch.stack([transform(i) for i in images]), normalize=True)
        text_ND = model.encode_text(tokenizer(texts), normalize=True)
    encoder = clipsys.load(model_folder)
    np.testing.assert_allclose(encoder.encode_image(images), image_ND.numpy(), atol=1e-5)
    np.testing.assert_allclose(encoder.encode_text(texts), text_ND.numpy(), atol=1e-5)


def test_the_scale_is_0d_on_disk_and_1d_in_training(model_folder: Path) -> None:
    from safetensors.torch import load_file

    assert load_file(model_folder / "open_clip_model.safetensors")["logit_scale"].shape == ()
    assert build_model(TINY_MODEL, for_training=True).model.logit_scale.shape == (1,)


def test_layers_whose_weights_are_loaded_are_not_filled_with_random_numbers() -> None:
    from clipsys.models.construction import without_random_values

    before = torch.random.get_rng_state()
    with without_random_values():
        torch.nn.MultiheadAttention(8, 2)
        torch.nn.Embedding(4, 4)
        torch.nn.Conv2d(3, 8, 4)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert float(torch.nn.Linear(8, 8).weight.detach().std()) > 0  # only while it holds


def test_every_weight_is_the_one_in_the_file(model_folder: Path) -> None:
    from safetensors.torch import load_file

    stored = load_file(model_folder / "open_clip_model.safetensors")
    loaded = load_model(model_folder).model.state_dict()
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in loaded.items())


def test_the_fingerprint_follows_the_weights_and_the_preprocessing(model_folder: Path) -> None:
    parts = load_model(model_folder)
    original = fingerprint(parts)
    card = read_card(model_folder)
    assert card is not None and card.fingerprint == original
    with torch.no_grad():
        parts.model.visual.proj[0, 0] += 1e-3
    assert fingerprint(parts) != original
    other = build_model(TINY_MODEL, preprocess={"mean": [0.5, 0.5, 0.5]})
    other.model.load_state_dict(load_model(model_folder).model.state_dict())
    assert fingerprint(other) != original


def test_altered_weights_are_refused(model_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    card = json.loads((copy / "clipsys.json").read_text())
    card["fingerprint"] = "0" * 64
    (copy / "clipsys.json").write_text(json.dumps(card))
    with pytest.raises(ModelError, match="not those that were exported"):
        load_model(copy)


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_model(build_model(TINY_MODEL), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_replaced_only_when_asked(model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "m"
    save_model(load_model(model_folder), out)
    with pytest.raises(ModelError, match="already exists"):
        save_model(load_model(model_folder), out)
    save_model(load_model(model_folder), out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_what_is_no_model_folder_is_never_replaced(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 1")
    (tmp_path / "file").write_text("mine")
    for name in ("run", "file"):
        with pytest.raises(ModelError, match="is no model folder, which alone is replaced"):
            save_model(load_model(model_folder), tmp_path / name, overwrite=True)
    assert (tmp_path / "run" / "config.yaml").is_file()
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("/nowhere/model", "there is no such model folder"),
        ("ViT-B-33/openai", "did you mean ViT-B-32"),
        ("ViT-B-32", "no pretrained weights of that name; known: ViT-B-32/openai"),
        ("ViT-B-32/nonsense", "no pretrained weights of that name"),
    ],
)
def test_a_missing_model_says_what_there_is(spec: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load_model(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "open_clip_config.json").unlink(), "not a model folder"),
        (lambda f: (f / "open_clip_model.safetensors").unlink(), "has no weights"),
        (lambda f: (f / "open_clip_model.safetensors").write_bytes(b"x"), "cannot be loaded"),
        (lambda f: (f / "open_clip_config.json").write_text("{"), "cannot be loaded"),
        (lambda f: (f / "clipsys.json").write_text("[]"), r"clipsys\.json: damaged"),
    ],
)
def test_a_damaged_folder_is_named(
    model_folder: Path, tmp_path: Path, damage: object, message: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    damage(copy)  # type: ignore[operator]
    with pytest.raises(ModelError, match=message) as caught:
        load_model(copy)
    assert "\n" not in str(caught.value)


def test_an_impossible_architecture_is_a_model_error() -> None:
    # Positions of sines and cosines need a square grid, which nothing but the tower itself says.
    vision = {**TINY_MODEL["vision_cfg"], "image_size": [32, 64], "pos_embed_type": "sin_cos_2d"}
    with pytest.raises(ModelError, match="cannot build this configuration"):
        build_model({**TINY_MODEL, "vision_cfg": vision})


def test_making_a_model_leaves_logging_alone() -> None:
    before = list(logging.getLogger().handlers)
    build_model(TINY_MODEL)
    assert logging.getLogger().handlers == before


@pytest.mark.parametrize("kind", ["siglip", "coca", *HF_TEXT_TOWERS])
def test_every_kind_of_model_travels_in_its_folder(kind: str, tmp_path: Path) -> None:
    """With its tokenizer and configuration inside: nothing else is there after the move."""
    import open_clip

    made = tmp_path / "made"
    if kind == "siglip":
        config = siglip_config(write_tokenizer(tmp_path / "source"))
    elif kind == "coca":
        config = coca_config()
    else:
        config = hf_text_config(write_text_model(tmp_path / "source", kind))
    torch.manual_seed(0)
    save_model(build_model(config, preprocess=SIGLIP_PREPROCESS, for_training=True), made)
    images = [noise_image(seed) for seed in range(3)]
    texts = ["a red square", "", "the picture of a cat " * 30]
    shutil.rmtree(tmp_path / "source", ignore_errors=True)
    with without_hub():
        stock, transform = open_clip.create_model_from_pretrained(f"local-dir:{made}")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{made}")
    with torch.no_grad():
        stock.eval()
        image_ND = stock.encode_image(torch.stack([transform(i) for i in images]), normalize=True)
        text_ND = stock.encode_text(tokenizer(texts), normalize=True)
    moved = made.rename(tmp_path / "moved")
    encoder = clipsys.load(moved, precision="fp32")
    np.testing.assert_allclose(encoder.encode_image(images), image_ND.numpy(), atol=1e-5)
    np.testing.assert_allclose(encoder.encode_text(texts), text_ND.numpy(), atol=1e-5)
    again = tmp_path / "again"
    assert save_model(load_model(moved), again) == encoder.fingerprint
    with without_hub():
        assert open_clip.create_model(f"local-dir:{again}", require_pretrained=True) is not None


def test_names_of_the_hub_are_not_asked_for_once_a_model_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip
    from transformers import AutoConfig

    source = write_text_model(tmp_path / "source", "bert")
    config = hf_text_config(source)
    config["text_cfg"].update(hf_model_name="org/bert", hf_tokenizer_name="org/bert")
    known = AutoConfig.from_pretrained(str(source))
    tokenizer = make_tokenizer(hf_text_config(source))
    with monkeypatch.context() as patched:
        patched.setattr("clipsys.models.hub._ask", lambda _: "")
        patched.setattr(AutoConfig, "from_pretrained", lambda *_, **__: known)
        made = build_model(config, tokenizer=tokenizer)
    # The fingerprint of a tokenizer of the hub holds its name, as it did in version 0.2.0.
    mark = save_model(made, tmp_path / "model")
    assert mark == fingerprint(made, tokenizer="org/bert")
    with without_hub():
        stock = open_clip.create_model(f"local-dir:{tmp_path / 'model'}", require_pretrained=True)
        assert open_clip.get_tokenizer(f"local-dir:{tmp_path / 'model'}")(["a cat"]).shape == (
            1,
            77,
        )
        loaded = load_model(tmp_path / "model")
    assert loaded.loaded_fingerprint == mark
    tokens_BL = tokenizer(["a red square", "a cat"])
    torch.testing.assert_close(
        stock.eval().encode_text(tokens_BL), loaded.model.eval().encode_text(tokens_BL)
    )


def test_a_fingerprint_depends_on_the_tokenizer_and_not_on_its_place(tmp_path: Path) -> None:
    marks = []
    for name, pad_id in (("one", 0), ("two", 0), ("other", 1)):
        torch.manual_seed(0)
        config = siglip_config(write_tokenizer(tmp_path / name, pad_id=pad_id))
        marks.append(fingerprint(build_model(config)))
    assert marks[0] == marks[1] != marks[2]


def test_a_folder_of_version_0_2_keeps_its_fingerprint(tmp_path: Path) -> None:
    """It held the path of the tokenizer's folder."""
    source, made = write_tokenizer(tmp_path / "source"), tmp_path / "made"
    parts = build_model(siglip_config(source))
    save_model(parts, made)
    document = json.loads((made / "open_clip_config.json").read_text())
    document["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = str(source)
    (made / "open_clip_config.json").write_text(json.dumps(document))
    old = fingerprint(parts, tokenizer=str(source))
    (made / "clipsys.json").write_text(json.dumps({"fingerprint": old}))
    assert load_model(made).loaded_fingerprint == old


@pytest.mark.parametrize(
    ("name", "tag", "expected"),
    [
        ("ViT-B-32", "openai", True),
        ("ViT-H-14-worldwide", "metaclip2_worldwide", True),
        ("ViT-B-32", "laion2b_s34b_b79k", False),
        ("roberta-ViT-B-32", "laion2b_s12b_b32k", False),  # its architecture says so itself
    ],
)
def test_the_activation_is_that_of_the_weights(
    name: str, tag: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """open_clip lists some weights under architectures of another activation, and only warns."""
    asked: dict[str, Any] = {}

    def create_model(_: str, **options: Any) -> Any:
        asked.update(options)
        raise RuntimeError("enough")

    monkeypatch.setattr("open_clip.create_model", create_model)
    monkeypatch.setattr("clipsys.models.hub._ask", lambda _: "")
    with pytest.raises(ModelError, match="enough"):
        load_model(f"{name}/{tag}")
    assert asked["force_quick_gelu"] is expected


@pytest.mark.parametrize("card", ['{"fingerprint": 5}', '{"fingerprint": "a", "provenance": 3}'])
def test_a_card_of_other_types_is_damaged(card: str, tmp_path: Path) -> None:
    (tmp_path / "clipsys.json").write_text(card)
    with pytest.raises(ModelError, match=r"clipsys\.json: damaged"):
        read_card(tmp_path)
