"""The fused kernels: interpreted on the CPU, compiled for GPUs, and run where there is one."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from clipsys.training.losses import fused
from clipsys.training.losses.fused import FusedCrossEntropy, Tiling, faster_tiling

pytest.importorskip("triton")
_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def _case(
    num_queries: int,
    num_keys: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    num_groups: int | None = None,
    scale: float = 20.0,
    tiling: Tiling,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(num_keys)
    query, key = (
        F.normalize(torch.randn(rows, width, generator=generator)).to(dtype)
        for rows in (num_queries, num_keys)
    )
    ids = torch.arange(num_keys)
    if num_groups:
        # Ids beyond 32 bits, of which the lower halves are equal.
        ids = torch.randint(0, num_groups, (num_keys,), generator=generator) << 32
    return {
        "query": query, "key": key, "scale": torch.tensor([scale]), "tiling": tiling,
        "query_ids": ids[:num_queries].clone(), "key_ids": ids,
    }  # fmt: skip


_ONE = Tiling(16, 16, 16, programs=1)  # one program walks over all tiles
_SOME = Tiling(16, 32, 16, programs=6)
_MANY = Tiling(32, 16, 32)  # each tile of the other side is a split of its own
CASES = {
    "even": _case(32, 64, 32, tiling=_ONE),
    "one pair": _case(1, 1, 1, tiling=_ONE),
    "odd sizes": _case(13, 37, 24, num_groups=8, tiling=_ONE),
    "odd sizes, some splits": _case(37, 83, 40, num_groups=8, tiling=_SOME),
    "odd sizes, many splits": _case(37, 83, 40, num_groups=8, tiling=_MANY),
    "no groups": _case(20, 50, 17, tiling=_SOME),
    "all in one group": _case(9, 21, 16, num_groups=1, tiling=_ONE),
    "scale 100": _case(33, 70, 48, num_groups=20, scale=100.0, tiling=_SOME),
    "bfloat16": _case(21, 45, 33, dtype=torch.bfloat16, num_groups=9, tiling=_SOME),
    "float16": _case(21, 45, 33, dtype=torch.float16, num_groups=9, tiling=_ONE),
}


def naive_cross_entropy(
    query_BD: torch.Tensor,
    key_ND: torch.Tensor,
    scale: torch.Tensor,
    query_ids_B: torch.Tensor,
    key_ids_N: torch.Tensor,
) -> torch.Tensor:
    """The whole matrix, plain autograd."""
    logits_BN = scale * query_BD @ key_ND.T
    target_BN = (query_ids_B[:, None] == key_ids_N[None, :]).to(logits_BN.dtype)
    target_BN = target_BN / target_BN.sum(dim=1, keepdim=True)
    return -(target_BN * logits_BN.log_softmax(dim=1)).sum(dim=1).mean()


def _check(case: dict[str, Any], loss: torch.Tensor, gradients: tuple[torch.Tensor, ...]) -> None:
    """Against float64 on the same, already rounded, features; gradients are of 3 · loss."""
    names = ("query", "key", "scale")
    leaves = [case[name].double().requires_grad_() for name in names]
    expected = naive_cross_entropy(*leaves, case["query_ids"], case["key_ids"])
    wanted = torch.autograd.grad(3 * expected, leaves)
    # float32 logits at scale s round by about s · 6e-8.
    torch.testing.assert_close(loss.double().cpu(), expected.detach(), rtol=1e-5, atol=1e-6)
    for name, actual, gradient in zip(names, gradients, wanted, strict=True):
        assert actual.dtype == case[name].dtype
        assert actual.shape == case[name].shape
        # A gradient in 16 bits cannot be nearer than half its spacing.
        spacing = torch.finfo(actual.dtype).eps / 2
        error = (actual.double().cpu() - gradient).norm() / gradient.norm().clamp_min(1e-6)
        assert error <= max(1e-5, spacing), f"{name}: {error:.1e}"


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("interpreted")
    cases, out = folder / "cases.pt", folder / "results.pt"
    torch.save(CASES, cases)
    command = [sys.executable, "-m", "tests.training.interpreted_cross_entropy", cases, out]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[3])
    results: dict[str, Any] = torch.load(out, weights_only=False)
    return results


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_the_naive_ones(name: str, interpreted: dict[str, Any]) -> None:
    loss, gradients, _ = interpreted[name]
    _check(CASES[name], loss, gradients)


@pytest.mark.parametrize("name", CASES)
def test_statistics_of_rows_equal_the_naive_ones(name: str, interpreted: dict[str, Any]) -> None:
    case = CASES[name]
    lse_B, positive_B, count_B = interpreted[name][2]
    logits_BN = case["scale"].double() * case["query"].double() @ case["key"].double().T
    positive_BN = case["query_ids"][:, None] == case["key_ids"][None, :]
    assert torch.equal(count_B, positive_BN.sum(dim=1))
    mean_B = (logits_BN * positive_BN).sum(dim=1) / positive_BN.sum(dim=1)
    for actual, expected in ((lse_B, logits_BN.logsumexp(dim=1)), (positive_B, mean_B)):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


_POINTERS = {"own": "feature", "other": "feature", "query": "feature", "key": "feature"}


def _compile(kernel: Any, dtype: torch.dtype, tiling: Tiling, capability: int, **more: Any) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def kind(name: str) -> str:
        if not name.endswith("_ptr"):
            return "i32" if name.startswith("num_") or name.endswith("_per_split") else "constexpr"
        if name.removesuffix("_ptr") in _POINTERS:
            return {torch.float32: "*fp32", torch.bfloat16: "*bf16"}[dtype]
        return "*i64" if "ids" in name else "*i32" if name == "positive_count_ptr" else "*fp32"

    constants = {**fused._constants(torch.empty(1, 512, dtype=dtype), tiling), **more}
    options = {
        name: constants.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion")
    }
    source = ASTSource(kernel, {name: kind(name) for name in kernel.arg_names}, constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize(
    ("capability", "dtype", "tiling"),
    [
        (80, torch.float32, fused.TILINGS[0]),
        *(
            pytest.param(capability, dtype, tiling, marks=pytest.mark.slow)
            for capability in (80, 90)
            for dtype in (torch.float32, torch.bfloat16)
            for tiling in fused.TILINGS
        ),
    ],
)
def test_the_kernels_compile_for_gpus(
    capability: int,
    dtype: torch.dtype,
    tiling: Tiling,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from clipsys.training.losses import triton_kernels as fused_kernels

    more = {"ERROR_PRECISION": fused._error_precision(dtype)}
    built = [
        _compile(fused_kernels.row_statistics, dtype, tiling, capability),
        _compile(
            fused_kernels.feature_gradient, dtype, tiling, capability, OWN_IS_QUERY=True, **more
        ),
        _compile(
            fused_kernels.feature_gradient, dtype, tiling, capability, OWN_IS_QUERY=False, **more
        ),
    ]
    for binary in built:
        assert binary.asm["cubin"][:4] == b"\x7fELF"
        # What a block may have on the smallest GPUs of either generation (8.6, 8.9).
        assert binary.metadata.shared <= 99 * 1024
        if dtype == torch.float32:
            assert "tf32" not in binary.asm["ptx"]


class _Clock:
    """Tells times from a table, and counts how often it was asked."""

    def __init__(self, usual: float, fused_times: list[float | None]) -> None:
        self.times = [usual, *fused_times]
        self.asked = 0

    def __call__(self, function: Any, *arguments: Any) -> float:
        time = self.times[self.asked]
        self.asked += 1
        if time is None:
            raise RuntimeError("out of shared memory")
        return time


@pytest.mark.parametrize(
    ("usual", "fused_times", "choice", "said"),
    [
        (3.0, [2.0, 1.0, 2.5], 1, "PyTorch 3e+03 ms, fused kernels 1e+03 ms; using the fused"),
        (0.5, [2.0, 1.0, 2.5], None, "fused kernels 1e+03 ms; using PyTorch"),
        (3.0, [2.0, None, None], 0, "out of shared memory"),
        (3.0, [None, None, None], None, "fused kernels unavailable; using PyTorch"),
    ],
)
def test_the_fastest_is_chosen_once_for_a_shape_and_said(
    usual: float,
    fused_times: list[float | None],
    choice: int | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(fused, "is_available", lambda device, dtype: True)
    monkeypatch.setattr(fused, "_choices", {})
    clock, query, key = _Clock(usual, fused_times), torch.ones(4, 8), torch.ones(8, 8)
    with caplog.at_level(logging.INFO, logger="clipsys"):
        chosen = faster_tiling(query, key, naive_cross_entropy, seconds=clock)
    assert chosen == (None if choice is None else fused.TILINGS[choice])
    assert said in caplog.text
    asked = clock.asked
    assert faster_tiling(query, key, naive_cross_entropy, seconds=clock) == chosen
    assert clock.asked == asked == 1 + len(fused.TILINGS)
    clock.asked = 0
    faster_tiling(query, torch.ones(9, 8), naive_cross_entropy, seconds=clock)
    assert clock.asked == asked


def test_a_cpu_and_double_precision_have_no_kernels() -> None:
    assert not fused.is_available(torch.device("cpu"))
    assert not fused.is_available(torch.device("cuda"), torch.float64)
    assert faster_tiling(torch.ones(2, 2), torch.ones(2, 2), naive_cross_entropy) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tiling", fused.TILINGS)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (300, 1000, 513), (64, 4096, 512)])
class TestOnAGpu:
    pytestmark = _gpu

    def test_loss_and_gradients_equal_the_naive_ones(
        self, sizes: tuple[int, int, int], tiling: Tiling, dtype: torch.dtype
    ) -> None:
        case = _case(*sizes, dtype=dtype, num_groups=100, scale=100.0, tiling=tiling)
        leaves = [case[name].cuda().requires_grad_() for name in ("query", "key", "scale")]
        ids = (case["query_ids"].cuda(), case["key_ids"].cuda())
        loss = FusedCrossEntropy.apply(*leaves, *ids, tiling)
        gradients = torch.autograd.grad(3 * loss, leaves)
        _check(case, loss.detach(), gradients)
        again = torch.autograd.grad(3 * FusedCrossEntropy.apply(*leaves, *ids, tiling), leaves)
        assert all(torch.equal(one, other) for one, other in zip(gradients, again, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_choice_is_measured_on_the_gpu(caplog: pytest.LogCaptureFixture) -> None:
    query, key = torch.ones(1000, 64, device="cuda"), torch.ones(3000, 64, device="cuda")
    with caplog.at_level(logging.INFO, logger="clipsys"):
        chosen = faster_tiling(query, key, naive_cross_entropy)
    assert chosen is None or chosen in fused.TILINGS
    assert "fused kernels unavailable" not in caplog.text
