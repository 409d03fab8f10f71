"""The rules of the layout: links, directions of import, one table of verbs."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("training", "retrieval", "ui", "configs")
ALLOWED = {
    "clipsys": set(),
    "training": {"clipsys"},
    "retrieval": {"clipsys"},
    "ui": {"clipsys", "retrieval"},
}
#: The packages and modules of each folder, ground first: each imports from itself and from those
#: before it. Names in one tuple stand on one floor and know nothing of each other.
LAYERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "clipsys": (
        ("errors", "printing"),
        ("files", "progress"),
        ("background", "config", "images", "inference", "processes"),
        ("shards", "probe"),
        ("models", "corpora"),
        ("zeroshot",),
        ("evaluation",),
        ("commands",),
        ("cli",),
        ("demo", "__main__"),
    ),
    "training": (
        ("json_lines",),
        ("distributed",),
        ("data", "model", "journal", "manifest"),
        ("features", "losses"),
        ("engine",),
        ("mining",),
        ("objectives",),
        ("step", "validation", "checkpoints"),
        ("recipe", "export"),
        ("agreement", "phases", "plan", "precision", "resuming"),
        ("run_model", "run_teacher"),
        ("run_data",),
        ("run",),
        ("loop",),
        ("commands",),
    ),
    "retrieval": (
        ("storage",),
        ("encoders",),
        ("indexes",),
        ("search",),
        ("writing",),
        ("ingest",),
        ("maintenance",),
        ("collection",),
        ("commands",),
    ),
    "ui": (
        ("style", "thumbnails"),
        ("service",),
        ("markup",),
        ("options", "about"),
        ("results",),
        ("app",),
        ("server",),
        ("commands",),
    ),
}


def _sources(package: str) -> list[Path]:
    folder = ROOT / package
    found = [path for path in sorted(folder.rglob("*.py")) if package != "clipsys" or _own(path)]
    assert found, folder
    return found


def _own(path: Path) -> bool:
    return path.relative_to(ROOT / "clipsys").parts[0] not in LINKED


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


@pytest.mark.parametrize("name", LINKED)
def test_the_link_points_at_the_real_folder(name: str) -> None:
    link = ROOT / "clipsys" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_in_one_direction(package: str) -> None:
    for path in _sources(package):
        for name, line in _imports(path):
            parts = name.split(".")
            assert parts[0] not in LINKED, f"{path}:{line}: import clipsys.{parts[0]} instead"
            if parts[0] == "clipsys":
                target = parts[1] if len(parts) > 1 and parts[1] in LINKED[:3] else "clipsys"
                assert target in ALLOWED[package] | {package}, f"{path}:{line} imports {name}"


@pytest.mark.parametrize("folder", LAYERS)
def test_the_packages_of_each_folder_build_on_those_before_them(folder: str) -> None:
    floor_of = {name: floor for floor, names in enumerate(LAYERS[folder]) for name in names}
    prefix = ["clipsys"] if folder == "clipsys" else ["clipsys", folder]
    for path in _sources(folder):
        layer = path.relative_to(ROOT / folder).parts[0].removesuffix(".py")
        if layer == "__init__":
            continue  # public names, which load on first use
        assert layer in floor_of, f"{path}: give it a floor in LAYERS"
        for name, line in _imports(path):
            parts = name.split(".")
            target = parts[len(prefix)] if len(parts) > len(prefix) else ""
            if parts[: len(prefix)] != prefix or target not in floor_of or target == layer:
                continue
            assert floor_of[target] < floor_of[layer], f"{path}:{line} imports {name}"


@pytest.mark.parametrize("folder", LAYERS)
def test_no_two_modules_import_each_other(folder: str) -> None:
    """Inside a package too: a circle is one thing cut in two."""
    imports: dict[str, set[str]] = {}
    for path in _sources(folder):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts if folder == "clipsys" else ("clipsys", *parts))
        if path.stem != "__init__":
            imports[name] = {imported for imported, _ in _imports(path)}
    uses = {
        name: {other for other in imports if other != name and _uses(other, imported)}
        for name, imported in imports.items()
    }
    order = TopologicalSorter(uses)
    order.prepare()  # raises CycleError, which names the circle


def _uses(module: str, imported: set[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for name in imported)


def test_only_the_table_of_verbs_names_the_other_packages() -> None:
    from clipsys.cli import VERBS

    for path in _sources("clipsys"):
        if path.name == "cli.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                loads = [f"clipsys.{name}." for name in LINKED[:3]]
                assert not any(node.value.startswith(prefix) for prefix in loads), (
                    path,
                    node.value,
                )
    assert {module.split(".")[1] for module, _ in VERBS.values()} >= {"training", "retrieval", "ui"}


def test_no_module_hides_a_library() -> None:
    for package in ALLOWED:
        for path in _sources(package):
            assert path.stem not in sys.stdlib_module_names or path.stem == "__main__", path


def test_the_wheel_maps_every_package() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("needs tomllib of Python 3.11")
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    mapped = set(settings["tool"]["setuptools"]["packages"])
    for package in (*ALLOWED, "configs"):
        for init in (ROOT / package).rglob("__init__.py"):
            folder = init.parent.relative_to(ROOT)
            if folder.parts[0] == "clipsys" and len(folder.parts) > 1 and folder.parts[1] in LINKED:
                continue
            name = ".".join(folder.parts)
            assert (name if name.startswith("clipsys") else f"clipsys.{name}") in mapped


def test_no_file_names_this_machine() -> None:
    for package in (*ALLOWED, "configs", "tests", "docs", "benchmarks"):
        for path in (ROOT / package).rglob("*"):
            if path.suffix in (".py", ".md", ".yaml") and path.is_file():
                assert "/wor" + "k/" not in path.read_text(encoding="utf-8"), path


#: Names that a system of `pyproject.toml`'s classifiers, or Windows, lacks; a module that needs one
#: asks for it by ``hasattr`` or imports it inside a function.
SYSTEM_MODULES = {"fcntl", "resource", "pwd", "grp", "termios"}
SYSTEM_NAMES = {
    "posix_fallocate", "posix_fadvise", "pread", "preadv", "memfd_create", "sched_getaffinity",
    "fdatasync", "sendfile", "statvfs", "fork",
}  # fmt: skip
#: Guarded by what they catch.
CATCHING = {"training/data/loader.py": {"statvfs"}}


@pytest.mark.parametrize("package", ["clipsys", "training", "retrieval"])
def test_what_some_systems_lack_is_asked_for(package: str) -> None:
    for path in _sources(package):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        name = path.relative_to(ROOT).as_posix()
        tops = [node for node in tree.body if isinstance(node, ast.Import)]
        assert not {alias.name for node in tops for alias in node.names} & SYSTEM_MODULES, name
        used = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "os"
        }
        asked = {
            node.args[1].value
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "hasattr"
            and isinstance(node.args[1], ast.Constant)
        }
        assert not (used & SYSTEM_NAMES) - asked - CATCHING.get(name, set()), name
