"""The parts of ``make gpu``; gpu.py starts each in a process of its own.

    peak       what products and copies reach on this card
    loss       the contrastive loss with all gradients beside open_clip's, 16,384 to 262,144 pairs
    training   steps of ViT-B/32 and ViT-L/14: fp32, bf16, compiled, a cached batch of 65,536
    indexing   images a second, of the tower alone and of a whole `Collection.add`
    search     indexes on the CPU and on the GPU
    tests      the tests marked ``gpu``

Each figure is printed as soon as it is there: a part that is ended loses only what is not measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu import MARK, ROOT
from torch.nn import functional as F  # noqa: N812

WIDTH = 512
SCALE = 100.0
#: No single measurement of the loss may take longer: the next size takes four times as long.
LONGEST_S = 25.0


@dataclass(frozen=True)
class Setting:
    """What all parts are told.

    Attributes:
        device: cuda or cpu.
        smoke: tiny sizes, to see that everything runs.
        ends_at: of `time.monotonic`; nothing new is begun close before it.
    """

    device: str
    smoke: bool
    ends_at: float

    def size(self, real: int, smoke: int) -> int:
        """The one or the other."""
        return smoke if self.smoke else real


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--limit", type=float, default=600.0)
    arguments = parser.parse_args()
    ends_at = time.monotonic() + arguments.limit
    PARTS[arguments.part](Setting(arguments.device, arguments.smoke, ends_at))


def report(name: str, **figures: Any) -> None:
    """Hands one row to the process that collects them."""
    # On a line of its own, whatever a library has printed before.
    print("\n" + MARK + json.dumps({"name": name, **figures}), flush=True)


def attempt(name: str, setting: Setting, measure: Callable[[], object]) -> None:
    """Measures, or reports why not as the row's figure: the next row is measured all the same."""
    if time.monotonic() > setting.ends_at - 5:
        report(name, failed="no time was left")
        return
    try:
        measure()
    except Exception as error:  # drivers, compilers and missing libraries fail in many ways
        line = " ".join(str(error).split())[:300]
        report(name, failed=f"{type(error).__name__}: {line}")
    finally:
        gc.collect()
        if setting.device == "cuda":
            torch.cuda.empty_cache()


def seconds(function: Callable[[], object], setting: Setting, *, rounds: int = 5) -> float:
    """Median time of a call after one that warms up, waiting for the device."""
    times_s = []
    for _ in range(rounds + 1):
        _wait(setting)
        started = time.perf_counter()
        function()
        _wait(setting)
        times_s.append(time.perf_counter() - started)
    return statistics.median(times_s[1:])


def _wait(setting: Setting) -> None:
    if setting.device == "cuda":
        torch.cuda.synchronize()


def _peak_mb(setting: Setting, function: Callable[[], object]) -> float | None:
    """Memory of the GPU that a call takes beyond what is there."""
    if setting.device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)


# ---- peak ----------------------------------------------------------------------------------------


def peak(setting: Setting) -> None:
    size = setting.size(8192, 128)

    def product(name: str, dtype: torch.dtype) -> None:
        left, right = (torch.randn(size, size, device=setting.device).to(dtype) for _ in range(2))
        product_s = seconds(partial(torch.matmul, left, right), setting, rounds=10)
        report(name, tflops=round(2 * size**3 / product_s / 1e12, 4), size=size)

    def copy() -> None:
        source = torch.zeros(setting.size(2**32, 2**20), dtype=torch.uint8, device=setting.device)
        target = torch.empty_like(source)
        copy_s = seconds(partial(target.copy_, source), setting)
        report("copy", bytes_per_s=2 * len(source) / copy_s)

    attempt("fp32", setting, partial(product, "fp32", torch.float32))
    attempt("bf16", setting, partial(product, "bf16", torch.bfloat16))
    attempt("copy", setting, copy)


# ---- loss ----------------------------------------------------------------------------------------


def loss(setting: Setting) -> None:
    sizes = (48,) if setting.smoke else (16_384, 32_768, 65_536, 131_072, 262_144)
    latest_s: dict[str, float] = {}
    for pairs in sizes:
        for name, dtype, side in _loss_sides():
            row = f"{name}, {pairs} pairs"
            if 4.5 * latest_s.get(name, 0.0) > LONGEST_S:
                report(row, skipped=f"would take more than {LONGEST_S:.0f} s")
            elif name == "open_clip" and 16 * pairs**2 > 0.85 * _free_bytes(setting):
                report(row, skipped="its logits do not fit into memory")
            else:
                started = time.perf_counter()
                attempt(row, setting, partial(_measure_loss, row, side, pairs, dtype, setting))
                # Each measurement makes three calls at least.
                latest_s[name] = (time.perf_counter() - started) / 3


