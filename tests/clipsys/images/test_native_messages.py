"""What libtiff prints is told with the image that it is about."""

from __future__ import annotations

import io
import os

import pytest

from clipsys.errors import ImageDecodeError
from clipsys.images.decoding import decode_image
from clipsys.images.native_messages import captured_messages
from tests.conftest import noise_image


def test_messages_of_a_damaged_tiff_stand_in_its_error(capfd: pytest.CaptureFixture[str]) -> None:
    buffer = io.BytesIO()
    noise_image(3, (64, 64)).save(buffer, "TIFF", compression="tiff_lzw")
    data = bytearray(buffer.getvalue())
    data[16:400] = b"\xff" * 384
    with pytest.raises(ImageDecodeError, match=r"a\.tif: the image does not decode \(.*; .*\)"):
        decode_image(bytes(data), uri="a.tif")
    assert capfd.readouterr().err == ""


def test_sound_tiff_decodes_as_before() -> None:
    buffer = io.BytesIO()
    image = noise_image(3, (64, 64))
    image.save(buffer, "TIFF", compression="tiff_lzw")
    assert decode_image(buffer.getvalue()).tobytes() == image.tobytes()


def test_what_others_print_meanwhile_is_passed_on(capfd: pytest.CaptureFixture[str]) -> None:
    with captured_messages() as messages:
        os.write(2, b"indexing: 3/5 images\ntempfile.tif: Using code not yet in table.\n")
    assert messages == ["Using code not yet in table"]
    assert capfd.readouterr().err == "indexing: 3/5 images\n"
