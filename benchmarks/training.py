"""open_clip_train beside ``clipsys train``: samples per second and peak memory on one machine.

    python benchmarks/training.py --peer PEER/bin/python [--shards 'DATA/train-*.tar']

Writes benchmarks/results/training.json. The peer needs an environment of its own, since
open_clip_train 3.3.0 does not run with webdataset 0.2.100 or later ("KeyError: 'fname'"):

    python -m venv PEER
    PEER/bin/pip install 'open_clip_torch[training]==3.3.0' webdataset==0.2.86

Both train the same model from random weights on the same samples: the shards given, or drawn ones,
cut to the steps of a run. Runs alternate, each a process of its own; a run's figure is the rate
over the steps after the first two, waiting for data included. Each side is measured in fp32 and in
bf16 autocast, and enters the ratio with its better precision.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

MODEL = "ViT-B-32"
WARMUP_STEPS = 2
_CAPTION = "a brown dog runs over wet grass behind two children in red coats by the sea"
_PEER_PRECISION = {"fp32": "fp32", "bf16": "amp_bf16"}


def main() -> None:
    arguments = _arguments()
    versions = {"clipsys": _versions(sys.executable), "open_clip_train": _versions(arguments.peer)}
    with tempfile.TemporaryDirectory(prefix="clipsys-benchmark-") as folder:
        root = Path(folder)
        shards = _write_samples(arguments, root / "shards")
        runs: list[dict[str, Any]] = []
        for number in range(arguments.rounds):
            for precision in arguments.precisions:
                for side, train in (("open_clip_train", _open_clip), ("clipsys", _clipsys)):
                    out = root / f"{side}-{precision}-{number}"
                    run = train(arguments, shards, out, precision)
                    run |= {"side": side, "precision": precision}
                    print(json.dumps(run), file=sys.stderr)
                    runs.append(run)
    report = _report(arguments, runs, versions)
    out = Path(__file__).parent / "results" / "training.json"
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer", default="", help="Python that has open_clip_train")
    parser.add_argument("--shards", help="pattern of .tar files; default drawn images")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5, help=f"of a run; {WARMUP_STEPS} warm up")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="SECTION.KEY=VALUE", help="more for our recipe"
    )
    arguments = parser.parse_args()
    if arguments.steps <= WARMUP_STEPS:
        parser.error(f"--steps {arguments.steps}: the first {WARMUP_STEPS} only warm up")
    return arguments


def _versions(python: str) -> dict[str, str]:
    names = ["open_clip_torch", "webdataset", "torch", "deepspeed"]
    code = (
        "import importlib.metadata as m, importlib.util as u, json, sys;"
        "assert u.find_spec('open_clip_train');"
        f"print(json.dumps({{n: m.version(n) for n in {names}"
        " if any(d.name == n for d in m.distributions())}))"
    )
    try:
        found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f"--peer {python!r}: no Python with open_clip_train ({error}); make one:\n"
            + (__doc__ or "").split("\n\n")[3]
        ) from error
    versions: dict[str, str] = json.loads(found.stdout)
    return versions


def _write_samples(arguments: argparse.Namespace, folder: Path) -> Path:
    """As many samples as a run trains on, in as many shards as the peer has workers, at least."""
    from clipsys.shards.writing import write_shards

    wanted = arguments.batch * arguments.steps
    samples = _given(arguments.shards) if arguments.shards else _drawn()
    chosen = list(islice(samples, wanted))
    if len(chosen) < wanted:
        raise SystemExit(f"{arguments.shards}: {len(chosen)} samples; a run needs {wanted}")
    size_bytes = sum(len(sample.image) + 2000 for sample in chosen)
    write_shards(iter(chosen), folder, shard_bytes=size_bytes // (4 * arguments.workers))
    return folder


def _given(pattern: str) -> Iterator[Any]:
    from clipsys.shards.reading import iterate_raw
    from clipsys.shards.samples import parse_sample

    shards = sorted(str(path) for path in Path(pattern).parent.glob(Path(pattern).name))
    if not shards:
        raise SystemExit(f"--shards {pattern}: no such files")
    yield from map(parse_sample, iterate_raw(shards))


def _drawn() -> Iterator[Any]:
    """Noise at several scales, 256 pixels, with captions as long as those of Flickr8k."""
    import numpy as np
    from PIL import Image

    from clipsys.shards.samples import Sample

    rng = np.random.default_rng(0)
    for number in range(sys.maxsize):
        pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((256, 256)).save(buffer, "JPEG", quality=90)
        caption = " ".join(_CAPTION.split()[: int(rng.integers(6, 18))])
        yield Sample(f"{number:06d}", buffer.getvalue(), "jpg", (caption,), None, {})


def _open_clip(
    arguments: argparse.Namespace, shards: Path, out: Path, precision: str
) -> dict[str, Any]:
    names = [path.stem for path in sorted(shards.glob("*.tar"))]
    first, last = (re.sub(r"\D*", "", name) for name in (names[0], names[-1]))
    stem = names[0].removesuffix(first)
    command = [
        arguments.peer, "-m", "open_clip_train.main",
        "--train-data", f"{shards}/{stem}{{{first}..{last}}}.tar",
        "--train-num-samples", str(arguments.batch * arguments.steps),
        "--dataset-type", "webdataset", "--model", MODEL,
        "--batch-size", str(arguments.batch), "--epochs", "1", "--warmup", "100",
        "--workers", str(arguments.workers), "--precision", _PEER_PRECISION[precision],
        "--log-every-n-steps", "1", "--save-frequency", "0",
        "--logs", str(out), "--name", "run", "--device", "cpu",
    ]  # fmt: skip
    output, peak_bytes = _run(command)
    # Its meters are reset at each logged step: "Batch (t): 12.345".
    seconds = [float(found) for found in re.findall(r"Batch \(t\): ([0-9.]+)", output)]
    return _figures(arguments, seconds, peak_bytes, output)


def _clipsys(
    arguments: argparse.Namespace, shards: Path, out: Path, precision: str
) -> dict[str, Any]:
    # One line of metrics.jsonl for each step.
    code = (
        "import clipsys.training.loop as loop; loop.LOG_INTERVAL = 1;"
        "from clipsys.cli import main; main()"
    )
    recipe = out.with_suffix(".yaml")
    settings = {
        "output": str(out), "model": {"architecture": MODEL},
        "data": {"train": f"{shards}/*.tar", "batch_size": arguments.batch,
                 "workers": arguments.workers},
        "schedule": {"epochs": 1, "warmup_steps": 100},
        # One process: ZeRO would have nothing to divide, and keep a second copy of the weights.
        "engine": {"precision": precision, "zero_stage": 0},
    }  # fmt: skip
    recipe.write_text(json.dumps(settings), encoding="utf-8")
    # A rank that a launcher has started, so that the code above reaches it.
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    command = [sys.executable, "-c", code, "train", str(recipe), *arguments.set]
    output, peak_bytes = _run(command, environment)
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rates = [json.loads(line).get("samples_per_s") for line in lines]
    seconds = [arguments.batch / rate for rate in rates if rate]
    return _figures(arguments, seconds, peak_bytes, output)


def _figures(
    arguments: argparse.Namespace, seconds: Sequence[float], peak_bytes: int, output: str
) -> dict[str, Any]:
    if len(seconds) < arguments.steps:
        raise SystemExit(f"only {len(seconds)} of {arguments.steps} steps:\n{output[-3000:]}")
    steps = seconds[WARMUP_STEPS : arguments.steps]
    return {
        "samples_per_s": round(arguments.batch / statistics.median(steps), 3),
        "step_seconds": [round(step, 2) for step in seconds],
        "peak_memory_gb": round(peak_bytes / 1e9, 2),
    }


def _run(command: Sequence[str], environment: dict[str, str] | None = None) -> tuple[str, int]:
    """What a command says, and the largest memory of its process tree, in bytes."""
    # Both with as many threads as there are cores, whatever the caller's shell says.
    threads = {"OMP_NUM_THREADS": str(os.cpu_count() or 1), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [str(part) for part in command],
        env={**os.environ, **threads, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    peak = [0]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            peak[0] = max(peak[0], _tree_bytes(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    try:
        output, _ = process.communicate()
    finally:
        ended.set()
        watcher.join()
    if process.returncode:
        took = time.monotonic() - started
        raise SystemExit(f"{command[:4]} failed after {took:.0f} s:\n{output[-3000:]}")
    return output, peak[0]


def _tree_bytes(pid: int) -> int:
    """Memory of a process and its descendants; shared pages are divided among their users."""
    total = 0
    waiting = [pid]
    while waiting:
        one = waiting.pop()
        try:
            waiting += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
            rollup = Path(f"/proc/{one}/smaps_rollup").read_text()
        except OSError:  # it ended meanwhile
            continue
        found = re.search(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)
        total += int(found[1]) * 1024 if found else 0
    return total


def _report(
    arguments: argparse.Namespace, runs: list[dict[str, Any]], versions: dict[str, Any]
) -> dict[str, Any]:
    sides: dict[str, Any] = {}
    for side in ("open_clip_train", "clipsys"):
        by_precision = {}
        for precision in arguments.precisions:
            own = [run for run in runs if (run["side"], run["precision"]) == (side, precision)]
            by_precision[precision] = {
                "samples_per_s": statistics.median(run["samples_per_s"] for run in own),
                "peak_memory_gb": max(run["peak_memory_gb"] for run in own),
                "step_seconds": [run["step_seconds"] for run in own],
            }
        best = max(by_precision, key=lambda name: by_precision[name]["samples_per_s"])
        sides[side] = {"best_precision": best, **by_precision}
    best_rates = [sides[side][sides[side]["best_precision"]] for side in sides]
    return {
        "model": MODEL,
        "batch": arguments.batch,
        "data": "drawn" if not arguments.shards else Path(arguments.shards).parent.name,
        "settings": arguments.set,
        **sides,
        "speed_ratio": best_rates[1]["samples_per_s"] / best_rates[0]["samples_per_s"],
        "memory_ratio": best_rates[1]["peak_memory_gb"] / best_rates[0]["peak_memory_gb"],
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "amx": " amx_bf16" in _cpuinfo(),
            "python": platform.python_version(),
        },
        "versions": versions,
    }


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _processor() -> str:
    found = re.search(r"model name\s*: (.*)", _cpuinfo())
    return found[1] if found else platform.machine()


if __name__ == "__main__":
    main()
