"""Hooks of the documentation site: what mkdocs needs that plain Markdown does not say.

    README, CONTRIBUTING, CHANGELOG   stand at the root; they become pages of the site
    links out of docs/                (a script, a result) become pages that show the file
    docs/api.md                       gets the docstrings of the names that it lists

So the pages stay readable on a code host, and the site can be read without a network.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
#: Files at the root that are pages of the site.
ROOT_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
#: Where files that pages link to are shown.
SOURCES = "files"
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"^<!--.*?-->\n", re.MULTILINE)
_API_ENTRY = re.compile(r"^### `(clipsys[\w.]*)`\n\n.*?(?=^##|\Z)", re.MULTILINE | re.DOTALL)
_LANGUAGES = {".py": "python", ".json": "json", ".yaml": "yaml", ".toml": "toml"}


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of the root and of the files that pages link to."""
    for name, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text("utf-8")))
    pages = [file for file in files if file.is_documentation_page()]
    linked = {
        target
        for file in pages
        for link in _LINK.findall(_without_fences(file.content_string))
        if (target := _target(link, file.src_uri)) is not None
    }
    for target in sorted(linked):
        if not target.is_relative_to("docs") and str(target) not in ROOT_PAGES:
            files.append(File.generated(config, _source_page(target), content=_shown(target)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Leads links to where the site has their targets; fills the page of the Python interface."""
    uri = page.file.src_uri
    if uri.startswith(f"{SOURCES}/"):
        return markdown
    if uri == "api.md":
        markdown = _API_ENTRY.sub(r"::: \1\n\n", markdown)
    parts = _FENCE.split(_COMMENT.sub("", markdown))
    parts[::2] = [_LINK.sub(lambda found: _in_site(found[1], uri), part) for part in parts[::2]]
    return "".join(parts)


def _without_fences(text: str) -> str:
    return _FENCE.sub("", text)


def _target(link: str, uri: str) -> PurePosixPath | None:
    """The file of the repository that a page links to; None where there is none."""
    from_root = {page: name for name, page in ROOT_PAGES.items()}
    folder = ROOT if uri in from_root else (ROOT / "docs" / uri).parent
    path = (folder / link).resolve()
    if not path.is_file() or not path.is_relative_to(ROOT):
        return None  # mkdocs warns of it, which a strict build does not survive
    return PurePosixPath(path.relative_to(ROOT).as_posix())


def _in_site(link: str, uri: str) -> str:
    target = _target(link, uri)
    if target is None:
        return link
    if target.is_relative_to("docs"):
        return str(target.relative_to("docs"))
    return ROOT_PAGES.get(str(target), _source_page(target))


def _source_page(target: PurePosixPath) -> str:
    return f"{SOURCES}/{target}.md"


def _shown(target: PurePosixPath) -> str:
    text = (ROOT / target).read_text(encoding="utf-8").rstrip()
    language = _LANGUAGES.get(target.suffix, "text")
    front = f"---\ntitle: {target.name}\nsearch:\n  exclude: true\nhide: [navigation, toc]\n---\n"
    return f"{front}\n# {target}\n\n````{language}\n{text}\n````\n"
