from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import clipsys
from clipsys.errors import ConfigError, DataError, ImageDecodeError, ModelError
from clipsys.models.encoder import Encoder
from clipsys.models.open_clip_models import build_model
from clipsys.zeroshot.attention import AttentionRecorder
from clipsys.zeroshot.explain import explain, explain_class
from tests.conftest import TINY_MODEL, noise_image

VIT = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
TOWERS: dict[str, dict[str, Any]] = {
    "class token": VIT,
    "average": {**VIT, "pool_type": "avg"},
    "attention pooling": {
        **VIT, "attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2,
    },
    "ModifiedResNet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
    "timm map head": {"image_size": 160, "timm_model_name": "test_vit3", "timm_pool": "map"},
    "timm ConvNeXt": {"image_size": 96, "timm_model_name": "test_convnext", "timm_pool": "avg"},
}  # fmt: skip


def _encoder(vision: dict[str, Any]) -> Encoder:
    torch.manual_seed(0)
    return Encoder(build_model({**TINY_MODEL, "vision_cfg": vision}), precision="fp32")


@pytest.mark.parametrize("kind", TOWERS)
def test_every_kind_of_tower_gives_a_map_and_is_left_as_it_was(kind: str) -> None:
    encoder = _encoder(TOWERS[kind])
    image = noise_image(1)
    before = encoder.encode_image([image])
    found = explain(encoder, image, "a cat", against=["a dog"])
    assert found.method == ("grad-cam" if "Net" in kind or "NeXt" in kind else "attention")
    assert found.map_HW.shape == encoder.preprocessing.size
    assert found.map_HW.min() >= 0 and found.map_HW.max() in (0, pytest.approx(1))
    assert found.similarity == pytest.approx(
        float(before[0] @ encoder.encode_text(["a cat"])[0]), abs=1e-4
    )
    assert (encoder.encode_image([image]) == before).all()
    assert not any(module._forward_hooks for module in encoder.model.modules())
    assert not any(one.requires_grad or one.grad is not None for one in encoder.model.parameters())


def test_hooks_are_removed_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = _encoder(VIT)

    def fail(image: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(encoder.model, "encode_image", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        explain(encoder, noise_image(1), "a cat")
    assert not any(module._forward_hooks for module in encoder.model.modules())


def test_recorded_attention_gives_the_same_features() -> None:
    encoder = _encoder(VIT)
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = encoder.model.encode_image(image)
        with AttentionRecorder() as recorder:
            torch.testing.assert_close(encoder.model.encode_image(image), plain)
    assert [tuple(one.shape) for one in recorder.probabilities] == [(2, 2, 17, 17)] * 2


def test_other_weights_give_another_map() -> None:
    image, target = noise_image(1), np.eye(32, dtype=np.float32)[0]
    encoder = _encoder(VIT)
    first = explain(encoder, image, target).map_HW
    torch.manual_seed(7)
    with torch.no_grad():
        for one in encoder.model.visual.parameters():
            one.copy_(one.flatten()[torch.randperm(one.numel())].view_as(one))
    second = explain(encoder, image, target).map_HW
    assert np.corrcoef(first.ravel(), second.ravel())[0, 1] < 0.9


def test_the_map_lies_on_what_the_model_saw_of_the_picture() -> None:
    found = explain(_encoder(VIT), Image.new("RGB", (64, 32), "white"), "a cat")
    assert found.box == (16, 0, 48, 32)
    assert found.picture_map().shape == (32, 64)
    assert (found.picture_map()[:, :16] == 0).all() and (found.picture_map()[:, 48:] == 0).all()
    overlay = np.asarray(found.overlay())
    assert overlay.shape == (32, 64, 3)
    assert (overlay[:, :15] < 100).all() and overlay[:, 17:47].max() > 100


def test_errors_name_what_was_given() -> None:
    encoder = _encoder(VIT)
    image, classes = noise_image(1), ["cat", "dog"]
    with pytest.raises(ConfigError, match=r"'cut' is none of the 2 classes; did you mean 'cat'"):
        explain_class(encoder, image, "cut", classes, np.eye(2, 32, dtype=np.float32))
    with pytest.raises(ConfigError, match=r"vector of shape .*7.* does not fit"):
        explain(encoder, image, np.ones(7, np.float32))
    with pytest.raises(ConfigError, match="method 'lime' is not known"):
        explain(encoder, image, "a cat", method="lime")  # type: ignore[arg-type]
    encoder.model.visual = torch.nn.Flatten()
    with pytest.raises(ModelError, match="its image tower is a Flatten"):
        explain(encoder, image, "a cat")


def test_one_text_and_a_list_of_it_are_the_same_contrast() -> None:
    encoder = _encoder(VIT)
    one, several, other = (
        explain(encoder, noise_image(1), "a cat", against=texts).map_HW
        for texts in ("a dog", ["a dog"], list("a dog"))
    )
    assert (one == several).all() and not (one == other).all()


def test_a_classifier_explains_the_nearest_class_or_the_one_that_is_named(tmp_path: Path) -> None:
    encoder, image = _encoder(VIT), noise_image(1)
    classifier = clipsys.ZeroShotClassifier(encoder, ["cat", "dog", "bird"], cache=False)
    (prediction,) = classifier.predict(image)
    nearest = classifier.explain(image)
    assert (nearest.label, nearest.contrasted) == (prediction.label, True)
    assert nearest.similarity == pytest.approx(prediction.scores[prediction.label], abs=1e-4)
    image.save(tmp_path / "one.png")
    for number, name in enumerate(classifier.classes):
        found = classifier.explain(tmp_path / "one.png", name)
        others_CD = np.delete(classifier.class_CD, number, axis=0)
        naive = explain(encoder, image, classifier.class_CD[number], against=others_CD)
        np.testing.assert_array_equal(found.map_HW, naive.map_HW)
        assert found.label == name
    found.save(tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as saved:
        assert np.array_equal(np.asarray(saved), np.asarray(found.overlay()))
    with pytest.raises(DataError, match=r"map\.png: cannot be written"):
        found.save(tmp_path / "none" / "map.png")


def test_one_class_alone_is_explained_without_contrast() -> None:
    classifier = clipsys.ZeroShotClassifier(
        _encoder(VIT), ["cat"], background=["a landscape"], cache=False
    )
    found = classifier.explain(noise_image(1))
    assert (found.label, found.contrasted) == ("cat", False)
    with pytest.raises(ConfigError, match="'dog' is none of the 1 classes"):
        classifier.explain(noise_image(1), "dog")


def test_a_classifier_explains_one_image_at_a_time() -> None:
    classifier = clipsys.ZeroShotClassifier(_encoder(VIT), ["cat", "dog"], cache=False)
    with pytest.raises(DataError, match="no image is given; explain takes one"):
        classifier.explain([])
    with pytest.raises(DataError, match="more than one image is given; explain takes one"):
        classifier.explain([noise_image(1), noise_image(2)])
    with pytest.raises(ImageDecodeError, match="image 0: not an image"):
        classifier.explain(b"no picture")
