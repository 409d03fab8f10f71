"""What a plan says of memory, beside what ranks really take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clipsys.models.open_clip_models import build_model
from clipsys.training.distributed.process_group import import_deepspeed
from clipsys.training.engine.deepspeed_engine import Engine
from clipsys.training.model.outputs import Inputs, Sizes
from clipsys.training.model.towers import TowerOptions
from clipsys.training.model.trained import TrainedModel
from clipsys.training.objectives.infonce import InfoNCE, InfoNCEConfig
from clipsys.training.objectives.protocol import Labels
from clipsys.training.plan import plan_run
from clipsys.training.recipe import Recipe
from tests.conftest import TINY_MODEL, no_tokenizer
from tests.ranks import run_ranks

_BATCH = 4
#: 16 M parameters, nearly all of them in layers: 64 MB, beside which activations are small.
_MODEL: dict[str, Any] = {
    **TINY_MODEL,
    "vision_cfg": {**TINY_MODEL["vision_cfg"], "layers": 5, "width": 512, "head_width": 64},
    "text_cfg": {**TINY_MODEL["text_cfg"], "vocab_size": 1000},
}


def _resident_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"{name} is not told")


def _take(rank: int, world_size: int, splits: list[tuple[int, str]]) -> list[tuple[int, int]]:
    found = []
    for stage, precision in splits:
        import_deepspeed()
        before = _resident_bytes("VmRSS")
        clip = build_model(_MODEL, for_training=True, tokenizer=no_tokenizer).model
        recipe = Recipe(
            data={"train": "x", "batch_size": _BATCH},
            engine={"zero_stage": stage, "precision": precision},
        )
        plan = plan_run(
            recipe, clip, precision=precision, world_size=world_size, num_samples=1000,
            embed_dim=32, image_size=(32, 32), tile_size=_BATCH,
        )  # fmt: skip
        _train(rank, world_size, clip, recipe)
        found.append((plan.model_bytes, _resident_bytes("VmHWM") - before))
    return found


def _train(rank: int, world_size: int, clip: Any, recipe: Recipe) -> None:
    objective = InfoNCE(InfoNCEConfig(positives="pair"))
    options = TowerOptions(recipe.engine.precision)
    engine = Engine(
        TrainedModel(clip, objective, options, sizes=Sizes(32)),
        config=recipe.engine, optimizer=recipe.optimizer,
        local_batch_size=_BATCH // world_size, device=torch.device("cpu"),
    )  # fmt: skip
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again: while DeepSpeed is made
    # the weights are there two or three times, for a moment
    rows = _BATCH // world_size
    inputs = Inputs((torch.randn(rows, 3, 32, 32),), (torch.randint(1, 999, (rows, 16)),))
    numbers = torch.arange(rows) + rank * rows
    labels = Labels(numbers, numbers)
    for _ in range(3):
        engine.accumulate(
            [lambda: inputs],
            lambda outputs, targets, state: objective.loss(outputs, targets, labels, state),
        )
        engine.update(1.0)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
def test_the_plan_without_zero_is_what_a_rank_takes() -> None:
    # Not stages 1 to 3: there resident memory was 1.9 to 2.7 times the plan, not explained yet.
    ((planned, taken),) = run_ranks(_take, 2, [(0, "fp32")])[0]
    # Activations and gloo's buffers come on top; measured: 1.26 times the plan.
    assert 0.85 * planned < taken < 1.5 * planned, (planned, taken)
