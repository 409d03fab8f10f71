"""clip_benchmark beside ``clipsys evaluate``: the same figures, and the time that they take.

    python benchmarks/evaluation.py --peer PEER/bin/python [--captioned SHARDS] [--labelled FOLDER]

Writes benchmarks/results/evaluation.json. The peer needs an environment of its own, since
clip_benchmark 1.6.2 fails with numpy 2.4 ("only 0-dimensional arrays"):

    python -m venv PEER
    PEER/bin/pip install clip_benchmark==1.6.2 'numpy<2.3'

Both measure one model folder (random weights, unless --model names one) on the same shards in
clip_benchmark's own layout: retrieval on captioned images, zero-shot classification on labelled
ones. Each command is a process of its own, and the sides take turns. Seconds are those of the whole
command, less those of the same command on a set of a few images: imports and loading the model do
not count. Nothing comes from a cache of embeddings.

Two comparisons: ``fp32`` on both sides with images decoded exactly, where the figures have to agree
to four digits, and each side as it runs by default (clip_benchmark: autocast; clipsys: ``auto``),
with ``--decode fast`` for clipsys.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from clipsys.probe import machine

ARCHITECTURE = "ViT-B-32"
TASKS = ("retrieval", "zeroshot")
SIDES = ("clip_benchmark", "clipsys")
#: Images of a set that only shows what starting costs.
FEW = 16
#: Prompts of the zero-shot classification: clip_benchmark has 18 for CIFAR-10.
TEMPLATES = [
    f"{start} {middle}{{c}}."
    for start in ("a photo of", "a blurred photo of", "a bright photo of", "a drawing of",
                  "a low contrast photo of", "a close photo of")
    for middle in ("a ", "the ", "one small ")
]  # fmt: skip
_CAPTION = "a brown dog runs over wet grass behind two children in red coats by the sea"
#: Their name -> ours.
_SAME = {
    "image_retrieval_recall@1": "text_to_image/recall@1",
    "image_retrieval_recall@5": "text_to_image/recall@5",
    "image_retrieval_recall@10": "text_to_image/recall@10",
    "text_retrieval_recall@1": "image_to_text/recall@1",
    "text_retrieval_recall@5": "image_to_text/recall@5",
    "text_retrieval_recall@10": "image_to_text/recall@10",
    "acc1": "accuracy@1",
    "acc5": "accuracy@5",
    "mean_per_class_recall": "mean_class_accuracy",
}


def main() -> None:
    arguments = _arguments()
    versions = {"clipsys": _versions(sys.executable), "clip_benchmark": _versions(arguments.peer)}
    with tempfile.TemporaryDirectory(prefix="clipsys-benchmark-") as folder:
        root = Path(folder)
        model = arguments.model or _random_model(root / "model")
        sets = {task: _write_sets(arguments, task, root / task) for task in arguments.tasks}
        runs = []
        for number in range(arguments.rounds):
            for task, form in ((t, f) for t in arguments.tasks for f in ("fp32", "default")):
                for side in SIDES:
                    run = {"side": side, "task": task, "form": form}
                    for size, data in sets[task].items():
                        out = root / f"{side}-{task}-{form}-{size}-{number}.json"
                        measure = _clip_benchmark if side == "clip_benchmark" else _clipsys
                        seconds, figures = measure(arguments, model, task, form, data, out)
                        run |= {f"{size}_s": round(seconds, 2), f"{size}_figures": figures}
                    print(json.dumps({k: v for k, v in run.items() if k != "few_figures"}))
                    runs.append(run)
    report = _report(arguments, runs, versions)
    out = Path(__file__).parent / "results" / f"{arguments.name}.json"
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer", required=True, help="Python that has clip_benchmark")
    parser.add_argument("--model", help="model folder; default random weights")
    parser.add_argument("--captioned", help="a source of captioned images; default drawn ones")
    parser.add_argument("--labelled", help="a folder a class; default drawn images")
    parser.add_argument("--name", default="evaluation", help="of the file with the results")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    return parser.parse_args()


def _versions(python: str) -> dict[str, str]:
    names = ["open_clip_torch", "webdataset", "torch", "numpy", "clip_benchmark"]
    code = (
        "import importlib.metadata as m, json;"
        f"print(json.dumps({{n: m.version(n) for n in {names}"
        " if any(d.name.lower() == n for d in m.distributions())}))"
    )
    found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    versions: dict[str, str] = json.loads(found.stdout)
    return versions


def _random_model(folder: Path) -> Path:
    import torch

    from clipsys.models.open_clip_models import build_model, save_model

    torch.manual_seed(0)
    save_model(build_model(ARCHITECTURE), folder)
    return folder


# ---- data sets ---------------------------------------------------------------------------------


def _write_sets(arguments: argparse.Namespace, task: str, folder: Path) -> dict[str, Path]:
    """The set to measure and one that only shows what starting costs, in the peer's layout."""
    make = _captioned if task == "retrieval" else _labelled
    samples = list(islice(make(arguments), arguments.images))
    if len(samples) < arguments.images:
        print(f"{task}: {len(samples)} images, not {arguments.images}", file=sys.stderr)
    return {
        "few": _write_set(samples[:FEW], task, folder / "few"),
        "many": _write_set(samples, task, folder / "many"),
    }


