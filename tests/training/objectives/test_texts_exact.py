"""Objectives over texts alone, on real ranks, against one naive float64 process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clipsys.config import load_settings
from clipsys.errors import ConfigError
from clipsys.training.model.outputs import State
from clipsys.training.objectives.masked_words import MaskedWordsConfig
from clipsys.training.objectives.scl import SCLConfig
from clipsys.training.objectives.sentence_order import SentenceOrderConfig
from clipsys.training.recipe import Recipe
from tests.training.losses.test_classified import naive_scl
from tests.training.objectives.exact import (
    Case,
    Seen,
    Subject,
    all_cases,
    check_exact,
    check_resume,
    few_cases,
)


def _scl(seen: Seen) -> tuple[torch.Tensor, State]:
    features = seen.clip.encode_text(seen.inputs.texts[0])
    logits = seen.heads["classifier"](features)
    weight = seen.settings.weight
    temperature = seen.temperature() if weight else 1.0
    assert seen.labels.classes_B is not None
    return naive_scl(logits, features, seen.labels.classes_B, weight, temperature), seen.state


def _sentence_order(seen: Seen) -> tuple[torch.Tensor, State]:
    assert seen.inputs.seeds_B is not None
    losses = []
    for row, seed in enumerate(seen.inputs.seeds_B.tolist()):
        first, second, *others = (text[row] for text in seen.inputs.texts)
        if seed % 2 == 0:
            first, second = (first, others[0]) if others else (second, first)
        u, v = (seen.clip.encode_text(one[None])[0] for one in (first, second))
        score = seen.heads["answer"](torch.cat([u, v, (u - v).abs(), u * v]))
        losses.append(torch.logsumexp(score, 0) - score[seed % 2])
    return torch.stack(losses).mean(), seen.state


def _masked_words(seen: Seen) -> tuple[torch.Tensor, State]:
    assert seen.inputs.seeds_B is not None
    tokens, losses = seen.inputs.texts[0], []
    for row, seed in zip(tokens.tolist(), seen.inputs.seeds_B.tolist(), strict=True):
        ranks, kinds, others = torch.rand(3, 8, generator=torch.Generator().manual_seed(seed))
        words = [place for place in range(1, 5) if row[place] != 0]  # 5 is the end, 6 on padding
        number = max(1, round(seen.settings.share * len(words)))
        asked = sorted(words, key=lambda place: float(ranks[place]))[:number]
        shown = list(row)
        for place in asked:
            if kinds[place] < 0.8:
                shown[place] = 48
            elif kinds[place] < 0.9:
                shown[place] = int(others[place] * 50)
        clip = seen.clip
        hidden = clip.token_embedding(torch.tensor([shown])) + clip.positional_embedding
        hidden = clip.ln_final(clip.transformer(hidden, attn_mask=clip.attn_mask))[0]
        for place in asked:
            score = seen.heads["words"](hidden[place] @ clip.text_projection)
            losses.append(torch.logsumexp(score, 0) - score[row[place]])
    return torch.stack(losses).mean(), seen.state


_SUBJECTS = {
    "scl": Subject(SCLConfig(), _scl),
    "scl, learned temperature": Subject(SCLConfig(weight=0.5, learn_temperature=True), _scl),
    "cross-entropy": Subject(SCLConfig(weight=0), _scl),
    "sentence order": Subject(SentenceOrderConfig(), _sentence_order),
    "masked words": Subject(MaskedWordsConfig(share=0.4), _masked_words),
    "next sentence": Subject(SentenceOrderConfig(task="next", head="linear"), _sentence_order),
}


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_split_is_exact(world_size: int) -> None:
    cases = few_cases(list(_SUBJECTS))
    check_exact(_SUBJECTS, cases if world_size == 2 else cases[::5], world_size)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_whole_matrix_is_exact(world_size: int) -> None:
    check_exact(_SUBJECTS, all_cases(list(_SUBJECTS)), world_size)


def test_a_loaded_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    check_resume(_SUBJECTS, [Case("scl, learned temperature", 2, 2, "adamw")], tmp_path)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"batch_size": 1}}, "scl nothing to contrast; raise it, or set objective.weight"),
        ({"objective": {"weight": 0, "temperature": 0.1}}, "temperature does nothing while weight"),
        ({"objective": {"weight": 0, "learn_temperature": True}}, "learn_temperature does nothing"),
        ({"objective": {"weight": 1}}, "less than 1"),
        ({"augmentation": {"flip": 0.5}}, "augmentation does nothing for objective.name scl"),
        ({"evaluation": {"match": "k"}, "data": {"validation": "v"}}, "evaluation.match does noth"),
        ({"evaluation": {"classifier": True}}, "classifier does nothing without data.validation"),
        (
            {"objective": {"name": "simclr"}, "evaluation": {"classifier": True}},
            "simclr, which trains no classifier; leave it out",
        ),
        (
            {"objective": {"name": "simclr"}, "data": {"label_noise": 0.1}},
            "data.label_noise does nothing for objective.name simclr",
        ),
        ({"data": {"subset_seed": 1}}, "subset_seed does nothing without data.num_samples or"),
        (
            {
                "data": {
                    "num_samples": 9, "resampled": True, "train": [{"shards": "x", "weight": 1}],
                }
            },
            "data.num_samples draws from all sources alike",
        ),
    ],
)  # fmt: skip
def test_settings_that_would_do_nothing_are_refused(sections: dict[str, Any], message: str) -> None:
    objective = {"name": "scl", **sections.get("objective", {})}
    data = {"train": "x", "batch_size": 8, **sections.get("data", {})}
    with pytest.raises(ConfigError, match=message):
        load_settings(Recipe, {**sections, "objective": objective, "data": data})


def test_a_batch_of_one_is_enough_for_cross_entropy() -> None:
    recipe = {"objective": {"name": "scl", "weight": 0}, "data": {"train": "x", "batch_size": 1}}
    assert load_settings(Recipe, recipe).data.batch_size == 1
