"""Objectives with hard negatives, by the real engine on real ranks, against loops in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clipsys.training.model.outputs import State
from clipsys.training.objectives.extra_texts import MinedInfoNCEConfig, NegCLIPConfig
from clipsys.training.objectives.reweighted import HardInfoNCEConfig, HardSimCLRConfig
from tests.training.losses.test_hard_negatives import (
    naive_hard_info_nce,
    naive_hard_nt_xent,
    naive_neg_clip,
)
from tests.training.objectives.exact import (
    HEAD,
    Case,
    Seen,
    Subject,
    all_cases,
    check_exact,
    check_resume,
)


def _encoded(seen: Seen) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    image = torch.nn.functional.normalize(seen.clip.visual(seen.inputs.views[0]), dim=-1)
    text = seen.clip.encode_text(seen.inputs.texts[0], normalize=True)
    return image, text, seen.clip.logit_scale.exp().reshape(())


def _hard_infonce(seen: Seen) -> tuple[torch.Tensor, State]:
    settings, groups = seen.settings, seen.labels.groups_B.tolist()
    value = naive_hard_info_nce(*_encoded(seen), settings.hardness, settings.prior, groups)
    return value, seen.state


def _hard_simclr(seen: Seen) -> tuple[torch.Tensor, State]:
    first, second = map(seen.project, seen.inputs.views)
    settings = seen.settings
    value = naive_hard_nt_xent(first, second, seen.temperature(), settings.hardness, settings.prior)
    return value, seen.state


def _further_texts(seen: Seen) -> tuple[torch.Tensor, State]:
    image, text, scale = _encoded(seen)
    negatives = torch.stack(
        [seen.clip.encode_text(tokens, normalize=True) for tokens in seen.inputs.texts[1:]], dim=1
    )
    labels = seen.labels
    assert labels.present_BT is not None
    value = naive_neg_clip(
        image,
        text,
        negatives,
        scale,
        labels.groups_B.tolist(),
        labels.present_BT[:, 1:],
        labels.further_groups_BT,
        ignore=seen.settings.duplicates == "ignore",
    )
    return value, seen.state


_SUBJECTS = {
    "negclip": Subject(NegCLIPConfig(num_negatives=2, positives="label"), _further_texts),
    "mined": Subject(MinedInfoNCEConfig(duplicates="ignore"), _further_texts),
    "infonce": Subject(
        HardInfoNCEConfig(hardness=0.4, prior=0.05, positives="label"), _hard_infonce
    ),
    "simclr": Subject(HardSimCLRConfig(**HEAD, learn_temperature=True), _hard_simclr),
}


#: Each stage once.
_FEW = [
    Case("infonce", 0),
    Case("simclr", 1, 2, "adamw"),
    Case("simclr", 2),
    Case("infonce", 3, 2),
    Case("mined", 2, 2),
    Case("negclip", 3),
]


def test_two_ranks_agree_with_a_naive_process_at_every_stage() -> None:
    check_exact(_SUBJECTS, _FEW, 2)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_any_split_of_the_work_agrees_with_a_naive_process(world_size: int) -> None:
    check_exact(_SUBJECTS, all_cases(list(_SUBJECTS)), world_size)


def test_a_loaded_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    check_resume(_SUBJECTS, [Case("infonce", 3), Case("negclip", 1, 2)], tmp_path)