def _write_set(samples: Sequence[dict[str, Any]], task: str, folder: Path) -> Path:
    import webdataset

    (folder / "test").mkdir(parents=True)
    (folder / "test" / "nshards.txt").write_text("1\n")
    names = sorted({sample["class"] for sample in samples if "class" in sample})
    if task == "retrieval":
        (folder / "dataset_type.txt").write_text("retrieval\n")
    else:
        (folder / "classnames.txt").write_text("\n".join(names) + "\n")
        (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    with webdataset.TarWriter(str(folder / "test" / "0.tar")) as writer:
        for number, sample in enumerate(samples):
            item = {"__key__": f"s{number:07d}", "jpg": sample["image"]}
            if task == "retrieval":
                item["txt"] = "\n".join(sample["captions"])
            else:
                item["cls"] = str(names.index(sample["class"]))
            writer.write(item)
    return folder


def _captioned(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if not arguments.captioned:
        words = _CAPTION.split()
        for number, image in enumerate(_drawn()):
            captions = [
                f"picture {number} of {' '.join(words[:length])}" for length in range(4, 14, 2)
            ]
            yield {"image": image, "captions": captions}
    from clipsys.corpora.sources import iterate_source

    for record in iterate_source(arguments.captioned):
        yield {"image": _jpeg(record.read()), "captions": record.captions}


def _labelled(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if not arguments.labelled:
        for number, image in enumerate(_drawn()):
            yield {"image": image, "class": f"kind {number % 50}"}
    from clipsys.corpora.sources import iterate_source

    records = list(iterate_source(arguments.labelled))
    for number in range(len(records)):  # every class among the first ones
        record = records[number * 7919 % len(records)]
        yield {"image": _jpeg(record.read()), "class": record.label}


def _jpeg(encoded: bytes) -> bytes:
    from clipsys.images.decoding import decode_image

    if encoded[:2] == b"\xff\xd8":
        return encoded
    buffer = io.BytesIO()
    decode_image(encoded).convert("RGB").save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def _drawn() -> Iterator[bytes]:
    """Noise at several scales, 640 x 480 pixels, as from the web."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    while True:
        pixels = rng.integers(0, 256, (15, 20, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((640, 480)).save(buffer, "JPEG", quality=90)
        yield buffer.getvalue()


# ---- the two sides -----------------------------------------------------------------------------


def _clip_benchmark(
    arguments: argparse.Namespace, model: Path, task: str, form: str, data: Path, out: Path
) -> tuple[float, dict[str, float]]:
    name = "zeroshot_retrieval" if task == "retrieval" else "zeroshot_classification"
    command = [
        arguments.peer, "-m", "clip_benchmark.cli", "eval", "--dataset", "wds/set",
        "--dataset_root", str(data), "--task", name, "--model", f"local-dir:{model}",
        "--pretrained", "", "--output", str(out), "--num_workers", "1", "--quiet",
        *(["--recall_k", "1", "5", "10"] if task == "retrieval" else []),
        *(["--no_amp"] if form == "fp32" else []),
    ]  # fmt: skip
    seconds, _ = _run(command)
    metrics = json.loads(out.read_text(encoding="utf-8"))["metrics"]
    return seconds, {_SAME[name]: value for name, value in metrics.items() if name in _SAME}


def _clipsys(
    arguments: argparse.Namespace, model: Path, task: str, form: str, data: Path, out: Path
) -> tuple[float, dict[str, float]]:
    command = [
        sys.executable, "-m", "clipsys", "evaluate", str(model), "--task", task,
        "--data", str(data), "--json", "--no-cache",
        *(["--duplicates", "own"] if task == "retrieval" else []),
        *(["--precision", "fp32", "--decode", "exact"] if form == "fp32"
          else ["--decode", "fast"]),
    ]  # fmt: skip
    seconds, output = _run(command)
    metrics = json.loads(output)["metrics"]
    return seconds, {name: metrics[name] for name in _SAME.values() if name in metrics}


def _run(command: Sequence[str]) -> tuple[float, str]:
    threads = {"OMP_NUM_THREADS": str(os.cpu_count() or 1), "CUDA_VISIBLE_DEVICES": ""}
    started = time.monotonic()
    done = subprocess.run(
        command, env={**os.environ, **threads}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{command[:5]} failed:\n{done.stderr[-3000:]}")
    return time.monotonic() - started, done.stdout


def _report(
    arguments: argparse.Namespace, runs: list[dict[str, Any]], versions: dict[str, Any]
) -> dict[str, Any]:
    result: dict[str, Any] = {"architecture": ARCHITECTURE, "images": arguments.images}
    for name in ("captioned", "labelled", "model"):
        given = getattr(arguments, name)
        result[name] = Path(given).name if given else "drawn" if name != "model" else "random"
    for task in arguments.tasks:
        result[task] = {form: _compare(runs, task, form) for form in ("fp32", "default")}
    result["speed_ratio"] = {
        form: _total(result, arguments.tasks, form, 0) / _total(result, arguments.tasks, form, 1)
        for form in ("fp32", "default")
    }
    result["machine"] = {
        "processor": machine.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    return result | {"versions": versions}


def _compare(runs: list[dict[str, Any]], task: str, form: str) -> dict[str, Any]:
    sides: dict[str, Any] = {}
    for side in SIDES:
        own = [r for r in runs if (r["side"], r["task"], r["form"]) == (side, task, form)]
        few = statistics.median(run["few_s"] for run in own)
        many = statistics.median(run["many_s"] for run in own)
        sides[side] = {"start_s": few, "whole_s": many, "work_s": round(many - few, 2)}
        sides[side]["figures"] = own[0]["many_figures"]
    theirs, ours = (sides[side]["figures"] for side in SIDES)
    return sides | {
        "speed_ratio": sides[SIDES[0]]["work_s"] / sides[SIDES[1]]["work_s"],
        "whole_ratio": sides[SIDES[0]]["whole_s"] / sides[SIDES[1]]["whole_s"],
        "largest_difference": max(abs(theirs[name] - ours[name]) for name in theirs),
    }


def _total(result: dict[str, Any], tasks: Sequence[str], form: str, side: int) -> float:
    return float(sum(result[task][form][SIDES[side]]["work_s"] for task in tasks))


if __name__ == "__main__":
    main()
