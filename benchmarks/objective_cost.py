"""What each objective costs, beside lightly where that has it: time, memory, exactness over ranks.

    python benchmarks/objective_cost.py steps       a training step of every method
    python benchmarks/objective_cost.py peers       beside a plain loop with lightly's loss
    python benchmarks/objective_cost.py losses      the loss alone, 4,096 rows, beside lightly's
    python benchmarks/objective_cost.py ranks       two processes: with and without the gather

Each part writes its section of benchmarks/results/objective_cost.json; `--only simclr moco` takes
some methods and leaves the others in the file. One thread for each process, float32, the encoder
of benchmarks/objectives.py, batches of 256 drawn images. Both sides of a comparison run in turn in
one process for time, and each in a process of its own for memory: what the process held beyond
what it held before the first step. Medians.
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
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from objective_cells import (
    ARCHITECTURE,
    AUGMENTATION,
    METHODS,
    PREPROCESS,
)
from objective_peers import NUM_TRAINED, PEERS, Peer, lightly_loss, loss_inputs, our_loss

BATCH = 256
ROWS = 4096
ROWS_OF_RANK = 1024
_RESULTS = Path(__file__).parent / "results" / "objective_cost.json"


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    if arguments.measure:
        print("MEASURED " + json.dumps(_child(arguments)))
        return
    part: dict[str, Callable[[str, int], dict[str, Any]]] = {
        "steps": step_cost, "peers": peer_cost, "losses": loss_cost,
    }  # fmt: skip
    names = {"steps": list(METHODS), "peers": list(PEERS), "losses": list(PEERS), "ranks": []}
    if arguments.part == "ranks":
        _write("ranks", rank_cost(arguments.rounds))
        return
    for name in arguments.only or names[arguments.part]:
        found = part[arguments.part](name, arguments.rounds)
        print(json.dumps({name: found}))
        _write(arguments.part, {name: found})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=("steps", "peers", "losses", "ranks"))
    parser.add_argument("--only", nargs="+", help="some methods")
    parser.add_argument("--rounds", type=int, default=9, help="measured steps or runs of a side")
    parser.add_argument("--measure", choices=("clipsys", "lightly"), help=argparse.SUPPRESS)
    return parser.parse_args()


def _write(part: str, found: dict[str, Any]) -> None:
    report = json.loads(_RESULTS.read_text(encoding="utf-8")) if _RESULTS.exists() else {}
    report |= {
        "batch": BATCH, "loss_rows": ROWS, "rows_of_each_rank": ROWS_OF_RANK,
        "machine": f"{_processor()}, one thread for each process", "torch": torch.__version__,
    }  # fmt: skip
    report.setdefault(part, {}).update(found)
    _RESULTS.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _processor() -> str:
    from clipsys.probe import machine

    return machine.processor() or platform.machine()


# ---- training steps ----------------------------------------------------------------------------


def step_cost(name: str, rounds: int) -> dict[str, Any]:
    """A step of one method of ours."""
    found = _in_process("steps", name, "clipsys", rounds)
    return {
        "samples_per_s": round(BATCH / found["seconds"], 1),
        "images_per_s": round(BATCH * METHODS[name].images / found["seconds"], 1),
        "images_of_each_sample": METHODS[name].images,
        "peak_mb": round(found["peak_mb"], 1),
    }


def peer_cost(name: str, rounds: int) -> dict[str, Any]:
    """A step of ours and of a plain loop with lightly's loss, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        sides = {side: _stepper(name, side, Path(folder) / side) for side in ("clipsys", "lightly")}
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(rounds + 2):
            for side in sorted(sides, reverse=bool(number % 2)):
                started = time.perf_counter()
                sides[side]()
                if number >= 2:
                    seconds[side].append(time.perf_counter() - started)
    row: dict[str, Any] = {"rounds": rounds}
    for side, times in seconds.items():
        row[f"{side}_samples_per_s"] = round(BATCH / statistics.median(times), 1)
        row[f"{side}_peak_mb"] = round(_in_process("peers", name, side, 4)["peak_mb"], 1)
    ratios = [b / a for a, b in zip(seconds["clipsys"], seconds["lightly"], strict=True)]
    row["speed_ratio"] = round(statistics.median(ratios), 3)
    row["fastest_ratio"] = round(min(seconds["lightly"]) / min(seconds["clipsys"]), 3)
    return row


