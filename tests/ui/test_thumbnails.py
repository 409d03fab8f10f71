from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from clipsys.retrieval import Item
from clipsys.ui.thumbnails import THUMBNAIL_SIDE, ThumbnailCache
from tests.retrieval.colours import COLOURS


def item(path: Path, content_hash: str = "abc") -> Item:
    return Item(1, str(path), content_hash, 1, 1, (), {})


def test_thumbnail_is_small_and_named_by_content(tmp_path: Path) -> None:
    source = tmp_path / "secret name.png"
    Image.new("RGB", (2000, 1000), COLOURS["red"]).save(source)
    (path,) = ThumbnailCache(tmp_path / "cache").paths([item(source)])
    assert path == tmp_path / "cache" / "abc.webp"
    with Image.open(path) as thumbnail:
        assert thumbnail.size == (THUMBNAIL_SIDE, THUMBNAIL_SIDE // 2)


def test_thumbnail_is_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    (path,) = ThumbnailCache(tmp_path / "cache").paths([item(tmp_path / "a.jpg")])
    with Image.open(path) as thumbnail:
        assert thumbnail.size == (20, 40)


def test_thumbnail_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "a.png"
    Image.new("RGB", (9, 9)).save(source)
    cache = ThumbnailCache(tmp_path / "cache")
    first = cache.paths([item(source)])
    source.unlink()
    assert cache.paths([item(source)]) == first
    assert [path.name for path in cache.folder.iterdir()] == ["abc.webp"]


@pytest.mark.parametrize("content", [None, b"", b"damaged"])
def test_image_that_is_gone_or_damaged_gets_a_placeholder(
    tmp_path: Path, content: bytes | None
) -> None:
    source = tmp_path / "a.png"
    if content is not None:
        source.write_bytes(content)
    (path,) = ThumbnailCache(tmp_path / "cache").paths([item(source)])
    assert path.name == "unavailable.webp"
    with Image.open(path) as picture:
        assert picture.size == (320, 320)
    # It is not taken for the image's thumbnail once the image is back.
    Image.new("RGB", (9, 9)).save(source)
    assert ThumbnailCache(tmp_path / "cache").paths([item(source)])[0].name == "abc.webp"


def test_folder_that_cannot_be_made_is_replaced_by_a_temporary_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = ThumbnailCache(tmp_path / "file" / "cache")
    assert cache.folder.is_dir()
    assert tmp_path not in cache.folder.parents
    cache.folder.rmdir()
