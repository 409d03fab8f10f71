"""Objectives by name: settings of each, old names, nearest names, those of other packages."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clipsys.config import dump_settings, load_settings
from clipsys.errors import ConfigError
from clipsys.training.model.initial import freeze_unused
from clipsys.training.objectives import BUILT_IN, make_objective, objective_class, objective_names
from clipsys.training.recipe import Recipe


def _recipe(**sections: Any) -> Recipe:
    return load_settings(Recipe, {"data": {"train": "x", "batch_size": 8}, **sections})


#: What the recipe of an objective needs besides its name.
_NEEDED: dict[str, dict[str, Any]] = {
    "distillation": {"objective": {"teacher": "/models/teacher"}},
    "looc": {"augmentation": {"hue": 0.1}},
    "frame_order": {"data": {"train": "x", "batch_size": 8, "frames": {"length": 4}}},
    "cpc": {"data": {"train": "x", "batch_size": 8, "frames": {"length": 5}}},
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_resolved_recipe_of_each_objective_reads_back_the_same(name: str, tmp_path: Path) -> None:
    needed = _NEEDED.get(name, {})
    recipe = _recipe(**{**needed, "objective": {"name": name, **needed.get("objective", {})}})
    assert recipe.objective.name == name
    (tmp_path / "config.yaml").write_text(dump_settings(recipe), encoding="utf-8")
    assert load_settings(Recipe, tmp_path / "config.yaml") == recipe


@pytest.mark.parametrize("name", BUILT_IN)
def test_each_objective_documents_itself(name: str) -> None:
    text = objective_class(name).__doc__ or ""
    for section in ("Inputs:", "Recommendations:", "Relations:", "References:"):
        assert section in text, name
    for setting, info in objective_class(name).config.model_fields.items():
        assert info.description, f"{name}.{setting}"


def test_recipes_that_say_loss_are_read() -> None:
    assert _recipe(objective={"loss": "sigmoid"}).objective.name == "sigmoid"
    assert _recipe(objective={"positives": "label"}).objective.name == "infonce"
    assert _recipe().objective.name == "infonce"
    with pytest.raises(ConfigError, match=r"objective\.loss is not a setting; did you mean"):
        _recipe(objective={"loss": "infonce", "name": "simclr"})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "simclrr"}, r"objective.name is 'simclrr'; expected one of .* mean simclr\?"),
        ({"name": "moco", "queue": 3}, r"objective.queue is not a setting.* objective.queue_size"),
        ({"name": "simclr", "tile_size": 3}, r"objective.tile_size is not a setting"),
        ({"name": "moco", "momentum": 1.0}, r"objective.momentum is 1.0; .* less than 1"),
        ({"name": "simclr", "head": "linear", "head_hidden": 8}, "head_hidden does nothing while"),
        ({"name": "moco", "head": "none", "head_width": 8}, "head_width does nothing while head"),
        (3, "objective is 3; input should be a valid dictionary"),
    ],
)
def test_wrong_settings_are_named_with_their_place(section: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _recipe(objective=section)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"unlocked_text_blocks": 0}}, "which trains no text; leave it out"),
        ({"model": {"initial_logit_scale": 5.0}}, "does not use the model's temperature"),
        ({"evaluation": {"zeroshot": "x"}}, "evaluation.zeroshot needs text"),
        ({"data": {"train": "x", "batch_size": 1}}, "leaves objective.name simclr no negatives"),
        ({"optimizer": {"name": "lamb"}}, "which flattens parameters"),
        (
            {"data": {"train": "x", "batch_size": 8, "frames": {"length": 3}}},
            "data.frames does nothing for objective.name simclr, which takes single images",
        ),
    ],
)
def test_what_contradicts_an_objective_without_text_is_refused(
    sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _recipe(objective={"name": "simclr"}, **sections)


def test_what_an_objective_does_not_train_is_frozen() -> None:
    model = nn.Module()
    model.visual, model.text = nn.Linear(2, 2), nn.Linear(2, 2)
    model.logit_scale = nn.Parameter(torch.zeros(1))
    freeze_unused(model, image=True, text=False, temperature=False)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"visual.weight", "visual.bias"}


_PAGE = Path(__file__).resolve().parents[3] / "docs" / "writing-objectives.md"
#: The page's example, a whole objective of another package.
THIRD_PARTY = _PAGE.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]


def install(folder: Path, *, target: str = "compact_objective:Compact") -> None:
    """Puts a distribution with that objective into a folder, as pip would."""
    (folder / "compact_objective.py").write_text(THIRD_PARTY, encoding="utf-8")
    info = folder / "compact_objective-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: compact-objective\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[clipsys.objectives]\ncompact = {target}\n")


def test_another_package_registers_an_objective_by_an_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert len(THIRD_PARTY.splitlines()) <= 30
    assert objective_names()[-1] == "compact"
    recipe = _recipe(objective={"name": "compact", "power": 1.0})
    assert "power: 1.0" in dump_settings(recipe)
    objective = make_objective(recipe.objective)
    assert (type(objective).__name__, objective.num_texts) == ("Compact", 0)
    with pytest.raises(ConfigError, match=r"objective\.powr is not a setting; did you mean obj"):
        _recipe(objective={"name": "compact", "powr": 1.0})
    del sys.modules["compact_objective"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("not_there:Compact", "not_there:Compact cannot be imported"),
        ("pathlib:Path", "pathlib:Path is not a subclass of clipsys.training.objectives.Objective"),
    ],
)
def test_a_broken_registration_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, message: str
) -> None:
    install(tmp_path, target=target)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=message):
        _recipe(objective={"name": "compact"})
