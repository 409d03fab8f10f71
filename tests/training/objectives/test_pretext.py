"""Pretext tasks: draws from seeds, permutations, tiles, chroma, and what they refuse."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from clipsys.config import load_settings
from clipsys.errors import ConfigError
from clipsys.training.model.outputs import Inputs, Sizes
from clipsys.training.model.towers import Towers
from clipsys.training.objectives.colour import Colour, ColourConfig, luma, quantised_chroma
from clipsys.training.objectives.draws import drawn_integers
from clipsys.training.objectives.frame_order import orders, shuffled_orders
from clipsys.training.objectives.jigsaw import (
    Jigsaw,
    JigsawConfig,
    distant_permutations,
    shuffle_tiles,
)
from clipsys.training.objectives.rotation import Rotation, RotationConfig
from clipsys.training.recipe import Recipe


def _splitmix64(seed: int, number: int) -> list[int]:
    """With Python's integers."""
    mask, drawn = (1 << 64) - 1, []
    for step in range(1, number + 1):
        z = (seed + step * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        drawn.append((z ^ (z >> 31)) >> 1)
    return drawn


def test_draws_are_those_of_splitmix64_and_look_uniform() -> None:
    seeds = [0, 1, 2**63 - 1, -(2**63), 123456789]
    drawn = drawn_integers(torch.tensor(seeds), 4, 1000)
    assert drawn.tolist() == [[one % 1000 for one in _splitmix64(seed, 4)] for seed in seeds]
    many = drawn_integers(torch.arange(20_000), 2, 10)
    counts = torch.stack([torch.bincount(column, minlength=10) for column in many.T])
    assert (counts - 2000).abs().max() < 250  # 6 standard deviations
    together = torch.bincount(many[:, 0] * 10 + many[:, 1], minlength=100)
    assert (together - 200).abs().max() < 85


def _naive_permutations(length: int, number: int) -> list[tuple[int, ...]]:
    """Algorithm 1 word for word, begun with the identity."""
    remaining = list(itertools.permutations(range(length)))
    chosen = [remaining.pop(0)]
    while len(chosen) < number:
        distances = [
            sum(sum(a != b for a, b in zip(one, other, strict=True)) for other in chosen)
            for one in remaining
        ]
        chosen.append(remaining.pop(distances.index(max(distances))))
    return chosen


def test_permutations_are_those_of_the_papers_algorithm() -> None:
    for length, number in ((4, 24), (4, 7), (5, 12)):
        assert [tuple(one) for one in distant_permutations(length, number).tolist()] == (
            _naive_permutations(length, number)
        )


def test_permutations_of_nine_tiles_lie_far_apart() -> None:
    chosen = distant_permutations(9, 100)
    assert len({tuple(one) for one in chosen.tolist()}) == 100
    distances = (chosen[:, None] != chosen[None]).sum(axis=2)[np.triu_indices(100, 1)]
    assert distances.mean() > 8  # of nine; 8 for random ones


@pytest.mark.parametrize(("tiles", "size"), [(2, 8), (3, 9)])
def test_tiles_stand_where_the_permutation_puts_them(tiles: int, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(5, 3, size, size, generator=generator)
    order = torch.stack([torch.randperm(tiles**2, generator=generator) for _ in range(5)])
    shuffled = shuffle_tiles(image, order, torch.arange(5), tiles, 0.0)
    side = size // tiles
    for row, place in itertools.product(range(5), range(tiles**2)):
        (y, x), (v, u) = divmod(place, tiles), divmod(int(order[row, place]), tiles)
        actual = shuffled[row, :, y * side : (y + 1) * side, x * side : (x + 1) * side]
        expected = image[row, :, v * side : (v + 1) * side, u * side : (u + 1) * side]
        assert torch.equal(actual, expected)


def test_gaps_are_cut_elsewhere_for_each_tile_and_sizes_stay() -> None:
    ramp = torch.arange(32.0).expand(2, 3, 32, 32).contiguous()  # each pixel is its column
    order = torch.arange(9).expand(2, 9).contiguous()
    seeds = torch.tensor([3, 4])
    cut = shuffle_tiles(ramp, order, seeds, 3, 0.3)
    assert cut.shape == ramp.shape
    assert torch.equal(cut, shuffle_tiles(ramp, order, seeds, 3, 0.3))
    assert not torch.equal(cut[0], cut[1])
    whole = shuffle_tiles(ramp, order, seeds, 3, 0.0)
    assert (cut - whole).abs().max() < 4  # a tile of 10 columns, of which 7 are shown


def test_chroma_is_that_of_a_loop() -> None:
    image = 2 * torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    numbers = quantised_chroma(image, 3, 5)
    for row, y, x in itertools.product(range(3), range(3), range(3)):
        cell = image[row, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].mean(dim=(1, 2))
        grey = 0.299 * cell[0] + 0.587 * cell[1] + 0.114 * cell[2]
        steps = [
            min(4, max(0, int(np.floor((float(cell[channel] - grey) / 2 + 1) / 2 * 5))))
            for channel in (0, 2)
        ]
        assert int(numbers[row, 3 * y + x]) == steps[0] * 5 + steps[1]


def test_a_grey_image_has_the_middle_colour() -> None:
    grey = torch.linspace(-2, 2, 16).view(1, 1, 4, 4).expand(1, 3, 4, 4)
    assert quantised_chroma(grey, 2, 7).tolist() == [[3 * 7 + 3] * 4]


class _Seen(nn.Module):
    """A tower that remembers what it saw and gives the mean of each channel and corner."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Linear(1, 1)
        self.images: list[torch.Tensor] = []

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        self.images.append(image)
        return F.adaptive_avg_pool2d(image, 2).flatten(1)


def _outputs(objective: Any, image: torch.Tensor, seeds: torch.Tensor | None = None) -> Any:
    torch.manual_seed(0)
    clip = _Seen()
    towers = Towers(clip, objective.heads(Sizes(12, 100)), has_text=False)
    return clip, objective.forward(towers, Inputs((image,), (), seeds))


def test_rotation_shows_all_four_turns_of_each_image() -> None:
    image = torch.randn(3, 3, 4, 4)
    clip, outputs = _outputs(Rotation(RotationConfig(head="linear")), image)
    (seen,) = clip.images
    for turn in range(4):
        assert torch.equal(seen[3 * turn : 3 * turn + 3], torch.rot90(image, turn, (2, 3)))
    assert outputs.rows["scores"].shape == (3, 4, 4)
    assert outputs.rows["answers"].tolist() == [[0, 1, 2, 3]] * 3


def test_jigsaw_answers_with_the_permutation_that_was_applied() -> None:
    settings = JigsawConfig(tiles=2, num_permutations=24, gap=0.0)
    image, seeds = torch.randn(40, 3, 4, 4), torch.arange(40)
    clip, outputs = _outputs(Jigsaw(settings), image, seeds)
    (answers,) = outputs.rows["answers"].T
    orders = torch.from_numpy(distant_permutations(4, 24))[answers]
    assert torch.equal(clip.images[0], shuffle_tiles(image, orders, seeds, 2, 0.0))
    assert len(set(answers.tolist())) > 12
    again = _outputs(Jigsaw(settings), image[5:7], seeds[5:7])[1]
    assert torch.equal(again.rows["answers"], outputs.rows["answers"][5:7])


def test_colour_shows_no_colour() -> None:
    image = torch.randn(3, 3, 4, 4)
    clip, outputs = _outputs(Colour(ColourConfig(grid=2, bins=5)), image)
    assert torch.equal(clip.images[0], luma(image).expand(3, 3, 4, 4))
    assert outputs.rows["scores"].shape == (3, 4, 25)


def test_the_loss_is_the_mean_over_rows_and_questions() -> None:
    image = torch.randn(3, 3, 4, 4)
    objective = Rotation(RotationConfig())
    _, outputs = _outputs(objective, image)
    labels: Any = None
    value, _ = objective.loss(outputs, {}, labels, {})
    terms = [
        -torch.log_softmax(outputs.rows["scores"][row, turn].double(), 0)[turn]
        for row in range(3)
        for turn in range(4)
    ]
    torch.testing.assert_close(value.double(), torch.stack(terms).mean(), rtol=1e-6, atol=1e-7)
    best = outputs.rows["scores"].argmax(dim=2).tolist()
    right = [best[row][turn] == turn for row in range(3) for turn in range(4)]
    figures = objective.figures(outputs, {}, labels, {})
    assert float(figures["accuracy"]) == pytest.approx(sum(right) / 12)


def test_rotation_refuses_images_that_are_not_square() -> None:
    with pytest.raises(ConfigError, match="4 × 6 pixels by 90 degrees; expected square ones"):
        _outputs(Rotation(RotationConfig()), torch.randn(2, 3, 4, 6))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"objective": {"name": "rotation"}, "augmentation": {"rotation_degrees": 50}},
            "rotation_degrees is 50, after which the turns .* use less than 45",
        ),
        (
            {"objective": {"name": "colour"}, "augmentation": {"hue": 0.1}},
            "augmentation.hue is 0.1, which changes the colours that .* leave it out",
        ),
        (
            {"objective": {"name": "colour"}, "augmentation": {"greyscale": 0.2}},
            "augmentation.greyscale is 0.2, which changes the colours",
        ),
        (
            {"objective": {"name": "jigsaw", "tiles": 2}},
            "num_permutations is 100; expected 2 to 24",
        ),
        (
            {"objective": {"name": "rotation", "head": "linear", "head_hidden": 3}},
            "head_hidden does nothing while head is linear",
        ),
        (
            {"objective": {"name": "looc"}},
            "objective.augmentations has colour, which augmentation does not change; set "
            "augmentation.brightness or .* or leave it out",
        ),
        (
            {"objective": {"name": "looc", "augmentations": ["blur", "blur"]}},
            "objective.augmentations is .*; expected each family once",
        ),
        (
            {"objective": {"name": "cpc"}},
            r"needs windows of 5 frames; set data.frames: {length: 5}",
        ),
        (
            {
                "objective": {"name": "frame_order"},
                "data": {"train": "x", "batch_size": 8, "frames": {"length": 3}},
            },
            "objective.frames is 4 and data.frames.length 3; give both the same number",
        ),
        (
            {
                "objective": {"name": "cpc"},
                "data": {"train": "x", "batch_size": 8, "frames": {"lenght": 5}},
            },
            "data.frames.lenght is not a setting; did you mean data.frames.length",
        ),
        (
            {"objective": {"name": "cpc", "frames": 3, "past": 3}},
            "past is 3 of 3 frames, which leaves none to predict",
        ),
        (
            {"objective": {"name": "cpc", "context": "mean", "context_width": 3}},
            "context_width does nothing while context is mean",
        ),
    ],
)
def test_what_contradicts_a_pretext_task_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings(Recipe, {"data": {"train": "x", "batch_size": 8}, **sections})


def test_frames_are_shuffled_evenly_and_either_way() -> None:
    seeds = torch.arange(6000)
    order, answer = shuffled_orders(seeds, 3, verify=False)
    counts = torch.unique(order, dim=0, return_counts=True)[1]
    assert len(counts) == 6 and (counts - 1000).abs().max() < 150
    for row, number in zip(order.tolist(), answer.tolist(), strict=True):
        assert orders(3)[number] in (tuple(row), tuple(reversed(row)))
    order, answer = shuffled_orders(seeds, 4, verify=True)
    in_order = [row in ([0, 1, 2, 3], [3, 2, 1, 0]) for row in order.tolist()]
    assert in_order == (answer == 1).tolist()
    assert abs(sum(in_order) - 3000) < 200
    assert len(torch.unique(order, dim=0)) == 24
