from __future__ import annotations

import hashlib
import math
import random
import re
import subprocess
import sys
from itertools import combinations
from typing import get_args

import pytest

from clipsys.demo.corpus import make_item, make_items
from clipsys.demo.drawing import draw
from clipsys.demo.scenes import (
    COLOURS,
    SHAPES,
    SIZES,
    SPLITS,
    TEXTURES,
    Scene,
    Shape,
    Split,
    all_combinations,
    captions,
    class_names,
    held_out_combinations,
    make_scene,
    relation,
    seen_combinations,
)

_OPPOSITE = {
    "above": "below",
    "below": "above",
    "to the left of": "to the right of",
    "to the right of": "to the left of",
}
_NAMED = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")


def _scenes(split: Split, count: int) -> list[Scene]:
    return [make_scene(index, split) for index in range(count)]


def _combinations_in(scenes: list[Scene]) -> set[tuple[str, str]]:
    return {shape.combination for scene in scenes for shape in scene.shapes}


def test_held_out_combinations_are_a_sixth_and_leave_each_word_in_training() -> None:
    held_out = held_out_combinations()
    assert len(held_out) == len(all_combinations()) / 6
    for colour in COLOURS:
        assert sum(pair[0] == colour for pair in held_out) == 2
    for kind in SHAPES:
        assert sum(pair[1] == kind for pair in held_out) == 2
    assert not held_out & set(seen_combinations())
    assert held_out | set(seen_combinations()) == set(all_combinations())
    assert len(set(class_names())) == len(COLOURS) * len(SHAPES)


@pytest.mark.parametrize("split", ["train", "seen", "retrieval"])
def test_no_split_but_held_out_contains_a_held_out_combination(split: Split) -> None:
    found = _combinations_in(_scenes(split, 1500))
    assert found == set(seen_combinations())  # every one of them, and nothing else


def test_held_out_scenes_show_every_held_out_combination_and_nothing_else() -> None:
    scenes = _scenes("held_out", len(held_out_combinations()))
    assert _combinations_in(scenes) == held_out_combinations()
    assert all(len(scene.shapes) == 1 for scene in scenes)


def test_splits_have_the_promised_numbers_of_shapes() -> None:
    counts = {
        split: {len(scene.shapes) for scene in _scenes(split, 200)} for split in get_args(Split)
    }
    assert counts == {"train": {1, 2, 3}, "seen": {1}, "held_out": {1}, "retrieval": {2, 3}}


def test_every_size_and_texture_occurs() -> None:
    scenes = _scenes("train", 200)
    assert {shape.size for scene in scenes for shape in scene.shapes} == set(SIZES)
    assert {scene.background.texture for scene in scenes} == set(TEXTURES)


@pytest.mark.parametrize("split", ["train", "retrieval"])
def test_part_of_the_scenes_cannot_be_told_by_colour(split: Split) -> None:
    several = [scene for scene in _scenes(split, 600) if len(scene.shapes) > 1]
    one_colour = [scene for scene in several if len({s.colour for s in scene.shapes}) == 1]
    # 0.4 by choice and a few by chance; the band is more than four standard deviations wide.
    assert 0.3 < len(one_colour) / len(several) < 0.54
    assert all(len({s.kind for s in scene.shapes}) == len(scene.shapes) for scene in one_colour)


def test_a_scene_depends_on_its_index_split_and_seed_alone() -> None:
    scene = make_scene(3, "train", seed=5)
    make_scene(4, "train", seed=5)
    assert make_scene(3, "train", seed=5) == scene
    others = {
        make_scene(4, "train", seed=5).shapes,
        make_scene(3, "train", seed=6).shapes,
        make_scene(3, "retrieval", seed=5).shapes,
    }
    assert scene.shapes not in others and len(others) == 3


