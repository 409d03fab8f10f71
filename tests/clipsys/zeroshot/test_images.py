from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

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


@pytest.mark.parametrize("kind", ["transparent", "turned", "16 bits"])
def test_an_opened_image_is_what_its_file_is(
    classifier: clipsys.ZeroShotClassifier, kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "one.png"
    if kind == "transparent":
        image = noise_image(0).convert("RGBA")
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(path)
    elif kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        noise_image(0).save(path, exif=exif)
    else:
        Image.fromarray(np.arange(1_600, dtype=np.uint16).reshape(40, 40) * 40).save(path)
    (expected,) = classifier.predict(path)
    with Image.open(path) as opened:
        assert classifier.predict(opened) == [expected]
        (vector_D,) = classifier.encoder.encode_image([opened])
        explained = classifier.explain(opened)
    np.testing.assert_array_equal(vector_D, classifier.encoder.encode_image([path])[0])
    assert explained.image.tobytes() == classifier.explain(path).image.tobytes()


def test_transparent_boolean_and_half_precision_are_images(
    classifier: clipsys.ZeroShotClassifier,
) -> None:
    black = Image.new("RGB", (8, 8))
    (expected,) = classifier.predict(black)
    transparent = np.full((8, 8, 4), 255, np.uint8)
    transparent[..., 3] = 0
    assert classifier.predict(np.zeros((8, 8), bool)) == [expected]
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert classifier.predict(torch.zeros(3, 8, 8, dtype=dtype)) == [expected]
    assert classifier.predict(transparent) == classifier.predict(Image.new("RGB", (8, 8), "white"))


def test_frames_that_share_a_buffer_stay_apart(
    classifier: clipsys.ZeroShotClassifier, tmp_path: Path
) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "lime")]
    expected = classifier.predict(frames)

    def arrays() -> Iterator[Any]:
        buffer = np.zeros((16, 16, 3), np.uint8)
        for frame in frames:
            buffer[:] = np.asarray(frame)
            yield buffer

    path = tmp_path / "animation.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert classifier.predict(arrays()) == expected
    assert classifier.predict(torch.from_numpy(one) for one in arrays()) == expected
    with Image.open(path) as animation:
        assert classifier.predict(ImageSequence.Iterator(animation)) == expected


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