def _loss_sides() -> list[tuple[str, torch.dtype, Callable[..., torch.Tensor]]]:
    from clipsys.training.losses import info_nce
    from clipsys.training.losses.fused import TILINGS

    sides: list[tuple[str, torch.dtype, Callable[..., torch.Tensor]]] = [
        ("open_clip", torch.float32, _open_clip_loss),
        ("clipsys", torch.float32, info_nce),
    ]
    for number, tiling in enumerate(TILINGS):
        for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            sides.append((f"triton {number} {short}", dtype, partial(_fused_loss, tiling)))
    return sides


def _open_clip_loss(*features: torch.Tensor) -> torch.Tensor:
    from open_clip.loss import ClipLoss

    value: torch.Tensor = ClipLoss()(*features)
    return value


def _fused_loss(
    tiling: Any, image_ND: torch.Tensor, text_ND: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Both directions by the Triton kernels, which clipsys itself uses where there are ranks."""
    from clipsys.training.losses.fused import FusedCrossEntropy

    ids_N = torch.arange(len(image_ND), device=image_ND.device)
    one: torch.Tensor = FusedCrossEntropy.apply(image_ND, text_ND, scale, ids_N, ids_N, tiling)
    other: torch.Tensor = FusedCrossEntropy.apply(text_ND, image_ND, scale, ids_N, ids_N, tiling)
    return (one + other) / 2


def _measure_loss(
    row: str,
    side: Callable[..., torch.Tensor],
    pairs: int,
    dtype: torch.dtype,
    setting: Setting,
) -> None:
    leaves = [part.to(dtype if part.ndim else part.dtype) for part in _features(pairs, setting)]
    leaves = [part.requires_grad_() for part in leaves]

    def run() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(side(*leaves), leaves)

    memory_mb = _peak_mb(setting, run)
    once_s = seconds(run, setting, rounds=1)
    taken_s = once_s if once_s > 2 or setting.smoke else seconds(run, setting)
    norm = float(sum(gradient.double().square().sum() for gradient in run()) ** 0.5)
    report(
        row,
        pairs=pairs,
        seconds=round(taken_s, 6),
        peak_mb=memory_mb,
        gradient_norm=norm,
        # Any exact loss needs one product forward and two backward.
        tflops=round(6 * pairs**2 * leaves[0].shape[1] / taken_s / 1e12, 6),
        products="fp32" if dtype == torch.float32 else "bf16",
    )


def _features(pairs: int, setting: Setting) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit vectors; a pair has a cosine of 0.2, with which the loss of 16,384 is about one."""
    generator = torch.Generator(setting.device).manual_seed(0)
    shape = (pairs, setting.size(WIDTH, 32))
    image_ND, noise_ND = (
        F.normalize(torch.randn(*shape, generator=generator, device=setting.device), dim=1)
        for _ in range(2)
    )
    text_ND = F.normalize(0.2 * image_ND + noise_ND, dim=1)
    scale = torch.tensor(SCALE, device=setting.device)
    return image_ND, text_ND, scale


def _free_bytes(setting: Setting) -> float:
    return torch.cuda.mem_get_info()[0] if setting.device == "cuda" else float(2**30)


# ---- training ------------------------------------------------------------------------------------

_TINY: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@dataclass(frozen=True)
class StepCase:
    """One training step to be measured."""

    model: str
    precision: str
    batch: int
    micro_batch: int
    compile: bool = False

    def __str__(self) -> str:
        cached = f" in micro-batches of {self.micro_batch}" if self.batch > self.micro_batch else ""
        return f"{self.model}, {self.precision}{', compiled' * self.compile}, {self.batch}{cached}"


#: What matters most stands first; compiling takes longest, so it is last.
STEP_CASES = (
    StepCase("ViT-B-32", "bf16", 1024, 1024),
    StepCase("ViT-B-32", "fp32", 512, 512),
    StepCase("ViT-L-14", "bf16", 128, 128),
    StepCase("ViT-L-14", "fp32", 64, 64),
    StepCase("ViT-B-32", "bf16", 65_536, 1024),
    StepCase("ViT-B-32", "bf16", 1024, 1024, compile=True),
    StepCase("ViT-L-14", "bf16", 128, 128, compile=True),
)
_SMOKE_STEPS = (
    StepCase("tiny", "fp32", 8, 8),
    StepCase("tiny", "bf16", 8, 8),
    StepCase("tiny", "fp32", 8, 2),
)


def training(setting: Setting) -> None:
    from clipsys.training.distributed.process_group import start_processes

    device = start_processes(setting.device)
    for case in _SMOKE_STEPS if setting.smoke else STEP_CASES:
        attempt(str(case), setting, partial(_measure_step, case, device, setting))


def _measure_step(case: StepCase, device: torch.device, setting: Setting) -> None:
    from clipsys.models.open_clip_models import build_model
    from clipsys.training.engine.config import EngineConfig
    from clipsys.training.engine.deepspeed_engine import Engine
    from clipsys.training.engine.optimizers import OptimizerConfig
    from clipsys.training.model.outputs import Inputs, Outputs, Rows, Sizes, State
    from clipsys.training.model.towers import TowerOptions
    from clipsys.training.model.trained import TrainedModel
    from clipsys.training.objectives import Labels
    from clipsys.training.objectives.infonce import InfoNCE, InfoNCEConfig

    architecture = _TINY if case.model == "tiny" else case.model
    parts = build_model(architecture, for_training=True)
    flop = _flop_per_pair(parts.model.to(device), device)
    objective = InfoNCE(InfoNCEConfig(positives="pair"))
    engine = Engine(
        TrainedModel(
            parts.model,
            objective,
            TowerOptions(case.precision, compile=case.compile),
            sizes=Sizes(int(parts.config["embed_dim"])),
        ),
        config=EngineConfig(zero_stage=0, precision=case.precision),
        optimizer=OptimizerConfig(),
        local_batch_size=case.batch,
        device=device,
    )
    engine.train()
    pairs = [
        partial(_pairs, parts.model, case.micro_batch, number, device)
        for number in range(case.batch // case.micro_batch)
    ]

    def shown(draw: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> Inputs:
        image_BCHW, tokens_BL = draw()
        return Inputs((image_BCHW,), (tokens_BL,))

    inputs = [partial(shown, draw) for draw in pairs]
    numbers = torch.arange(case.batch, device=device)
    labels = Labels(numbers, numbers)

    def contrast(outputs: Outputs, targets: Rows, state: State) -> tuple[torch.Tensor, State]:
        return objective.loss(outputs, targets, labels, state)

    def step() -> None:
        engine.accumulate(inputs, contrast)
        engine.update(1.0)

    cached = len(inputs) > 1
    step_s = seconds(step, setting, rounds=1 if cached else 5)
    memory_mb = _peak_mb(setting, step)
    # A cached batch passes the towers forward once more: four thirds of the operations.
    operations = flop * case.batch * (4 / 3 if cached else 1)
    report(
        str(case),
        pairs_per_s=round(case.batch / step_s, 2),
        step_s=round(step_s, 5),
        memory_mb=memory_mb,
        tflops=round(operations / step_s / 1e12, 6),
        products="fp32" if case.precision == "fp32" else "bf16",
    )


def _inputs(model: Any, count: int, seed: int, device: torch.device) -> Any:
    from clipsys.training.model.outputs import Inputs

    image_BCHW, tokens_BL = _pairs(model, count, seed, device)
    return Inputs((image_BCHW,), (tokens_BL,))


def _pairs(
    model: Any, count: int, seed: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised images and captions that fill the context, drawn on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    side, length = _sizes(model)
    image_BCHW = torch.randn(count, 3, side, side, generator=generator, device=device)
    tokens_BL = torch.randint(1, 49_000, (count, length), generator=generator, device=device)
    tokens_BL[:, -1] = 49_407  # the end of a text, the highest token
    return image_BCHW, tokens_BL


def _sizes(model: Any) -> tuple[int, int]:
    size = model.visual.image_size
    return int(size[0] if isinstance(size, Sequence) else size), int(model.context_length)


def _flop_per_pair(model: torch.nn.Module, device: torch.device) -> float:
    """Operations of a forward and backward pass of both towers, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    image_BCHW, tokens_BL = _pairs(model, 2, 0, device)
    with FlopCounterMode(display=False) as counter:
        features: Any = model.encode_image(image_BCHW), model.encode_text(tokens_BL)  # type: ignore[operator]
        (features[0].sum() + features[1].sum()).backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() / 2


# ---- indexing ------------------------------------------------------------------------------------


def indexing(setting: Setting) -> None:
    import clipsys
    from clipsys.models.open_clip_models import build_model, save_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(build_model(_TINY if setting.smoke else "ViT-B-32"), folder / "model")
        encoder = clipsys.load(folder / "model", device=setting.device, precision="fast")
        attempt("image tower", setting, partial(_measure_tower, encoder, setting))
        attempt("Collection.add", setting, partial(_measure_adding, encoder, folder, setting))


def _measure_tower(encoder: Any, setting: Setting) -> None:
    batch, (side, _) = setting.size(256, 4), _sizes(encoder.model)
    pixels = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8).numpy()
    batch_s = seconds(partial(encoder.encode_pixels, pixels), setting)
    rate = round(batch / batch_s, 1)
    report("image tower", images_per_s=rate, precision=encoder.precision, batch=batch)


def _measure_adding(encoder: Any, folder: Path, setting: Setting) -> None:
    from clipsys.retrieval import Collection

    _draw(folder / "warm", setting.size(256, 4), seed=1)
    _draw(folder / "images", setting.size(4_000, 12), seed=2)
    with Collection.create(folder / "collection", encoder) as collection:
        collection.add(folder / "warm")
        before = len(collection)
        started = time.perf_counter()
        collection.add(folder / "images")
        taken_s = time.perf_counter() - started
        images = len(collection) - before
    report("Collection.add", images_per_s=round(images / taken_s, 1), images=images)


def _draw(folder: Path, count: int, *, seed: int) -> None:
    """JPEGs of 640 x 480, no two alike, drawn by all cores."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    from PIL import Image

    folder.mkdir()

    def draw(number: int) -> None:
        coarse = np.random.default_rng((seed, number)).integers(0, 256, (30, 40, 3), np.uint8)
        image = Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)
        image.save(folder / f"{number:05d}.jpg", quality=88)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(draw, range(count)))


# ---- search --------------------------------------------------------------------------------------


def search(setting: Setting) -> None:
    from search import Corpus, K, open_snapshot, write_vectors

    from clipsys.retrieval.indexes.tuning import exact_neighbours

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_vectors(folder, setting.size(1_000_000, 3_000))
        snapshot = open_snapshot(folder)
        queries_QD = Corpus().images(setting.size(2_048, 16), 1_000_001)
        truth_QK = exact_neighbours(snapshot, queries_QD, K)
        for kind in ("flat", "ivf-sq8", "ivf-flat"):
            measure = partial(_measure_kind, kind, folder, snapshot, queries_QD, truth_QK, setting)
            attempt(kind, setting, measure)


def _measure_kind(
    kind: Any, folder: Path, snapshot: Any, queries_QD: Any, truth_QK: Any, setting: Setting
) -> None:
    from clipsys.retrieval.indexes import gpu
    from clipsys.retrieval.indexes.building import build_index
    from clipsys.retrieval.indexes.generation import load_index
    from clipsys.retrieval.indexes.planning import plan_of_kind
    from clipsys.retrieval.search.ranking import rank_batch

    dim, k = queries_QD.shape[1], truth_QK.shape[1]
    started = time.perf_counter()
    plan = plan_of_kind(kind, len(snapshot), dim)
    built = build_index(folder, snapshot, generation=1, plan=plan)
    build_s = time.perf_counter() - started
    index = load_index(folder, built, dim)
    size_bytes = (folder / built.file).stat().st_size

    def rates(place: str, searched: Any) -> None:
        ranked = rank_batch(snapshot, searched, queries_QD, k)
        hits = sum(
            len(set(ids.tolist()) & set(true.tolist()))
            for (ids, _), true in zip(ranked, truth_QK, strict=True)
        )
        batch_s = seconds(partial(rank_batch, snapshot, searched, queries_QD, k), setting, rounds=3)
        one_s = seconds(partial(rank_batch, snapshot, searched, queries_QD[:1], k), setting)
        report(
            f"{kind} on the {place}",
            items=len(snapshot),
            queries_per_s=round(len(queries_QD) / batch_s, 1),
            one_query_ms=round(1e3 * one_s, 3),
            recall=round(hits / truth_QK.size, 5),
            build_s=round(build_s, 2),
        )

    copy = gpu.copy_to_gpus(built, index.faiss_index, size_bytes)
    if copy is not None:
        rates("GPU", replace(index, on_gpus=copy))
        copy.release()
    elif setting.device == "cuda":
        report(f"{kind} on the GPU", failed=str(gpu.placement_of(kind, size_bytes)))
    rates("CPU", index)


# ---- tests ---------------------------------------------------------------------------------------


class _Outcomes:
    """A plugin of pytest that reports each test as a row."""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            if report.failed:
                _report_test(report.nodeid, failed=str(report.longrepr)[-300:])
            elif report.when == "call" or report.skipped:
                _report_test(report.nodeid, outcome=report.outcome)


_report_test = report


def tests(setting: Setting) -> None:
    import pytest

    marked = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "mark.gpu" in path.read_text(encoding="utf-8")
    ]
    # Warnings are errors for the versions that are tested with; here other versions are met.
    options = ["-m", "gpu", "-s", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    status = pytest.main([*options, *marked], plugins=[_Outcomes()])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        sys.exit(f"pytest ended with {status!r}")


PARTS: dict[str, Callable[[Setting], None]] = {
    "peak": peak,
    "loss": loss,
    "training": training,
    "indexing": indexing,
    "search": search,
    "tests": tests,
}

if __name__ == "__main__":
    main()
