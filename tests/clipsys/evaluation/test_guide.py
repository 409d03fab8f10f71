"""The example of docs/evaluation.md runs, and what the page names exists."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

from tests.conftest import noise_image

GUIDE = (Path(__file__).resolve().parents[3] / "docs" / "evaluation.md").read_text("utf-8")


def test_the_example_of_the_guide_runs(
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "model").symlink_to(model_folder)
    for number in range(6):
        path = tmp_path / "pictures" / f"kind {number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(number).save(path)
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    exec(block, {})
    assert "accuracy@1" in capsys.readouterr().out


def test_the_names_of_the_guide_exist() -> None:
    for name in re.findall(r"`(clipsys\.[a-z_.]+)`", GUIDE):
        module, _, attribute = name.rpartition(".")
        assert hasattr(import_module(module), attribute), name


def test_the_guide_names_every_option_of_the_verb() -> None:
    import inspect

    from clipsys.retrieval.commands.evaluate import evaluate

    shared = {"path_column", "caption_column", "label_column", "encoding", "as_json", "models"}
    for name in set(inspect.signature(evaluate).parameters) - shared:
        option = "--no-cache" if name == "cache" else f"--{name.replace('_', '-')}"
        assert option in GUIDE, option
