"""SimCLR and MoCo, trained by the real engine on real ranks, against one naive float64 process.

Loss, gradient of every parameter, weights, momentum towers and queue, over several steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clipsys.training.model.outputs import State
from clipsys.training.objectives.moco import MoCoConfig
from clipsys.training.objectives.simclr import SimCLRConfig
from tests.ranks import run_ranks
from tests.training.objectives.exact import (
    HEAD,
    STEPS,
    Case,
    Seen,
    Subject,
    advance,
    all_cases,
    check_exact,
    check_resume,
    few_cases,
    make_engine,
    weights_of,
)


def naive_nt_xent(first: torch.Tensor, second: torch.Tensor, temperature: Any) -> torch.Tensor:
    """One anchor after the other, over an explicit list of the others."""
    views = torch.cat([first, second])
    losses = []
    for anchor in range(len(views)):
        others = [number for number in range(len(views)) if number != anchor]
        logits = torch.stack([views[anchor] @ views[number] for number in others]) / temperature
        positive = others.index((anchor + len(first)) % len(views))
        losses.append(torch.logsumexp(logits, 0) - logits[positive])
    return torch.stack(losses).mean()


def naive_moco(
    query: torch.Tensor, key: torch.Tensor, queue: torch.Tensor, temperature: Any
) -> torch.Tensor:
    """One query after the other."""
    losses = []
    for one, own in zip(query, key, strict=True):
        logits = torch.stack([one @ own, *(one @ other for other in queue)]) / temperature
        losses.append(torch.logsumexp(logits, 0) - logits[0])
    return torch.stack(losses).mean()


def naive_simclr(seen: Seen) -> tuple[torch.Tensor, State]:
    """SimCLR's loss of a step."""
    first, second = map(seen.project, seen.inputs.views)
    return naive_nt_xent(first, second, seen.temperature()), seen.state


def naive_moco_step(seen: Seen) -> tuple[torch.Tensor, State]:
    """MoCo's loss of a step, and the queue after it."""
    views, queue, temperature = seen.inputs.views, seen.state["queue"], seen.temperature()
    with torch.no_grad():
        keys = [seen.project(view, slow=True) for view in reversed(views)]
    loss = naive_moco(seen.project(views[0]), keys[0], queue, temperature)
    if seen.settings.symmetric:
        # Both halves meet the queue as it was: no key is its own query's negative.
        other = naive_moco(seen.project(views[1]), keys[1], queue, temperature)
        loss = (loss + other) / 2
    else:
        keys = keys[:1]
    return loss, {"queue": torch.cat([queue, *keys])[-len(queue) :]}


#: A queue that is no multiple of the batch and turns over within the test, and one smaller than it.
_SUBJECTS = {
    "simclr": Subject(SimCLRConfig(**HEAD), naive_simclr),
    "simclr linear, learned temperature": Subject(
        SimCLRConfig(head="linear", head_width=8, learn_temperature=True, temperature=0.2),
        naive_simclr,
    ),
    "simclr without head": Subject(SimCLRConfig(head="none"), naive_simclr),
    "moco": Subject(MoCoConfig(**HEAD, momentum=0.7, queue_size=30), naive_moco_step),
    "moco symmetric, learned temperature": Subject(
        MoCoConfig(**HEAD, momentum=0.6, queue_size=10, symmetric=True, learn_temperature=True),
        naive_moco_step,
    ),
}
_FEW = few_cases(list(_SUBJECTS))


@pytest.mark.parametrize(("world_size", "cases"), [(1, _FEW[::3]), (2, _FEW)])
def test_every_split_is_exact(world_size: int, cases: list[Case]) -> None:
    check_exact(_SUBJECTS, cases, world_size)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_whole_matrix_is_exact(world_size: int) -> None:
    check_exact(_SUBJECTS, all_cases(list(_SUBJECTS)), world_size)


def test_momentum_towers_and_queue_resume_bit_for_bit(tmp_path: Path) -> None:
    cases = [Case("moco", stage, 2) for stage in range(4)]
    cases += [Case("moco", stage, precision="bf16_params") for stage in (1, 3)]
    check_resume(_SUBJECTS, cases, tmp_path)


def _momentum_of_16_bits(rank: int, world_size: int, stages: list[int]) -> list[Any]:
    found = []
    for stage in stages:
        case = Case("moco", stage, precision="bf16_params", optimizer="adamw")
        objective, engine = make_engine(_SUBJECTS["moco"], case, world_size)
        before = weights_of(engine)
        advance(objective, engine, case, range(STEPS), rank, world_size)
        assert engine._momentum is not None
        held = [tensor.numpy().copy() for tensor in engine._momentum.state()]
        found.append((before, weights_of(engine), held))
    return found


def test_momentum_towers_of_16_bits_follow_the_masters_in_float32() -> None:
    name = "visual.proj"
    for stage_1, stage_2 in run_ranks(_momentum_of_16_bits, 2, [1, 2]):
        for before, after, held in (stage_1, stage_2):
            assert all(one.dtype == np.float32 for one in held)
            # A momentum of 0.7 over 3 steps of AdamW at 0.001: each moves by less than bf16 knows
            # of a weight near 0.25 (0.001), and in float32 the copy lies between start and end.
            start, end = before[f"clip.{name}"], after[f"clip.{name}"]
            copy = next(one for one in held if one.shape == start.shape)
            assert 0 < np.abs(copy - start).mean() < np.abs(end - start).mean()
            rounded = torch.as_tensor(copy).bfloat16().float().numpy()
            assert (rounded != copy).mean() > 0.9
