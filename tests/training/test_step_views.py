"""What a step shows to the towers: views that share draws, frames of windows, seeds of rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from clipsys.images.preprocessing import Preprocessing
from clipsys.training.data.augmentation import AugmentationConfig
from clipsys.training.data.samples import Batch
from clipsys.training.model.outputs import Inputs
from clipsys.training.objectives import make_objective
from clipsys.training.objectives.cpc import CPCConfig
from clipsys.training.objectives.distillation import DistillationConfig
from clipsys.training.objectives.looc import LooCConfig
from clipsys.training.step import TrainingStep

_COLOUR: dict[str, Any] = {"brightness": 0.5, "colour_jitter_share": 1.0}
_WHOLE: dict[str, Any] = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}


def _inputs(settings: Any, augmentation: dict[str, Any], pixels: torch.Tensor, rows: int) -> Inputs:
    engine: Any = SimpleNamespace(device=torch.device("cpu"))
    step = TrainingStep(
        engine,
        Preprocessing((8, 8), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
        objective=make_objective(settings),
        augmentation=AugmentationConfig(**augmentation),
        seed=3,
    )
    ids = torch.arange(rows)
    batch = Batch(("k",) * rows, pixels, (), ids, ids)
    (make,) = step._seeded_inputs([batch], 0)
    first, again = make(), make()
    assert all(torch.equal(*pair) for pair in zip(first.views, again.views, strict=True))
    assert first.seeds_B is not None and torch.equal(first.seeds_B, again.seeds_B)
    assert len(set(first.seeds_B.tolist())) == rows
    return first


def _pixels(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(50, 200, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)


def test_the_key_of_a_family_has_its_draws_in_common_with_the_query() -> None:
    settings = LooCConfig(augmentations=["colour", "geometry"])
    query, independent, of_colour, of_geometry = _inputs(
        settings, {**_WHOLE, **_COLOUR}, _pixels(4), 4
    ).views
    assert torch.equal(query, of_colour)  # colours are all that changes
    for other in (independent, of_geometry):
        assert not any(torch.equal(*pair) for pair in zip(query, other, strict=True))
    query, _, of_colour, of_geometry = _inputs(
        settings, {"crop_scale": (0.3, 0.8)}, _pixels(4), 4
    ).views
    assert torch.equal(query, of_geometry) and not torch.equal(query, of_colour)


def test_each_view_shows_a_frame_of_every_row_with_the_same_augmentation() -> None:
    pixels = _pixels(6)
    views = _inputs(CPCConfig(frames=3, past=1), _WHOLE, pixels, 2).views
    for frame, view in enumerate(views):
        torch.testing.assert_close(view, pixels[[frame, 3 + frame]] / 255)
    still = pixels[:1].expand(6, -1, -1, -1)
    augmented = {"crop_scale": (0.3, 0.8), "flip": 0.5, "erasing": 0.5, "blur": 0.5, **_COLOUR}
    first, *rest = _inputs(CPCConfig(frames=3, past=1), augmented, still, 2).views
    assert not torch.equal(first[0], first[1])
    assert all(torch.equal(first, other) for other in rest)


class _EchoingTeacher:
    """Says what it was shown."""

    size = (8, 8)
    normalisation = (torch.zeros(3, 1, 1), torch.ones(3, 1, 1))

    def __init__(self) -> None:
        self.calls = 0

    def rows(self, image_BCHW: torch.Tensor, tokens_BL: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        return {"image": image_BCHW, "tokens": tokens_BL}


def test_the_teacher_sees_the_students_view_and_its_own_tokens_once() -> None:
    engine: Any = SimpleNamespace(device=torch.device("cpu"))
    teacher: Any = _EchoingTeacher()
    step = TrainingStep(
        engine,
        Preprocessing((8, 8), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
        objective=make_objective(DistillationConfig(teacher="any")),
        augmentation=AugmentationConfig(crop_scale=(0.3, 0.8), flip=0.5, erasing=0.0, **_COLOUR),
        seed=3,
        teacher=teacher,
    )
    ids, own = torch.arange(4), torch.ones(4, 5, dtype=torch.int64)
    batch = Batch(("k",) * 4, _pixels(4), (0 * own,), ids, ids, teacher_BL=own)
    (make,) = step._seeded_inputs([batch], 0)
    first, again = make(), make()  # as for cached micro-batches
    assert teacher.calls == 1 and again.teacher is first.teacher is not None
    torch.testing.assert_close(first.views[0] * 0.25 + 0.5, first.teacher["image"])
    assert torch.equal(first.teacher["tokens"], own)
