"""What stands around the code: one version, hooks, workflows and targets that exist, the site."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

import clipsys

ROOT = Path(__file__).resolve().parents[1]


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {
        re.sub(r"[-_.]+", "-", name).lower(): version
        for name, _, version in (line.partition("==") for line in lines if "==" in line)
    }


def _targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))


def test_the_version_stands_in_one_place_and_is_the_newest_of_the_changelog() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in pyproject and 'attr = "clipsys.__version__"' in pyproject
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (\S+) — (\d{4}-\d\d-\d\d)$", changelog, re.MULTILINE)
    assert sections == sorted(sections, reverse=True, key=lambda one: one[1])
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (clipsys.__version__, citation["date-released"]) == sections[0]
    assert citation["version"] == clipsys.__version__


def test_every_dependency_is_pinned_at_or_above_its_lower_bound() -> None:
    pins = _pins()
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    bounds = re.findall(r'^    "([A-Za-z][\w.-]*)(?:\[\w+\])?>=([\d.]+)', pyproject, re.MULTILINE)
    assert len(bounds) > 25
    for name, bound in bounds:
        if name == "faiss-cpu":  # of other systems
            continue
        pin = pins[re.sub(r"[-_.]+", "-", name).lower()]
        numbers = [[int(part) for part in re.findall(r"\d+", text)] for text in (pin, bound)]
        assert numbers[0] >= numbers[1], f"{name}: {pin} is below {bound}"


def test_hooks_and_workflows_call_what_exists() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    entries = [hook["entry"] for repo in hooks["repos"] for hook in repo["hooks"]]
    assert all(entry.startswith(".venv/bin/") for entry in entries)
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml")):
        jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
        runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
        called = [re.match(r"make ([a-z-]+)", run) for run in runs]
        assert called and all(match and match[1] in _targets() for match in called), path


def test_every_target_is_explained_by_make_help() -> None:
    # Under `make test` this is a make within a make, which would say what folder it enters.
    command = ["make", "--no-print-directory", "help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    explained = {line.split()[1] for line in done.stdout.splitlines()}
    assert explained == _targets()


# ---- the site ------------------------------------------------------------------------------------


class _Loads(HTMLParser):
    """Addresses that a page loads by itself; links that a person may follow are not among them."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collects what an element fetches."""
        for name, value in attrs:
            if value and name in ("src", "srcset", "data", "poster"):
                self.loaded.append(value)
            if value and tag == "link" and name == "href" and dict(attrs).get("rel") != "canonical":
                self.loaded.append(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir"]
    done = subprocess.run(
        [*command, str(out)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out


def test_the_site_loads_nothing_from_a_network(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 10
    for page in pages:
        parser = _Loads()
        parser.feed(page.read_text(encoding="utf-8"))
        foreign = [url for url in parser.loaded if re.match(r"(https?:)?//", url)]
        assert not foreign, f"{page.name}: {foreign}"
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert not re.search(r"(url\(\s*['\"]?|@import\s+['\"])(https?:)?//", text), sheet.name


def test_the_site_can_be_searched_from_a_folder(site: Path) -> None:
    assert "info_nce" in (site / "search" / "search_index.js").read_text(encoding="utf-8")
    assert (site / "javascripts" / "iframe-worker.js").is_file()
    assert 'src="javascripts/iframe-worker.js"' in (site / "index.html").read_text("utf-8")


def test_the_reference_has_every_public_name_with_its_docstring(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from generate import PUBLIC, public_names

    page = (site / "api.html").read_text(encoding="utf-8")
    for module in PUBLIC:
        for name in public_names(module):
            assert f'id="{module}.{name}"' in page, f"{module}.{name}"
    # Of a parameter, which only the docstring explains.
    assert "the inverse temperature" in page


def test_every_page_of_docs_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2]
    for page in (ROOT / "docs").glob("*.md"):
        assert f" {page.name}" in navigation, page.name
