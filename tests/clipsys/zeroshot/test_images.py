from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import clipsys
from clipsys.errors import ConfigError, DataError, ImageDecodeError
from clipsys.zeroshot.images import count_of
from tests.conftest import noise_image


@pytest.fixture(scope="module")
def classifier(model_folder: Path) -> clipsys.ZeroShotClassifier:
    return clipsys.ZeroShotClassifier(clipsys.load(model_folder), ["cat", "dog"], cache=False)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


class _Stored:
    """What a collection offers, over vectors that exist."""

    def __init__(self, encoder: clipsys.Encoder, fingerprint: str) -> None:
        self.encoder_pin = SimpleNamespace(name="other", fingerprint=fingerprint)
        self._vectors_ND = encoder.encode_image([noise_image(0)])

    def __len__(self) -> int:
        return 1

    def stored_vectors(self) -> Iterator[tuple[list[Any], Any]]:
        yield [SimpleNamespace(uri="a.png")], self._vectors_ND


def test_every_form_of_an_image_gives_the_same_prediction(
    classifier: clipsys.ZeroShotClassifier, tmp_path: Path
) -> None:
    image = noise_image(0)
    values = np.asarray(image)
    path = tmp_path / "pictures" / "one.png"
    path.parent.mkdir()
    image.save(path)
    table = tmp_path / "table.csv"
    table.write_text("path\npictures/one.png\n")
    forms: list[Any] = [
        [image], image, path, str(path), [path], _png(image), io.BytesIO(_png(image)),
        values, values[None], values.transpose(2, 0, 1), values.astype(np.float32) / 255,
        torch.from_numpy(values.transpose(2, 0, 1).copy()), torch.from_numpy(values.copy()) / 255,
        path.parent, table, (one for one in [image]),
        _Stored(classifier.encoder, classifier.encoder.fingerprint),
    ]  # fmt: skip
    (expected,) = classifier.predict([image])
    for form in forms:
        (found,) = classifier.predict(form)
        assert found.scores == pytest.approx(expected.scores, abs=1e-6), type(form)


def test_a_grey_array_is_a_grey_image(classifier: clipsys.ZeroShotClassifier) -> None:
    grey = noise_image(0).convert("L")
    (expected,) = classifier.predict([grey])
    for form in (np.asarray(grey), np.asarray(grey)[:, :, None], np.asarray(grey)[None]):
        assert classifier.predict(form) == [expected]


def test_a_generator_is_not_read_far_ahead(classifier: clipsys.ZeroShotClassifier) -> None:
    given = 0

    def images() -> Iterator[Image.Image]:
        nonlocal given
        for number in range(1_000):
            given += 1
            yield noise_image(number % 3)

    outstanding = []
    for done, _ in enumerate(classifier.stream(images(), show_progress=False)):
        outstanding.append(given - done)
    assert (len(outstanding), given) == (1_000, 1_000)
    assert max(outstanding) <= 5 * 64


def test_what_cannot_be_used_is_raised_or_skipped(
    classifier: clipsys.ZeroShotClassifier, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(_png(noise_image(0))[:200])
    opened = Image.open(io.BytesIO(_png(noise_image(0))[:200]))  # Pillow reads its pixels later
    images = [noise_image(0), broken, opened, np.full((4, 4, 3), 7.0), noise_image(1)]
    found = list(classifier.stream(images, on_error="skip"))
    assert [name for name, _ in found] == ["image 0", "image 4"]
    for name in ("broken.png", "image 2", "image 3"):
        assert name in caplog.text
    for one in (broken, opened):
        with pytest.raises(ImageDecodeError, match="does not decode"):
            classifier.predict([one])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (7, "image 0 is of type int; expected a path"),
        ({"a": 1}, "image 0 is of type dict"),
        (np.full((4, 4, 3), np.nan), "floats from nan"),
        (np.full((4, 4, 3), -2.0), "floats from -2 to 0; expected 0 to 1, not normalised"),
        (np.zeros((5, 5, 7), np.uint8), r"an array of shape \(5, 5, 7\) is no image"),
        (np.zeros((0, 4, 3), np.uint8), r"an array of shape \(0, 4, 3\) is no image"),
        (np.zeros((4, 4, 3), np.int64), "an array of int64; expected uint8"),
    ],
)
def test_what_is_no_image_is_refused(
    classifier: clipsys.ZeroShotClassifier, image: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        classifier.predict(image)


def test_vectors_of_another_model_are_refused(classifier: clipsys.ZeroShotClassifier) -> None:
    with pytest.raises(DataError, match=r"vectors are of model other .*make the classifier with"):
        classifier.predict(_Stored(classifier.encoder, "0" * 64))


def test_senseless_options_are_refused(classifier: clipsys.ZeroShotClassifier) -> None:
    with pytest.raises(ConfigError, match="on_error is 'ignore'; expected 'raise' or 'skip'"):
        classifier.predict([], on_error="ignore")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="top_k is 0; expected 1 or more"):
        classifier.predict([], top_k=0)


def test_images_are_counted_where_that_needs_no_reading(tmp_path: Path) -> None:
    photo = np.zeros((5, 6, 3), np.uint8)
    assert count_of(photo) == count_of(torch.tensor(photo)) == count_of(b"") == 1
    assert count_of([photo, photo[None], "a.jpg"]) == 3
    assert count_of([tmp_path]) is None
    assert count_of(iter([photo])) is None
