"""A text query from a cold process: `clipsys search` beside `rclip`.

    python benchmarks/cold_search.py IMAGES [--peer-python PEER/bin/python] [--rounds 7]
    python benchmarks/cold_search.py IMAGES --model FOLDER      another model, without a peer

Both have a ViT-B/32 text tower with the same random weights (speed does not depend on them; rclip's
own model comes from a hub, see `rclip_text_model.py`). Each search is a process of its own, the two
in turn; the files are in the page cache for both. rclip searches an empty folder, which is to its
advantage. A peer needs rclip, onnx and safetensors. Writes ``benchmarks/results/cold_search.json``,
or ``cold_search_FOLDER.json`` for another model.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import clipsys
from clipsys.inference.bpe import vocabulary_path
from clipsys.inference.numpy_text_tower import LightTextTower
from clipsys.models.open_clip_models import build_model, save_model
from clipsys.retrieval import Collection
from clipsys.retrieval.encoders.light import FILE_NAME, open_light

MODEL = "ViT-B-32"
QUERY = "a dog on the beach"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="keeps model and collection for another run")
    parser.add_argument("--model", type=Path, help="a model folder in place of a ViT-B/32")
    options = parser.parse_args()
    if options.model and options.peer_python:
        parser.error("--peer-python compares the ViT-B/32; leave --model out")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        collection = _prepared(folder, options.images, options.model)
        commands = {
            "clipsys": [sys.executable, "-m", "clipsys", "search", str(collection), QUERY, "-k10"],
            "clipsys_with_torch": [sys.executable, "-c", _WITHOUT_LIGHT, str(collection), QUERY],
        }
        environment = dict(os.environ)
        if options.peer_python:
            environment["RCLIP_DATADIR"] = str(folder / "rclip")
            _prepare_peer(options.peer_python, folder, environment)
            peer = ["-m", "rclip", "-n", "-t", "10", QUERY]
            commands["rclip"] = [str(options.peer_python), *peer]
        (folder / "empty").mkdir(exist_ok=True)
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        processor: dict[str, list[float]] = {name: [] for name in commands}
        for round_number in range(options.rounds + 1):
            for name, command in commands.items():
                started, used = time.perf_counter(), _used_by_children()
                subprocess.run(
                    command, cwd=folder / "empty", env=environment, check=True, capture_output=True
                )
                if round_number:  # the first one fills the page cache
                    seconds[name].append(time.perf_counter() - started)
                    processor[name].append(_used_by_children() - used)
    report = {
        "model": options.model.name if options.model else MODEL,
        "seconds": {name: statistics.median(some) for name, some in seconds.items()},
        "processor_seconds": {name: statistics.median(some) for name, some in processor.items()},
        "rounds": seconds,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    if "rclip" in seconds:
        report["rclip_over_clipsys"] = report["seconds"]["rclip"] / report["seconds"]["clipsys"]  # type: ignore[index]
    name = f"cold_search_{options.model.name}.json" if options.model else "cold_search.json"
    out = Path(__file__).parent / "results" / name
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


def _used_by_children() -> float:
    """Processor seconds of the processes that have ended: a busy machine does not change them."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


#: The same search without the record that lets it go without torch.
_WITHOUT_LIGHT = (
    "import sys; from clipsys.retrieval.encoders import light\n"
    "light.open_light = lambda *_: None\n"
    "light.remember = lambda *_: False\n"
    "from clipsys.cli import main; main(['search', *sys.argv[1:]])"
)


def _prepared(folder: Path, images: Path, model: Path | None) -> Path:
    collection = folder / "collection"
    if not (collection / FILE_NAME).exists():
        if model is None:
            model = folder / "model"
            save_model(build_model(MODEL), model, overwrite=True)
        with Collection.create(collection, clipsys.load(model), model=str(model)) as made:
            made.add(images)
    with Collection.open(collection) as opened:
        assert open_light(collection, opened.encoder_pin) is not None
    return collection


def _prepare_peer(python: Path, folder: Path, environment: dict[str, str]) -> None:
    """Makes rclip's model, and checks that it computes what ours does."""
    vocabulary, script = vocabulary_path(), Path(__file__).with_name("rclip_text_model.py")
    if not (folder / "rclip").exists():
        subprocess.run(
            [str(python), str(script), str(folder / "model"), str(vocabulary)],
            env=environment,
            check=True,
        )
    ask = (
        "import sys, numpy; from rclip.model import Model\n"
        "numpy.save(sys.argv[1], Model().compute_text_features([sys.argv[2]]))"
    )
    out = folder / "peer.npy"
    subprocess.run([str(python), "-c", ask, str(out), QUERY], env=environment, check=True)
    with Collection.open(folder / "collection") as opened:
        tower = open_light(folder / "collection", opened.encoder_pin)
    assert isinstance(tower, LightTextTower)
    difference = np.abs(np.load(out) - tower.encode_text([QUERY])).max()
    assert difference < 1e-4, f"rclip's vector differs by {difference}"


if __name__ == "__main__":
    main()
