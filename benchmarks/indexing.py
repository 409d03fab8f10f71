"""`clipsys index` beside the indexing of clip-retrieval and rclip: images a second, peak memory.

    python benchmarks/indexing.py --clip-retrieval PYTHON --rclip PYTHON

writes benchmarks/results/indexing.json. PYTHON is the interpreter of an environment that has the
peer (clip-retrieval 2.45 with setuptools<70; rclip 3.3); a peer that is not named is absent from
the result. Exporting the tower for rclip, which runs ONNX, needs the `onnx` and `onnxscript`
packages beside clipsys.

All encode the same JPEGs with the same ViT-B-32-256 of random weights (speed does not depend on
them), each in processes of its own and with its own defaults; clipsys in fp32 too. Each runs with a
few and with more images; the rate is that of the images in between, so that start and model loading
do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image

MODEL = "ViT-B-32-256"
#: (width, height): few and many images. As from the web, and as from a telephone.
IMAGES = {(640, 480): (32, 352), (4_000, 3_000): (16, 144)}
#: (images, out) -> command
Command: TypeAlias = Callable[[Path, Path], list[str]]

_CLIP_RETRIEVAL = """
import sys
from clip_retrieval.clip_inference.main import main
main(input_dataset=sys.argv[1], output_folder=sys.argv[2], enable_text=False, enable_image=True,
     num_prepro_workers=2, clip_model="open_clip:{model}/" + sys.argv[3])
"""
_RCLIP = """
import sys
from rclip import db, main, model, model_download
model_download.load_visual_query_session = lambda: model_download._load_onnx_session(sys.argv[3])
made = main.RClip(model.Model(), db.DB(sys.argv[2]), indexing_batch_size=8, exclude_dirs=None)
made.ensure_index(sys.argv[1])
"""
_EXPORT = """
import sys, torch
from clipsys.models.open_clip_models import load_model
tower = load_model(sys.argv[1]).model.visual.eval()
pixels = torch.randn(2, 3, 256, 256)
torch.onnx.export(tower, (pixels,), sys.argv[2], input_names=["input"], output_names=["output"],
                  dynamic_shapes=({0: torch.export.Dim("batch")},), dynamo=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clip-retrieval", help="python of an environment with clip-retrieval")
    parser.add_argument("--rclip", help="python of an environment with rclip")
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        report = _measure(Path(name), arguments)
    out = Path(__file__).parent / "results" / "indexing.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


def _measure(folder: Path, arguments: argparse.Namespace) -> dict[str, object]:
    from clipsys.models.open_clip_models import build_model, save_model

    save_model(build_model(MODEL), folder / "model")
    sides = _sides(folder, arguments)
    return {
        "model": MODEL,
        "images": {
            f"{width} x {height}": _compare(sides, folder, (width, height), counts, arguments)
            for (width, height), counts in IMAGES.items()
        },
        "absent": [side for side in ("clip-retrieval", "rclip") if side not in sides],
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
    }


def _sides(folder: Path, arguments: argparse.Namespace) -> dict[str, Command]:
    """For each program the command that indexes a folder of images into another folder."""
    own = (sys.executable, "-m", "clipsys", "--quiet", "index")

    def clipsys_in(precision: str) -> Command:
        options = ("--model", str(folder / "model"), "--precision", precision)
        return lambda images, out: [*own, str(out), str(images), *options]

    sides = {"clipsys": clipsys_in("fast"), "clipsys, fp32": clipsys_in("fp32")}
    if arguments.clip_retrieval:
        weights = folder / "model" / "open_clip_model.safetensors"
        script = _CLIP_RETRIEVAL.format(model=MODEL)
        sides["clip-retrieval"] = lambda images, out: [
            *(arguments.clip_retrieval, "-c", script, str(images), str(out), str(weights))
        ]
    if arguments.rclip:
        onnx = folder / "visual.onnx"
        subprocess.run(
            [sys.executable, "-c", _EXPORT, str(folder / "model"), str(onnx)], check=True
        )
        sides["rclip"] = lambda images, out: [
            *(arguments.rclip, "-c", _RCLIP, str(images), str(out), str(onnx))
        ]
    return sides


def _compare(
    sides: dict[str, Command],
    folder: Path,
    size: tuple[int, int],
    counts: tuple[int, int],
    arguments: argparse.Namespace,
) -> dict[str, object]:
    """Rates and peaks of all sides for images of one size, the sides taking turns."""
    name = "x".join(map(str, size))
    for count in counts:
        _draw(folder / f"{name}-{count}", count, size)
    few, many = counts
    rates: dict[str, list[float]] = {side: [] for side in sides}
    peaks: dict[str, dict[int, float]] = {side: {} for side in sides}
    for side, command in sides.items():  # what is read from the disk once is in memory from here on
        _run(command(folder / f"{name}-{few}", folder / f"{side}-{name}-warm"), folder)
    for number in range(arguments.rounds):
        for side, command in sides.items():
            seconds = {}
            for count in counts:
                out = folder / f"{side}-{name}-{number}-{count}"
                seconds[count], peaks[side][count] = _run(
                    command(folder / f"{name}-{count}", out), folder
                )
            rates[side].append((many - few) / (seconds[many] - seconds[few]))
            print(f"{name}, {side}: {rates[side][-1]:.1f} images/s", file=sys.stderr)
    return {
        "num_images": many - few,
        "images_per_s": {side: round(statistics.median(r), 2) for side, r in rates.items()},
        "clipsys_is_faster_by": {
            side: round(
                statistics.median(
                    own / other for own, other in zip(rates["clipsys"], r, strict=True)
                ),
                2,
            )
            for side, r in rates.items()
            if side != "clipsys"
        },
        "peak_memory_mb": peaks,
    }


def _draw(folder: Path, count: int, size: tuple[int, int]) -> None:
    """JPEGs of a (width, height) with structure at several scales."""
    folder.mkdir()
    for number in range(count):
        generator = np.random.default_rng(number)
        coarse = generator.integers(0, 256, (30, 40, 3), np.uint8)
        image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        noise = generator.integers(-20, 21, (size[1], size[0], 3), np.int16)  # deviation 12
        noisy = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number:05d}.jpg", quality=88)


def _run(command: list[str], folder: Path) -> tuple[float, float]:
    """Seconds and peak memory (MB, of the process itself) of a command that must succeed."""
    started = time.perf_counter()
    log = folder / "log.txt"
    with log.open("w") as file:
        environment = dict(os.environ)
        if command[0] != sys.executable:
            environment.pop("PYTHONPATH", None)  # a peer must not find clipsys's libraries
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:3])} … failed:\n{log.read_text()[-2000:]}")
    return time.perf_counter() - started, round(usage.ru_maxrss / 1024, 1)


if __name__ == "__main__":
    main()