def test_another_process_makes_the_same_bytes() -> None:
    program = (
        "import hashlib\n"
        "from clipsys.demo.corpus import make_items\n"
        "for item in make_items('train', 20, seed=1):\n"
        "    print(hashlib.sha256(item.image.tobytes()).hexdigest(), item.captions, item.metadata)"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert runs[0] == runs[1]
    here = [
        f"{hashlib.sha256(i.image.tobytes()).hexdigest()} {i.captions} {i.metadata}"
        for i in make_items("train", 20, seed=1)
    ]
    assert runs[0].splitlines() == here


def test_shapes_stay_inside_the_image_and_apart() -> None:
    for scene in _scenes("train", 400):
        for shape in scene.shapes:
            for centre in (shape.x, shape.y):
                assert shape.radius <= centre <= 1 - shape.radius
        for a, b in combinations(scene.shapes, 2):
            assert math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius


def test_sizes_do_not_overlap() -> None:
    radii: dict[str, list[float]] = {size: [] for size in SIZES}
    for scene in _scenes("train", 300):
        for shape in scene.shapes:
            radii[shape.size].append(shape.radius)
    assert max(radii["small"]) < min(radii["medium"])
    assert max(radii["medium"]) < min(radii["large"])


def _shape_at(x: float, y: float) -> Shape:
    return Shape("circle", "red", "small", x, y, 0.1, 0.0, COLOURS["red"])


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0.5, 0.2), (0.5, 0.8), "above"),
        ((0.5, 0.8), (0.6, 0.2), "below"),
        ((0.2, 0.5), (0.8, 0.6), "to the left of"),
        ((0.8, 0.5), (0.2, 0.5), "to the right of"),
        ((0.2, 0.2), (0.8, 0.8), None),
    ],
)
def test_relation_follows_the_longer_offset(
    first: tuple[float, float], second: tuple[float, float], expected: str | None
) -> None:
    assert relation(_shape_at(*first), _shape_at(*second)) == expected


def _wrong_statements(scene: Scene, caption: str) -> list[str]:
    """What a caption says that its scene does not show; read with a grammar of the test's own."""
    by_label = {shape.label: shape for shape in scene.shapes}
    wrong = []
    for match in _NAMED.finditer(caption):
        shape = by_label.get(match[0])
        size = re.search(rf"(\w+) {match[0]}", caption)
        if shape is None:
            wrong.append(match[0])
        elif size is not None and size[1] in SIZES and size[1] != shape.size:
            wrong.append(size[0])
    places = "above|below|to the left of|to the right of"
    for first, where, second in re.findall(
        rf"(\w+ \w+) ({places}) an? (?:(?:{'|'.join(SIZES)}) )?(\w+ \w+)", caption
    ):
        a, b = by_label[first], by_label[second]
        true = {
            "above": a.y < b.y,
            "below": a.y > b.y,
            "to the left of": a.x < b.x,
            "to the right of": a.x > b.x,
        }
        if not true[where]:
            wrong.append(f"{first} {where} {second}")
    ground = re.search(r"on a (\w+) background", caption)
    if ground is not None and ground[1] != scene.background.texture:
        wrong.append(ground[0])
    return wrong


def test_captions_name_every_shape_and_state_nothing_false() -> None:
    num_relations = 0
    for scene in _scenes("train", 400):
        texts = captions(scene, random.Random(0))
        assert len(texts) == len(set(texts)) == 5
        for text in texts:
            labels = sorted(match[0] for match in _NAMED.finditer(text))
            assert labels == sorted(shape.label for shape in scene.shapes)
            assert _wrong_statements(scene, text) == []
            num_relations += any(where in text for where in _OPPOSITE)
    assert num_relations > 400  # else the check of relations above has checked nothing


def test_the_check_of_captions_notices_each_kind_of_falsehood() -> None:
    scene = next(s for s in _scenes("retrieval", 50) if len(s.shapes) == 2)
    text = captions(scene, random.Random(0))[0]
    where = next(place for place in _OPPOSITE if f" {place} " in text)
    size = scene.shapes[0].size
    other_size = next(s for s in SIZES if s not in {shape.size for shape in scene.shapes})
    texture = scene.background.texture
    other_texture = next(t for t in TEXTURES if t != texture)
    for true, false in ((where, _OPPOSITE[where]), (size, other_size), (texture, other_texture)):
        assert _wrong_statements(scene, text) == []
        assert _wrong_statements(scene, text.replace(true, false, 1)) != []


