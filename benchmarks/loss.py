"""open_clip's dense ClipLoss beside our tiled one: time and peak memory of loss and gradients.

    python benchmarks/loss.py                        1,024 to 65,536 pairs of width 512
    python benchmarks/loss.py --pairs 131072         other sizes; --device cuda where there is one

Writes benchmarks/results/loss.json (or loss-DEVICE.json). Every measurement runs in a process of
its own, in turn, so that neither inherits the other's memory; a first small call warms the
libraries up. Peak memory is what the process held beyond the features. Dense is left out where its
logits would not fit.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812

WIDTH = 512
SCALE = 100.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side up to 16,384")
    parser.add_argument("--measure", choices=("dense", "tiled"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.pairs[0], arguments.device)))
        return
    suffix = "" if arguments.device == "cpu" else f"-{arguments.device}"
    out = Path(__file__).parent / "results" / f"loss{suffix}.json"
    report: dict[str, Any] = {
        "width": WIDTH,
        "logit_scale": SCALE,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {arguments.device}",
        "torch": torch.__version__,
        "sizes": [],
    }
    for pairs in arguments.pairs:
        report["sizes"].append(compare(pairs, arguments.device, arguments.rounds))
        print(json.dumps(report["sizes"][-1]))
        out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def compare(pairs: int, device: str, rounds: int) -> dict[str, Any]:
    sides = ["tiled"] if 16 * pairs**2 > 0.8 * _memory_bytes(device) else ["dense", "tiled"]
    rounds = rounds if pairs <= 16384 else 1
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            command = [sys.executable, __file__, "--measure", side, "--pairs", str(pairs)]
            done = subprocess.run(
                [*command, "--device", device], check=True, capture_output=True, text=True
            )
            runs[side].append(json.loads(done.stdout))
    row: dict[str, Any] = {"pairs": pairs, "rounds": rounds}
    for side in sides:
        for name in ("seconds", "peak_mb"):
            row[f"{side}_{name}"] = round(statistics.median(run[name] for run in runs[side]), 3)
    if "dense" in runs:
        both = list(zip(runs["tiled"], runs["dense"], strict=True))
        for name, digits in (("seconds", 3), ("peak_mb", 4)):
            ratio = statistics.median(ours[name] / theirs[name] for ours, theirs in both)
            row[f"ratio_{name}"] = round(ratio, digits)
        row["gradient_difference"] = max(
            abs(t["gradient"] - d["gradient"]) / d["gradient"] for t, d in both
        )
    return row


def measure(side: str, pairs: int, device: str) -> dict[str, float]:
    """Time and memory of one loss with its gradients, in this process."""
    from open_clip.loss import ClipLoss

    from clipsys.training.losses import info_nce

    loss = ClipLoss() if side == "dense" else info_nce
    _run(loss, *_features(256, device))
    image_ND, text_ND, scale = _features(pairs, device)
    before = _reset_peak(device)
    started = time.perf_counter()
    gradient = _run(loss, image_ND, text_ND, scale)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "peak_mb": (_peak(device) - before) / 1e6,
        "gradient": gradient,
    }


def _run(loss: Any, *features: torch.Tensor) -> float:
    leaves = [feature.requires_grad_() for feature in features]
    loss(*leaves).backward()
    # A figure that depends on every gradient, and waits for the device.
    return sum(float(leaf.grad.double().norm()) for leaf in leaves if leaf.grad is not None)


def _features(pairs: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image_ND = F.normalize(torch.randn(pairs, WIDTH, generator=generator), dim=1)
    noise_ND = F.normalize(torch.randn(pairs, WIDTH, generator=generator), dim=1)
    # Pairs have a cosine of 0.33, as those of a trained model do; others have 0 ± 0.04.
    text_ND = F.normalize(0.35 * image_ND + noise_ND, dim=1)
    return image_ND.to(device), text_ND.to(device), torch.tensor(SCALE, device=device)


def _reset_peak(device: str) -> float:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def _peak(device: str) -> float:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(name: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name):
            return float(line.split()[1]) * 1024
    raise RuntimeError(f"no {name} in /proc/self/status")


def _memory_bytes(device: str) -> float:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable"):
            return float(line.split()[1]) * 1024
    raise RuntimeError("no MemAvailable in /proc/meminfo")


if __name__ == "__main__":
    main()
