from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import clipsys
from clipsys.errors import ConfigError
from clipsys.zeroshot import class_vectors
from clipsys.zeroshot.classes import read_classes
from clipsys.zeroshot.templates import TEMPLATES, find_templates
from tests.conftest import noise_image


@pytest.fixture(scope="module")
def encoder(model_folder: Path) -> clipsys.Encoder:
    return clipsys.load(model_folder)


@pytest.fixture
def encoded(encoder: clipsys.Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """How many texts each call has encoded, with an empty cache."""
    monkeypatch.setenv("CLIPSYS_CACHE", str(tmp_path))
    counts: list[int] = []
    encode: Callable[..., np.ndarray] = encoder.encode_text

    def counting(texts: list[str]) -> np.ndarray:
        counts.append(len(texts))
        return encode(texts)

    monkeypatch.setattr(encoder, "encode_text", counting)
    return counts


def _vectors(encoder: clipsys.Encoder, *, cache: bool = True) -> np.ndarray:
    return class_vectors.class_vectors(encoder, [["a cat", "my cat"], ["a dog"]], cache=cache)


def test_vectors_are_encoded_once(encoder: clipsys.Encoder, encoded: list[int]) -> None:
    first = _vectors(encoder)
    np.testing.assert_array_equal(_vectors(encoder), first)
    assert encoded == [3]
    class_vectors.class_vectors(encoder, [["a cat"], ["my cat", "a dog"]])  # other classes
    assert encoded == [3, 3]
    _vectors(encoder, cache=False)
    assert encoded == [3, 3, 3]


@pytest.mark.parametrize("damage", ["cut", "emptied", "altered", "pickled"])
def test_a_damaged_file_is_computed_again(
    encoder: clipsys.Encoder, encoded: list[int], damage: str
) -> None:
    first = _vectors(encoder)
    (path,) = class_vectors.folder().glob("*.npy")
    content = path.read_bytes()
    damaged = {
        "cut": content[:-5],
        "emptied": b"",
        "altered": content[:-1] + bytes([content[-1] ^ 0x40]),
        "pickled": b"\x80\x04N.",
    }
    path.write_bytes(damaged[damage])
    np.testing.assert_array_equal(_vectors(encoder), first)
    assert encoded == [3, 3]
    assert path.read_bytes() == content


def test_a_folder_that_cannot_be_used_is_no_error(
    encoder: clipsys.Encoder, encoded: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CLIPSYS_CACHE", str(tmp_path / "file"))
    assert _vectors(encoder).shape == (2, encoder.dim)
    assert encoded == [3]


def test_the_cache_is_bounded(
    encoder: clipsys.Encoder, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(class_vectors, "_MAX_FILES", 2)
    for number in range(4):
        class_vectors.class_vectors(encoder, [[f"class {number}"]])
    assert len(list(class_vectors.folder().iterdir())) == 2
    assert len(encoded) == 4


def test_predictions_are_those_of_open_clips_classifier(encoder: clipsys.Encoder) -> None:
    import open_clip
    import torch

    names, templates = ["cat", "dog", "red square", "zebra"], TEMPLATES["clip"][:9]
    theirs = open_clip.build_zero_shot_classifier(
        encoder.model, encoder.tokenizer, names, [t.format for t in templates], device="cpu"
    )
    images = [noise_image(number) for number in range(12)]
    logits = torch.from_numpy(encoder.encode_image(images)) @ theirs.float()
    probability_NC = (encoder.logit_scale * logits).softmax(dim=1).numpy()
    classifier = clipsys.ZeroShotClassifier(encoder, names, templates, cache=False)
    for found, row_C in zip(classifier.predict(images), probability_NC, strict=True):
        assert found.label == names[int(row_C.argmax())]
        assert list(found.probabilities.values()) == pytest.approx(row_C.tolist(), abs=1e-4)


def test_the_large_set_has_80_sentences_of_its_own() -> None:
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    theirs = {template("{}").lower() for template in OPENAI_IMAGENET_TEMPLATES}
    assert len(set(TEMPLATES["clip"])) == 80
    assert {text.lower() for text in TEMPLATES["clip"]} & theirs == {"a photo of a {}."}
    for templates in TEMPLATES.values():
        assert find_templates(list(templates)) == list(templates)


def test_blanks_do_not_make_another_class() -> None:
    assert [one.name for one in read_classes([" red   car", "bus"])] == ["red car", "bus"]
    with pytest.raises(ConfigError, match="classes 1 and 3 are both called 'red car'"):
        read_classes(["red car", "bus", "red  car "])
    with pytest.raises(ConfigError, match=r"'auto' .*'car' \(class 1\) and 'bus' \(class 2\)"):
        read_classes({"car": ["car", "auto"], "bus": ["auto "]})
