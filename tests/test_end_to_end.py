"""The demo, small: every command of the whole way in real processes."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from clipsys.demo.corpus import CorpusSize
from clipsys.demo.figures import print_report
from clipsys.demo.pipeline import Demo
from clipsys.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
_SIZE = CorpusSize(train=256, retrieval=40, seen=60, held_out=48)
_SHORT = ("schedule.epochs=1", "schedule.warmup_steps=2", "data.batch_size=64")


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    Demo(out, size=_SIZE, overrides=_SHORT, nproc=2).run()
    return out


@pytest.mark.timeout(600)
def test_the_demo_measures_and_shows_what_it_promises(
    demo_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json.loads((demo_folder / "report.json").read_text())
    for name in ("colour", "shape", "colour + shape"):
        figures = report["zeroshot"][name]
        assert figures["seen images"] == 60 and figures["held-out images"] == 48
        assert 0 <= figures["held-out"] <= 1
    assert report["retrieval"]["text_to_image/candidates"] == 40
    assert report["training"]["samples_per_s"] > 0
    assert set(report["seconds"]) == {"draw", "train", "export", "index"}
    for name in ("loss.png", "searches.png"):
        with Image.open(demo_folder / name) as picture:
            assert min(picture.size) > 200
    print_report(report, demo_folder)
    printed = capsys.readouterr().out
    for words in ("held-out combinations", "text → image", "samples/s", "searches.png"):
        assert words in printed


def test_a_second_demo_keeps_what_is_there(demo_folder: Path) -> None:
    before = (demo_folder / "model" / "clipsys.json").stat().st_mtime_ns
    Demo(demo_folder, size=_SIZE, overrides=_SHORT, nproc=2).run()
    assert (demo_folder / "model" / "clipsys.json").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="holds a demo with other settings"):
        Demo(demo_folder, seed=1, size=_SIZE).run()


def test_the_collection_of_the_demo_answers(demo_folder: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "clipsys",
        "search",
        str(demo_folder / "collection"),
        "a red star",
    ]
    done = subprocess.run([*command, "--json", "-k5"], capture_output=True, text=True, check=True)
    hits = json.loads(done.stdout)["hits"]
    assert [hit["rank"] for hit in hits] == [1, 2, 3, 4, 5]
    assert all(Path(hit["uri"]).is_file() for hit in hits)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_demo_reaches_its_figures(tmp_path: Path) -> None:
    report = Demo(tmp_path / "out").run()
    both = report["zeroshot"]["colour + shape"]
    assert both["seen"] >= 0.90
    assert both["held-out"] >= 0.60


def test_a_wheel_has_every_package_and_finds_its_recipes(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    built = subprocess.run([*pip, "-w", str(tmp_path), str(ROOT)], capture_output=True, check=False)
    if built.returncode != 0 and b"setuptools" in built.stderr:
        pip.remove("--no-build-isolation")
        built = subprocess.run(
            [*pip, "-w", str(tmp_path), str(ROOT)], capture_output=True, check=False
        )
    assert built.returncode == 0, built.stderr.decode()
    (wheel,) = tmp_path.glob("clipsys-*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(site)
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"clipsys"}
    code = (
        "from clipsys.config import find_recipe; import clipsys.training.losses, "
        "clipsys.retrieval, clipsys.ui, clipsys; print(clipsys.__file__, find_recipe('emoji_cpu'))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(site)!r}); {code}"],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert all(path.startswith(str(site)) for path in done.stdout.split())
