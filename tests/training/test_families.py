"""The models that people use: trained, exported, loaded by open_clip, indexed and searched.

In small, with the classes and the settings of open_clip's architectures and tokenizers of their
kinds; nothing here asks a hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import clipsys
from clipsys.models.hub import without_hub
from clipsys.retrieval import Collection
from clipsys.training.export import export_model
from tests.conftest import write_training_shards
from tests.ranks import run_ranks
from tests.retrieval.colours import paint_folder
from tests.tiny_families import FAMILIES, tiny_family
from tests.training.runs import Attempt, Outcome, _attempt_all, write_recipe

#: The others are a slow test.
_EVERY_TIME = (
    "ViT-B-16-SigLIP2",
    "nllb-clip-base-siglip",
    "MobileCLIP2-S0",
    "coca_roberta-ViT-B-32",
)
_REST = tuple(name for name in FAMILIES if name not in _EVERY_TIME)


def _trained(folder: Path, names: tuple[str, ...]) -> dict[str, Outcome]:
    """Two steps of each family, in one process that was forked."""
    shards = write_training_shards(folder / "shards", 16)
    attempts = []
    for name in names:
        sigmoid = "SigLIP" in name or "siglip" in name
        recipe = write_recipe(
            folder / name,
            shards,
            model={"architecture": tiny_family(name, folder / f"files-{name}")},
            data={"validation": None},
            objective={"name": "sigmoid" if sigmoid else "infonce"},
            schedule={"epochs": 1, "warmup_steps": 1},
        )
        attempts.append(Attempt(recipe))
    [outcomes] = run_ranks(_attempt, 1, attempts)
    return dict(zip(names, outcomes, strict=True))


def _attempt(rank: int, world_size: int, attempts: list[Attempt]) -> list[Outcome]:
    # Importing this module has registered the small trunks with timm in this process too.
    return _attempt_all(rank, world_size, attempts)


def _check(run: Path, folder: Path) -> None:
    """Exported, the model is what it was, to open_clip, in a collection, and elsewhere."""
    import open_clip

    model = folder / "exported"
    mark = export_model(run, model)
    pictures = paint_folder(folder / "pictures", num_images=4)
    texts = ["a red dog on the beach", "", "one star " * 20]
    encoder = clipsys.load(model, precision="fp32")
    assert encoder.fingerprint == mark
    with without_hub():
        stock: Any
        stock, _ = open_clip.create_model_from_pretrained(f"local-dir:{model}")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{model}")
    tokens_BL = tokenizer(texts)
    assert torch.equal(tokens_BL, encoder.tokenizer(texts))
    with torch.no_grad():
        expected_BD = stock.eval().encode_text(tokens_BL, normalize=True).numpy()
    np.testing.assert_allclose(encoder.encode_text(texts), expected_BD, atol=1e-5)
    np.testing.assert_allclose(encoder.encode_text_fixed(texts), expected_BD, atol=1e-5)
    moved = clipsys.load(model.rename(folder / "moved"), precision="fp32")
    assert moved.fingerprint == mark
    with Collection.create(folder / "collection", moved) as collection:
        collection.add(pictures, show_progress=False)
        assert len(collection.search("a red square", k=3)) == 3


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Outcome]]:
    folder = tmp_path_factory.mktemp("families")
    return folder, _trained(folder, _EVERY_TIME)


@pytest.mark.parametrize("name", _EVERY_TIME)
def test_a_family_is_trained_exported_indexed_and_searched(
    name: str, usual: tuple[Path, dict[str, Outcome]], tmp_path: Path
) -> None:
    folder, outcomes = usual
    assert outcomes[name].error == ""
    _check(folder / name / "run", tmp_path)


@pytest.mark.slow
def test_so_are_the_others(tmp_path: Path) -> None:
    outcomes = _trained(tmp_path, _REST)
    assert {name: outcome.error for name, outcome in outcomes.items()} == dict.fromkeys(_REST, "")
    for name in _REST:
        _check(tmp_path / name / "run", tmp_path / f"check-{name}")