def _stepper(name: str, side: str, folder: Path) -> Callable[[], float]:
    """Makes a step on the next batch; its loss."""
    from clipsys.training.data.augmentation import augment, normalisation
    from clipsys.training.distributed.process_group import start_processes
    from clipsys.training.recipe import Recipe
    from clipsys.training.run import build_run

    _write_shards(folder / "shards")
    method = METHODS[name]
    recipe = Recipe.model_validate(
        {
            "output": str(folder / "run"),
            "model": {"architecture": ARCHITECTURE, "preprocess": PREPROCESS},
            "data": {
                "train": str(folder / "shards"), "batch_size": BATCH, "workers": 0, "load_size": 64,
            },
            "augmentation": {**AUGMENTATION, **method.augmentation},
            "objective": {"name": method.name or name, **method.settings},
            "optimizer": {"lr": 1e-3, "weight_decay": 0.05, "eps": 1e-8},
            "schedule": {"epochs": 100},
            "engine": {"zero_stage": 0, "channels_last": True, "precision": "fp32"},
        }
    )  # fmt: skip
    run = build_run(recipe, start_processes("cpu"))
    run.engine.train()
    # Decoded before the clock starts, on both sides.
    batches = [batch for batch, _ in zip(run.batches(0), range(2), strict=False)]
    number = iter(range(1_000_000))
    if side == "clipsys":

        def ours() -> float:
            step = next(number)
            return run.step([batches[step % 2]], step, 1.0).loss

        return ours
    peer = Peer(run)
    size = run.model.preprocessing.size
    mean, std = normalisation(run.model.preprocessing, torch.device("cpu"))
    views = run.objective.views(recipe.augmentation)

    def theirs() -> float:
        step = next(number)
        pixels = batches[step % 2].image_BCHW
        drawn = []
        for view_number, view in enumerate(views):
            generator = torch.Generator().manual_seed(2 * step + view_number)
            image = augment(pixels, view.augmentation, view.size or size, mean, std, generator)
            drawn.append(image.contiguous(memory_format=torch.channels_last))
        return peer(tuple(drawn))

    return theirs


def _write_shards(folder: Path) -> None:
    """Noise at one scale, 64 pixels, ten classes."""
    import numpy as np
    from PIL import Image

    from clipsys.shards.samples import Sample
    from clipsys.shards.writing import write_shards

    def drawn() -> Iterator[Sample]:
        random = np.random.default_rng(0)
        for number in range(2 * BATCH):
            buffer = io.BytesIO()
            pixels = random.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).resize((64, 64)).save(buffer, "PNG")
            label = str(number % 10)
            yield Sample(f"{number:06d}", buffer.getvalue(), "png", (), label, {})

    write_shards(drawn(), folder)


# ---- the loss alone ----------------------------------------------------------------------------


