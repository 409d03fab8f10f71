"""Everything of clipsys that needs an NVIDIA GPU, run in ten minutes without a network.

    make gpu                                      or: python benchmarks/gpu.py
    make gpu WHEELS=gpu-wheels                    installs what the machine lacks, for this run only
    python benchmarks/gpu.py --parts loss search  some parts; others stay in the file as they are
    python benchmarks/gpu.py --device cpu --smoke tiny sizes, to see that every part runs

Writes benchmarks/results/gpu-NAME.json: versions, what the card was measured to reach (products of
8,192 x 8,192 matrices, copies), and for each part its rates with their share of that peak. The
parts stand in gpu_parts.py. Each runs in a process of its own within a time limit; one that fails
or takes too long leaves what it had measured and the reason, and the others go on. clipsys is run
from this tree, with whatever versions of its libraries the machine has: the bounds of
pyproject.toml do not apply. Exit status 1 if a part failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PARTS = Path(__file__).with_name("gpu_parts.py")
#: Seconds that each part may take, in the order in which they run; what one leaves, the next have.
BUDGETS_S = {"peak": 25, "loss": 120, "training": 165, "indexing": 60, "search": 90, "tests": 110}
TOTAL_S = 590
#: What a part prints before each figure, so that libraries may print what they like.
MARK = "MEASURED "
_LIBRARIES = (
    "torch", "triton", "deepspeed", "open_clip_torch", "faiss-gpu", "faiss-cpu", "timm",
    "transformers", "numpy", "pydantic",
)  # fmt: skip


def main() -> None:
    started = time.monotonic()
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="clipsys-gpu-") as folder:
        paths = [str(ROOT)]
        if arguments.wheels:
            paths.append(_install(arguments.wheels, Path(folder) / "packages"))
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]).strip(":")
        }
        if arguments.device == "cpu":
            # Triton has an interpreter for machines without a GPU.
            environment |= {"TRITON_INTERPRET": "1", "DS_ACCELERATOR": "cpu"}
        machine = _machine(arguments, environment)
        out = arguments.out or _default_out(machine["device"])
        report = _earlier(out) | {"machine": machine, "smoke": arguments.smoke}
        deadline = started + TOTAL_S
        for number, part in enumerate(arguments.parts):
            later_s = sum(BUDGETS_S[later] for later in arguments.parts[number + 1 :])
            limit_s = max(10.0, deadline - time.monotonic() - later_s)
            result = run_part(part, arguments, environment, Path(folder), limit_s)
            report["parts"][part] = result
            _add_shares(report)
            out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            print(f"{part}: {result['status']}, {result['seconds']} s", file=sys.stderr)
    print(out)
    failed = [part for part in arguments.parts if report["parts"][part]["status"] != "ok"]
    if failed:
        sys.exit(f"error: {', '.join(failed)} did not succeed; {out} says why")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(BUDGETS_S), default=list(BUDGETS_S))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; figures mean nothing")
    parser.add_argument("--wheels", nargs="+", type=Path, metavar="DIR", help="folders of wheels")
    parser.add_argument("--out", type=Path, help="default: results/gpu-NAME.json, by the card")
    return parser.parse_args()


def _install(folders: Sequence[Path], target: Path) -> str:
    """Unpacks wheels into a folder of this run; the machine's own packages stay as they are."""
    wheels = [wheel for folder in folders for wheel in sorted(folder.glob("*.whl"))]
    if not wheels:
        sys.exit(
            f"error: no wheels in {', '.join(map(str, folders))}; `make gpu-wheels` makes them"
        )
    if any(wheel.name.startswith("faiss_gpu") for wheel in wheels):
        # The two overwrite one another.
        wheels = [wheel for wheel in wheels if not wheel.name.startswith("faiss_cpu")]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    done = subprocess.run(
        [*command, "--no-compile", "--target", str(target), *map(str, wheels)], check=False
    )
    if done.returncode:
        sys.exit(
            "error: pip could not install the wheels; was the Python that they are for another?"
        )
    return str(target)


def run_part(
    part: str,
    arguments: argparse.Namespace,
    environment: dict[str, str],
    folder: Path,
    limit_s: float,
) -> dict[str, Any]:
    """One part in a process of its own: status, reason, seconds and figures."""
    command = [sys.executable, str(PARTS), part, "--device", arguments.device]
    command += ["--smoke"] * arguments.smoke + ["--limit", str(limit_s)]
    started = time.monotonic()
    printed, errors = folder / f"{part}.out", folder / f"{part}.err"
    with printed.open("wb") as stdout, errors.open("wb") as stderr:
        process = subprocess.Popen(
            command, stdout=stdout, stderr=stderr, env=environment, cwd=ROOT, start_new_session=True
        )
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end_group(process)
    rows = [
        json.loads(line.removeprefix(MARK))
        for line in printed.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.startswith(MARK)
    ]
    reasons = [f"{row['name']}: {row['failed']}" for row in rows if "failed" in row]
    if status is None:
        reasons.append(f"it took more than {limit_s:.0f} s")
    elif status:
        last = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        reasons.append(f"exit status {status}: {' '.join(last)}")
    return {
        "status": "too slow" if status is None else "failed" if reasons else "ok",
        "reasons": reasons,
        "seconds": round(time.monotonic() - started, 1),
        "measured_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rows": rows,
    }


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a part with all processes that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _earlier(out: Path) -> dict[str, Any]:
    """The parts of a report that is there: parts are run one by one too."""
    document = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    return {"machine": {}, "smoke": False, "parts": document.get("parts", {})}


def _add_shares(report: dict[str, Any]) -> None:
    """Sets each rate that counts operations in relation to the card's measured peak."""
    peaks = {row["name"]: row["tflops"] for row in _rows(report, "peak") if "tflops" in row}
    for part in report["parts"]:
        for row in _rows(report, part):
            if part != "peak" and "tflops" in row and row.get("products") in peaks:
                row["share_of_peak"] = round(row["tflops"] / peaks[row["products"]], 4)


def _rows(report: dict[str, Any], part: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = report["parts"].get(part, {}).get("rows", [])
    return rows


def _machine(arguments: argparse.Namespace, environment: dict[str, str]) -> dict[str, Any]:
    """The card, its driver and the versions, asked for in a process that sees the wheels."""
    code = (
        f"import sys; sys.path.insert(0, {str(PARTS.parent)!r}); import gpu;"
        f" gpu.print_machine({arguments.device!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"error: {(done.stderr.strip().splitlines() or ['no device'])[-1]}")
    machine: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return machine


def print_machine(device: str) -> None:
    """Prints what a report says of the machine."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device; --device cpu --smoke runs everything at tiny sizes")
    machine: dict[str, Any] = {"device": f"{platform.machine()} processor"}
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        machine = {
            "device": card.name,
            "memory_gib": round(card.total_memory / 2**30, 1),
            "compute_capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "driver": _driver(),
            "cuda": torch.version.cuda,
        }
    machine |= {"cores": os.cpu_count(), "python": platform.python_version(), "versions": {}}
    for name in _LIBRARIES:
        try:
            machine["versions"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            machine["versions"][name] = None
    print(json.dumps(machine))


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return (done.stdout.splitlines() or [""])[0]


def _default_out(device: str) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return Path(__file__).parent / "results" / f"gpu-{name}.json"


if __name__ == "__main__":
    main()
