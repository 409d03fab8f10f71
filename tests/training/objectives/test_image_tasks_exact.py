"""LooC, pretext tasks and ordered frames on real ranks against one naive float64 process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from clipsys.training.model.outputs import State
from clipsys.training.objectives.colour import ColourConfig, luma, quantised_chroma
from clipsys.training.objectives.cpc import CPCConfig
from clipsys.training.objectives.draws import drawn_integers
from clipsys.training.objectives.frame_order import FrameOrderConfig, shuffled_orders
from clipsys.training.objectives.jigsaw import JigsawConfig, distant_permutations, shuffle_tiles
from clipsys.training.objectives.looc import LooCConfig
from clipsys.training.objectives.rotation import RotationConfig
from tests.training.losses.test_leave_one_out import naive_looc
from tests.training.objectives.exact import (
    HEAD,
    Case,
    Seen,
    Subject,
    all_cases,
    check_exact,
    check_resume,
    few_cases,
)


def _looc(seen: Seen) -> tuple[torch.Tensor, State]:
    names = ["projection_invariant"]
    names += [f"projection_{one}" for one in seen.settings.augmentations]

    def spaces(clip: Any, heads: Any, image: torch.Tensor) -> torch.Tensor:
        features = clip.visual(image)
        return torch.stack([F.normalize(heads[name](features), dim=-1) for name in names], dim=1)

    query_view, *key_views = seen.inputs.views
    query = spaces(seen.clip, seen.heads, query_view)
    with torch.no_grad():
        keys = [spaces(seen.slow_clip, seen.slow_heads, view) for view in key_views]
    queue = seen.state["queue"]
    loss = naive_looc(query, torch.stack(keys, dim=2), queue, seen.temperature())
    # Into the queue of a head goes what it makes of the key that is its positive.
    entering = torch.stack([keys[number][:, number] for number in range(len(keys))], dim=1)
    return loss, {"queue": torch.cat([queue, entering])[-len(queue) :]}


def _entropy(scores: torch.Tensor, answer: int) -> torch.Tensor:
    return torch.logsumexp(scores, 0) - scores[answer]


def _rotation(seen: Seen) -> tuple[torch.Tensor, State]:
    losses = []
    for image in seen.inputs.views[0]:
        for turn in range(4):
            turned = torch.rot90(image, turn, (1, 2))
            losses.append(_entropy(seen.heads["answer"](seen.clip.visual(turned[None]))[0], turn))
    return torch.stack(losses).mean(), seen.state


def _jigsaw(seen: Seen) -> tuple[torch.Tensor, State]:
    settings, seeds = seen.settings, seen.inputs.seeds_B
    assert seeds is not None
    permutations = distant_permutations(settings.tiles**2, settings.num_permutations)
    losses = []
    for image, seed in zip(seen.inputs.views[0], seeds, strict=True):
        answer = int(drawn_integers(seed[None], 1, settings.num_permutations))
        order = torch.from_numpy(permutations[answer])[None]
        shuffled = shuffle_tiles(image[None], order, seed[None], settings.tiles, settings.gap)
        losses.append(_entropy(seen.heads["answer"](seen.clip.visual(shuffled))[0], answer))
    return torch.stack(losses).mean(), seen.state


def _colour(seen: Seen) -> tuple[torch.Tensor, State]:
    settings, losses = seen.settings, []
    for image in seen.inputs.views[0]:
        grey = luma(image[None]).expand(1, 3, -1, -1)
        scores = seen.heads["answer"](seen.clip.visual(grey))[0].split(settings.bins**2)
        answers = quantised_chroma(image[None], settings.grid, settings.bins)[0].tolist()
        losses += [_entropy(cell, answer) for cell, answer in zip(scores, answers, strict=True)]
    return torch.stack(losses).mean(), seen.state


def _frame_order(seen: Seen) -> tuple[torch.Tensor, State]:
    assert seen.inputs.seeds_B is not None
    orders, answers = shuffled_orders(
        seen.inputs.seeds_B, seen.settings.frames, verify=seen.settings.task == "verify"
    )
    losses = []
    for row, (order, answer) in enumerate(zip(orders.tolist(), answers.tolist(), strict=True)):
        frames = torch.stack([seen.inputs.views[frame][row] for frame in order])
        scores = seen.heads["answer"](seen.clip.visual(frames).flatten())
        losses.append(_entropy(scores, answer))
    return torch.stack(losses).mean(), seen.state


def _cpc(seen: Seen) -> tuple[torch.Tensor, State]:
    past, heads = seen.settings.past, seen.heads
    features = torch.stack([seen.clip.visual(view) for view in seen.inputs.views], dim=1)
    if seen.settings.context == "mean":
        context = features[:, :past].mean(dim=1)
    else:  # torch's own unit with the same weights
        own = heads["context"]
        unit = nn.GRU(features.shape[2], own.hidden, batch_first=True).double()
        weights = {
            "weight_ih_l0": own.from_input.weight, "bias_ih_l0": own.from_input.bias,
            "weight_hh_l0": own.from_state.weight, "bias_hh_l0": own.from_state.bias,
        }  # fmt: skip
        _, state = torch.func.functional_call(unit, weights, (features[:, :past],))
        context = state[0]
    predicted = heads["prediction"](context).view(len(features), -1, features.shape[2])
    losses = []
    for step in range(predicted.shape[1]):
        for row in range(len(features)):
            scores = [predicted[row, step] @ one[past + step] for one in features]
            losses.append(_entropy(torch.stack(scores), row))
    return torch.stack(losses).mean(), seen.state


#: A queue that is no multiple of the batch and turns over within the test, and one smaller than it.
_SUBJECTS = {
    "looc": Subject(LooCConfig(**HEAD, momentum=0.7, queue_size=30), _looc),
    "looc, three heads, learned temperature": Subject(
        LooCConfig(
            head="linear",
            head_width=8,
            augmentations=["geometry", "rotation", "colour"],
            momentum=0.6,
            queue_size=10,
            learn_temperature=True,
        ),
        _looc,
    ),
    "rotation": Subject(RotationConfig(head_hidden=12), _rotation),
    "jigsaw": Subject(JigsawConfig(tiles=2, num_permutations=12), _jigsaw),
    "colour": Subject(ColourConfig(grid=2, bins=3, head="linear"), _colour),
    "frame order": Subject(FrameOrderConfig(frames=3), _frame_order),
    "frame order, verify": Subject(FrameOrderConfig(frames=4, task="verify"), _frame_order),
    "cpc": Subject(CPCConfig(frames=4, past=2, context_width=8), _cpc),
    "cpc, mean": Subject(CPCConfig(frames=3, past=2, context="mean"), _cpc),
}
_NAMES = list(_SUBJECTS)
#: Every subject once, every stage twice or more.
_THIN = [
    Case(name, number % 4, 1 + number % 2, ("sgd", "adamw")[number // 4 % 2])
    for number, name in enumerate(_NAMES)
]


def test_loss_gradients_weights_and_state_are_exact_on_two_ranks() -> None:
    check_exact(_SUBJECTS, _THIN, 2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("world_size", "cases"),
    [(1, few_cases(_NAMES)), (2, all_cases(_NAMES)), (3, few_cases(_NAMES))],
)
def test_the_whole_matrix_is_exact(world_size: int, cases: list[Case]) -> None:
    check_exact(_SUBJECTS, cases, world_size)


def test_looc_with_its_queues_resumes_bit_for_bit(tmp_path: Path) -> None:
    name = "looc, three heads, learned temperature"
    cases = [Case(name, 3, 2), Case(name, 1, precision="bf16_params"), Case("jigsaw", 2)]
    check_resume(_SUBJECTS, cases, tmp_path)