def test_captions_use_the_article_that_fits() -> None:
    for scene in _scenes("train", 300):
        for text in captions(scene, random.Random(1)):
            assert re.search(r"\ba [aeiou]|\ban [^aeiou]", text) is None


def test_first_caption_is_complete() -> None:
    for scene in _scenes("retrieval", 100):
        first = captions(scene, random.Random(2))[0]
        for shape in scene.shapes:
            assert f"{shape.size} {shape.label}" in first
        assert any(f" {where} " in first for where in _OPPOSITE)
        assert first.endswith(f" on a {scene.background.texture} background")


def _mean_colour(scene: Scene, shape: Shape) -> tuple[float, ...]:
    """The mean colour of a small patch where a solid shape has its centre."""
    image = draw(scene, size_px=128)
    left, top = round(128 * shape.x) - 2, round(128 * shape.y) - 2
    patch = image.crop((left, top, left + 4, top + 4))
    pixels = [patch.getpixel((x, y)) for x in range(4) for y in range(4)]
    triples = [pixel for pixel in pixels if isinstance(pixel, tuple)]
    return tuple(sum(channel) / len(triples) for channel in zip(*triples, strict=True))


def test_the_drawn_colour_is_nearest_to_the_named_colour() -> None:
    solid = {"circle", "square", "triangle", "star", "heart", "cross", "diamond"}
    checked = 0
    for scene in _scenes("train", 150):
        for shape in scene.shapes:
            if shape.kind in solid:
                drawn = _mean_colour(scene, shape)
                nearest = min(COLOURS, key=lambda name: math.dist(COLOURS[name], drawn))
                assert nearest == shape.colour
                checked += 1
    assert checked > 100


@pytest.mark.parametrize("size_px", [32, 64, 96])
def test_images_are_rgb_squares_of_the_size_asked_for(size_px: int) -> None:
    image = draw(make_scene(0, "train"), size_px=size_px)
    assert image.mode == "RGB"
    assert image.size == (size_px, size_px)


def test_every_shape_draws_a_picture_of_its_own() -> None:
    background = make_scene(0, "seen").background
    pictures = {
        draw(
            Scene("k", "seen", (Shape(k, "red", "large", 0.5, 0.5, 0.225, 0.0, (217, 35, 42)),),
                  background)
        ).tobytes()
        for k in SHAPES
    }  # fmt: skip
    assert len(pictures) == len(SHAPES)


def test_items_carry_key_label_and_metadata() -> None:
    item = make_item(make_scene(1, "held_out"))
    assert item.key == "held_out-000001"
    assert item.label in class_names()
    assert item.metadata["combination"] == "held_out"
    assert item.metadata["content"] == item.label
    assert item.metadata["background"] in TEXTURES
    scene = next(s for s in _scenes("retrieval", 10) if len(s.shapes) == 2)
    pair = make_item(scene)
    assert pair.label is None
    assert pair.metadata["combination"] == "seen"
    assert pair.metadata["objects"] == [
        {"colour": s.colour, "shape": s.kind, "size": s.size, "label": s.label}
        for s in scene.shapes
    ]


def test_keys_are_unique_over_all_splits() -> None:
    keys = [scene.key for split in SPLITS for scene in _scenes(split, 50)]
    assert len(set(keys)) == len(keys)


def test_an_unknown_split_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'test'; expected one of train, seen"):
        make_scene(0, "test")  # type: ignore[arg-type]


def test_a_negative_index_and_a_tiny_image_are_refused() -> None:
    with pytest.raises(ValueError, match="index is -1"):
        make_scene(-1, "train")
    with pytest.raises(ValueError, match="size_px is 4"):
        draw(make_scene(0, "train"), size_px=4)


def test_an_unknown_shape_is_refused_with_the_known_ones() -> None:
    scene = make_scene(0, "seen")
    strange = Shape("blob", "red", "small", 0.5, 0.5, 0.1, 0.0, (200, 0, 0))
    with pytest.raises(ValueError, match="'blob' is not a shape; expected one of circle"):
        draw(Scene("k", "seen", (strange,), scene.background))
