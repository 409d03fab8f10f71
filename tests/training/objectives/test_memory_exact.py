"""Momentum keys, memory banks and queues, on real ranks, against one naive float64 process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from clipsys.config import load_settings
from clipsys.training.data.augmentation import AugmentationConfig
from clipsys.training.engine.repartition import SavedBy
from clipsys.training.losses import PairKeys, PairQueue, info_nce
from clipsys.training.model.outputs import Outputs, Sizes, State
from clipsys.training.objectives import Labels, make_objective
from clipsys.training.objectives.infonce_queue import InfoNCEQueueConfig
from clipsys.training.objectives.memory_bank import MemoryBankConfig
from clipsys.training.objectives.moco_v3 import MoCoV3Config
from clipsys.training.objectives.slip import SLIPConfig
from clipsys.training.recipe import Recipe
from tests.ranks import run_ranks
from tests.training.losses.test_memory import (
    naive_bank_nce,
    naive_bank_softmax,
    naive_bank_updated,
    naive_moco_v3,
    naive_normaliser,
    naive_queued_info_nce,
)
from tests.training.objectives.exact import (
    BATCH,
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
    reference,
    weights_of,
)
from tests.training.objectives.test_two_views_exact import naive_nt_xent


def _moco_v3(seen: Seen) -> tuple[torch.Tensor, State]:
    # Together, as far as batch normalisation is concerned.
    views = torch.cat(seen.inputs.views)
    queries = F.normalize(seen.heads["predictor"](seen.project(views)), dim=-1).chunk(2)
    with torch.no_grad():
        keys = seen.project(views, slow=True).chunk(2)
    temperature = seen.temperature()
    there = naive_moco_v3(queries[0], keys[1], temperature)
    return there + naive_moco_v3(queries[1], keys[0], temperature), seen.state


def _memory_bank(seen: Seen) -> tuple[torch.Tensor, State]:
    features, samples = seen.project(seen.inputs.views[0]), seen.labels.samples_B
    bank, temperature = seen.state["bank"], seen.temperature()
    after = naive_bank_updated(bank, features, samples, seen.settings.momentum)
    if seen.settings.form == "softmax":
        return naive_bank_softmax(features, bank, samples, temperature), {"bank": after}
    step = seen.state["step"]
    generator = torch.Generator().manual_seed(int(seen.state["noise_seed"] + step))
    noise = torch.randint(len(bank), (BATCH, seen.settings.num_noise), generator=generator)
    log_normaliser = seen.state["log_normaliser"]
    if seen.step == 0:
        log_normaliser = naive_normaliser(features, bank, noise, temperature).log()
    loss = naive_bank_nce(features, bank, samples, noise, log_normaliser.exp(), temperature)
    followed = {"bank": after, "step": step + 1, "log_normaliser": log_normaliser}
    return loss, {**seen.state, **followed}


def _pairs(seen: Seen, *, slow: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    clip = seen.slow_clip if slow else seen.clip
    image = F.normalize(clip.visual(seen.inputs.views[0]), dim=-1)
    return image, F.normalize(clip.encode_text(seen.inputs.texts[0]), dim=-1)


def _queue(seen: Seen) -> tuple[torch.Tensor, State]:
    image, text = _pairs(seen)
    keys = None
    if seen.slow_clip is not None:
        with torch.no_grad():
            keys = PairKeys(*_pairs(seen, slow=True))
    state, groups = seen.state, seen.labels.groups_B
    size, filled = len(state["group_queue"]), int(state["num_filled"])
    queue = PairQueue(
        state["image_queue"][size - filled :],
        state["text_queue"][size - filled :],
        state["group_queue"][size - filled :],
    )
    ignore = seen.settings.duplicates == "ignore"
    scale = seen.clip.logit_scale.exp()
    loss = naive_queued_info_nce(image, text, scale, queue, groups, keys, ignore=ignore)
    new = (image.detach(), text.detach()) if keys is None else keys
    return loss, {
        "image_queue": torch.cat([state["image_queue"], new[0]])[-size:],
        "text_queue": torch.cat([state["text_queue"], new[1]])[-size:],
        "group_queue": torch.cat([state["group_queue"], groups])[-size:],
        "num_filled": torch.tensor(min(size, filled + BATCH)),
    }


def _slip(seen: Seen) -> tuple[torch.Tensor, State]:
    image, text = _pairs(seen)
    empty = PairQueue(image[:0], text[:0], seen.labels.groups_B[:0])
    scale = seen.clip.logit_scale.exp()
    with_texts = naive_queued_info_nce(image, text, scale, empty, seen.labels.groups_B)
    first, second = (seen.project(view) for view in seen.inputs.views[1:])
    between = naive_nt_xent(first, second, seen.settings.ssl_temperature)
    return with_texts + seen.settings.ssl_scale * between, seen.state


_V3: dict[str, Any] = {**HEAD, "predictor_hidden": 20, "momentum": 0.7}
_SUBJECTS = {
    "moco_v3": Subject(MoCoV3Config(**_V3, temperature=0.1), _moco_v3),
    "moco_v3 learned temperature": Subject(
        MoCoV3Config(**_V3, temperature=0.2, learn_temperature=True), _moco_v3
    ),
    "bank": Subject(MemoryBankConfig(head_width=8), _memory_bank),
    "bank nce": Subject(
        MemoryBankConfig(head_width=8, form="nce", num_noise=6, temperature=0.2), _memory_bank
    ),
    # A queue that turns over within the test, with samples that are met again; and a short one.
    "queue": Subject(InfoNCEQueueConfig(queue_size=30), _queue),
    "queue, momentum, ignore": Subject(
        InfoNCEQueueConfig(queue_size=10, momentum=0.6, duplicates="ignore", tile_size=5),
        _queue,
    ),
    "slip": Subject(SLIPConfig(**HEAD, ssl_scale=0.7, ssl_temperature=0.2), _slip),
}


#: Each method with each stage; those of two subjects in turns.
_FEW = [
    case
    for number, case in enumerate(few_cases(list(_SUBJECTS)))
    if case.name == "slip" or (number // 4 + case.stage) % 2 == 0
]


@pytest.mark.parametrize(("world_size", "cases"), [(2, _FEW), (3, _FEW[::4])])
def test_every_split_is_exact(world_size: int, cases: list[Case]) -> None:
    check_exact(_SUBJECTS, cases, world_size)


def test_the_paper_s_heads_with_batch_normalisation_are_exact() -> None:
    settings = MoCoV3Config(**_V3, head_layers=3, head_norm="batch", temperature=0.2)
    subjects = {"moco_v3": Subject(settings, _moco_v3)}
    check_exact(subjects, [Case("moco_v3", 1), Case("moco_v3", 3)], 2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_whole_matrix_is_exact(world_size: int) -> None:
    check_exact(_SUBJECTS, all_cases(list(_SUBJECTS)), world_size)


def test_banks_and_queues_resume_bit_for_bit(tmp_path: Path) -> None:
    cases = [Case("bank nce", 1, 2), Case("queue, momentum, ignore", 3)]
    check_resume(_SUBJECTS, cases, tmp_path)


_STATEFUL = (Case("bank nce", 1), Case("queue, momentum, ignore", 2))


def _begin(rank: int, world_size: int, folder: str) -> None:
    for case in _STATEFUL:
        objective, engine = make_engine(_SUBJECTS[case.name], case, world_size)
        advance(objective, engine, case, range(2), rank, world_size)
        engine.save(Path(folder, case.name), "tag", {})


def _go_on(rank: int, world_size: int, folder: str, saved_by: int) -> list[Any]:
    results = []
    for case in _STATEFUL:
        objective, engine = make_engine(_SUBJECTS[case.name], case, world_size)
        engine.load(Path(folder, case.name), "tag", SavedBy(saved_by, case.stage, case.precision))
        advance(objective, engine, case, range(2, STEPS), rank, world_size)
        state = {name: one.numpy() for name, one in engine.state.items()}
        results.append((weights_of(engine), state))
    return results


def test_banks_and_queues_go_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    run_ranks(_begin, 2, str(tmp_path))
    for results in run_ranks(_go_on, 3, str(tmp_path), 2):
        for case, (weights, state) in zip(_STATEFUL, results, strict=True):
            expected = reference(_SUBJECTS[case.name], case.optimizer)
            for found, wanted in ((weights, expected.weights), (state, expected.state)):
                for name, one in wanted.items():
                    np.testing.assert_allclose(
                        found[name].reshape(one.shape), one, atol=1e-5, err_msg=f"{case}: {name}"
                    )


def test_the_queue_begins_without_negatives_and_forgets_the_oldest() -> None:
    objective = make_objective(InfoNCEQueueConfig(queue_size=3))
    state = objective.initial_state(Sizes(4), torch.Generator())
    scale, losses = torch.tensor(5.0), []
    rows = [F.normalize(torch.randn(2, 2, 4), dim=-1) for _ in range(2)]
    for step, (image, text) in enumerate(rows):
        groups = torch.tensor([2 * step, 2 * step + 1])
        outputs = Outputs({"image": image, "text": text}, {"logit_scale": scale})
        loss, state = objective.loss(outputs, {}, Labels(groups, groups), state)
        losses.append((loss, info_nce(image, text, scale)))
        assert int(state["num_filled"]) == (2, 3)[step]
    torch.testing.assert_close(*losses[0])
    assert losses[1][0] > losses[1][1]
    assert state["group_queue"].tolist() == [1, 2, 3]
    expected = torch.cat([rows[0][:, 1:], rows[1]], dim=1)
    assert torch.equal(torch.stack([state["image_queue"], state["text_queue"]]), expected)


def test_slip_shows_a_mild_view_to_the_text_and_two_strong_ones_to_each_other() -> None:
    strong = AugmentationConfig(crop_scale=(0.08, 1.0), hue=0.2)
    clip, *others = make_objective(SLIPConfig()).views(strong)
    assert clip.augmentation.crop_scale == (0.5, 1.0) and clip.augmentation.hue == 0
    assert [view.augmentation for view in others] == [strong, strong]


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"name": "memory_bank", "num_noise": 5}, "num_noise does nothing while form is softmax"),
        (
            {"name": "memory_bank", "form": "nce", "learn_temperature": True},
            "learn_temperature would change what the normaliser",
        ),
        ({"name": "memory_bank", "head_hidden": 5}, "head_hidden does nothing while head is lin"),
        ({"name": "moco_v3"}, "leaves objective.name moco_v3 no negatives"),
        ({"name": "slip"}, "leaves objective.name slip no negatives"),
        (
            {"name": "slip", "positives": "pair", "duplicates": "ignore"},
            "objective.duplicates ignore does nothing",
        ),
        ({"name": "infonce_queue", "momentum": 1.0}, "less than 1"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(
    objective: dict[str, Any], message: str
) -> None:
    with pytest.raises(Exception, match=message):
        load_settings(Recipe, {"objective": objective, "data": {"train": "x", "batch_size": 1}})