def loss_cost(name: str, rounds: int) -> dict[str, Any]:
    """Loss and gradients of `ROWS` rows, on both sides, each run in a process of its own."""
    sides: dict[str, list[dict[str, float]]] = {"clipsys": [], "lightly": []}
    for _ in range(max(1, rounds // 3)):
        for side, runs in sides.items():
            runs.append(_in_process("losses", name, side, 3))
    row: dict[str, Any] = {"inputs": loss_inputs(name, 2)[1]}
    for side, runs in sides.items():
        for figure, digits in (("seconds", 4), ("peak_mb", 1)):
            row[f"{side}_{figure}"] = round(statistics.median(one[figure] for one in runs), digits)
        row[f"{side}_loss"] = runs[0]["loss"]
    row["speed_ratio"] = round(row["lightly_seconds"] / row["clipsys_seconds"], 3)
    row["memory_ratio"] = round(row["clipsys_peak_mb"] / row["lightly_peak_mb"], 4)
    return row


def _loss_seconds(
    loss: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], trained: int, rounds: int
) -> tuple[float, float]:
    """Median seconds of loss and gradients, and the first loss."""
    seconds, value = [], 0.0
    for number in range(rounds):
        leaves = [one.detach().requires_grad_(place < trained) for place, one in enumerate(inputs)]
        started = time.perf_counter()
        result = loss(*leaves)
        result.sum().backward()
        seconds.append(time.perf_counter() - started)
        value = float(result.detach().sum()) if number == 0 else value
    return statistics.median(seconds), value


# ---- ranks -------------------------------------------------------------------------------------


def rank_cost(rounds: int) -> dict[str, Any]:
    """Seconds of losses on two processes, over both of them and over each alone."""
    from torch import multiprocessing

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        multiprocessing.spawn(_rank, args=(folder, rounds, str(out)), nprocs=2)
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    print(json.dumps(found))
    return found


def _rank(rank: int, folder: str, rounds: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    alone = [dist.new_group([one]) for one in range(2)][rank]
    found: dict[str, Any] = {}
    for name in PEERS:
        if name == "moco":
            continue  # gathers nothing in its loss; its keys enter the queue once a step
        inputs, described = loss_inputs(name, ROWS_OF_RANK)
        loss = _grouped(name)
        seconds: dict[str, list[float]] = {"gathered": [], "alone": []}
        for number in range(rounds + 1):
            for kind, group in (("gathered", None), ("alone", alone)):
                dist.barrier()
                own, _ = _loss_seconds(
                    partial(loss, group=group), inputs, NUM_TRAINED.get(name, 2), 1
                )
                slowest = torch.tensor(own)
                dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
                if number:
                    seconds[kind].append(float(slowest))
        medians = {kind: round(statistics.median(times), 4) for kind, times in seconds.items()}
        found[name] = {"inputs": described, **{f"{one}_seconds": medians[one] for one in medians}}
        found[name]["ratio"] = round(medians["gathered"] / medians["alone"], 3)
    if rank == 0:
        Path(out).write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def _grouped(name: str) -> Callable[..., torch.Tensor]:
    from clipsys.training import losses

    names = {"simclr": "nt_xent"}
    found: Callable[..., torch.Tensor] = getattr(losses, names.get(name, name))
    return found


# ---- processes of their own --------------------------------------------------------------------


def _in_process(part: str, name: str, side: str, rounds: int) -> dict[str, float]:
    command = [
        sys.executable, __file__, part, "--only", name, "--measure", side, "--rounds", str(rounds),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stderr[-3000:]}")
    line = next(one for one in done.stdout.splitlines() if one.startswith("MEASURED "))
    found: dict[str, float] = json.loads(line.removeprefix("MEASURED "))
    return found


def _child(arguments: argparse.Namespace) -> dict[str, float]:
    (name,), side = arguments.only, arguments.measure
    if arguments.part == "losses":
        _one_loss(name, side, 64, 1)  # loads libraries
        before = _reset_peak()
        seconds, value = _one_loss(name, side, ROWS, arguments.rounds)
        return {"seconds": seconds, "peak_mb": (_status("VmHWM") - before) / 1e6, "loss": value}
    with tempfile.TemporaryDirectory() as folder:
        step = _stepper(name, side, Path(folder))
        before, seconds_of = _reset_peak(), []
        for _ in range(arguments.rounds + 2):
            started = time.perf_counter()
            step()
            seconds_of.append(time.perf_counter() - started)
        peak_mb = (_status("VmHWM") - before) / 1e6
    return {"seconds": statistics.median(seconds_of[2:]), "peak_mb": peak_mb}


def _one_loss(name: str, side: str, rows: int, rounds: int) -> tuple[float, float]:
    inputs, _ = loss_inputs(name, rows)
    loss = our_loss(name) if side == "clipsys" else lightly_loss(name, inputs)
    return _loss_seconds(loss, inputs, NUM_TRAINED.get(name, 2), rounds)


def _reset_peak() -> float:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def _status(name: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name):
            return float(line.split()[1]) * 1024
    raise RuntimeError(f"no {name} in /proc/self/status")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
