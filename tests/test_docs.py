"""The documents: README's commands run, generated pages are current, links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.conftest import TINY_MODEL

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
_BLOCK = re.compile(r"(<!-- not run by the test: [^>]+-->\n)?```(\w+)\n(.*?)```", re.DOTALL)
_COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 160, 60)}


def _blocks() -> list[tuple[str, str]]:
    """Kind and text of the blocks of README that are run, in their order."""
    found = [(match[2], match[3]) for match in _BLOCK.finditer(README) if not match[1]]
    assert {kind for kind, _ in found} == {"bash", "yaml", "python"}
    return found


@pytest.fixture
def workplace(tmp_path: Path, model_folder: Path) -> Path:
    """What README takes for granted: pictures, two tables and a model folder."""
    (tmp_path / "model").symlink_to(model_folder)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rows = ["path,caption,year"]
    for number, (name, rgb) in enumerate(_COLOURS.items()):
        Image.new("RGB", (40, 40), rgb).save(pictures / f"{name}.png")
        for shade in range(8):
            changed = tuple(max(0, value - 10 * shade) for value in rgb)
            Image.new("RGB", (40, 40), changed).save(pictures / f"{name}-{shade}.png")
            rows.append(f"pictures/{name}-{shade}.png,a {name} square {shade},{2018 + number}")
    for table in ("pairs.csv", "held_out.csv"):
        (tmp_path / table).write_text("\n".join(rows) + "\n", encoding="utf-8")
    return tmp_path


@pytest.mark.timeout(600)
def test_the_commands_of_the_readme_run(workplace: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("DS_ACCELERATOR", None)
    for kind, text in _blocks():
        if kind == "yaml":
            name = text.splitlines()[0].removeprefix("# ")
            (workplace / name).write_text(_smaller(text), encoding="utf-8")
            continue
        script = text.replace("schedule.epochs=40", "schedule.epochs=3")
        command = (
            ["bash", "-euo", "pipefail", "-c", script]
            if kind == "bash"
            else [sys.executable, "-c", script]
        )
        done = subprocess.run(
            command, cwd=workplace, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    assert (workplace / "mine-model" / "open_clip_config.json").is_file()


def _smaller(recipe: str) -> str:
    """README's recipe with a model and a batch that a test can wait for."""
    document = yaml.safe_load(recipe)
    document["model"]["architecture"] = TINY_MODEL
    document["data"] |= {"batch_size": 8, "workers": 0}  # a worker imports torch, for seconds
    document["schedule"] = {"epochs": 2, "warmup_steps": 1}
    return yaml.safe_dump(document)


def test_what_is_not_run_says_why() -> None:
    skipped = [match for match in _BLOCK.finditer(README) if match[1]]
    reasons = [
        re.sub(r"<!-- not run by the test: (.*) -->\n", r"\1", match[1]) for match in skipped
    ]
    assert all(len(reason.split()) >= 3 for reason in reasons)
    for verb in ("index", "search", "classify", "train", "export", "evaluate", "shards", "doctor"):
        assert any(f"clipsys {verb}" in text for kind, text in _blocks() if kind == "bash"), verb


def test_the_generated_pages_are_current() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from generate import PAGES
    finally:
        sys.path.pop(0)
    for name, page in PAGES.items():
        written = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert written == page(), f"docs/{name} is old; run python docs/generate.py"


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
def test_links_lead_to_files(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_every_page_is_reachable_from_the_readme() -> None:
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in README, page.name


def test_no_placeholder_is_left() -> None:
    for path in (
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "configs").glob("*.yaml"),
    ):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\bTODO\b|\bTBD\b|\bXXX\b|DEMO_SEEN|DEMO_HELD_OUT", text), path
