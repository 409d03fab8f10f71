"""The recipes that ship: they load, say how to run them, and what came out."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipsys.config import dump_settings, load_settings, shipped_recipes
from clipsys.models.open_clip_models import build_model
from clipsys.training.recipe import Recipe

RECIPES = shipped_recipes()


@pytest.mark.parametrize("name", RECIPES)
def test_it_loads_and_its_model_can_be_built(name: str) -> None:
    recipe = load_settings(Recipe, RECIPES[name])
    if recipe.model.towers is None:  # pretrained towers are not in the recipe
        build_model(
            recipe.model.architecture, preprocess=recipe.model.preprocess, for_training=True
        )
    assert recipe.data.batch_size % 2 == 0


@pytest.mark.parametrize("name", RECIPES)
def test_the_header_states_command_duration_and_result(name: str) -> None:
    header = [
        line for line in RECIPES[name].read_text(encoding="utf-8").splitlines()
        if line.startswith("#")
    ]  # fmt: skip
    for word in ("command:", "duration:", "result:"):
        assert any(line.removeprefix("#").strip().startswith(word) for line in header), word


@pytest.mark.parametrize("name", RECIPES)
def test_the_resolved_recipe_reads_back_the_same(name: str, tmp_path: Path) -> None:
    recipe = load_settings(Recipe, RECIPES[name])
    (tmp_path / "config.yaml").write_text(dump_settings(recipe), encoding="utf-8")
    assert load_settings(Recipe, tmp_path / "config.yaml") == recipe
