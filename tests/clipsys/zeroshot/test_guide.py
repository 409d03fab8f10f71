"""The examples of docs/zero-shot.md run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

GUIDE = Path(__file__).resolve().parents[3] / "docs" / "zero-shot.md"


def test_the_examples_of_the_guide_run(
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "model").symlink_to(model_folder)
    (tmp_path / "pictures").mkdir()
    names = ("red", "blue", "red-1", "blue-1")
    for name in names:
        colour = "red" if name.startswith("red") else "blue"
        Image.new("RGB", (40, 40), colour).save(tmp_path / "pictures" / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    exec("\n".join(blocks), {})
    printed = capsys.readouterr().out
    assert all(f"pictures/{name}.png red square" in printed or f"pictures/{name}.png blue square"
               in printed for name in names)  # fmt: skip
