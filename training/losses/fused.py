"""The tiled contrastive cross-entropy in fused Triton kernels, for CUDA.

The same function as `one_way` of `clipsys.training.losses.tiled`, to which it is an alternative:
the (B, N) logits are not written anywhere, not even a tile of them. Triton is imported at the first
use.

Untested on a GPU. What was run: the kernels through Triton's interpreter on a CPU, against a
float64 reference, and their compilation for compute capability 8.0 and 9.0. The tests marked
``gpu`` have not run and no speed was measured (``make gpu`` does both), so nothing here claims to
be faster; `faster_tiling` measures it on the user's device and decides. Only runs of several ranks
ask it: a single one has `two_way`, with less than half of the products.

Shapes: B queries, N keys, D width, S splits of the other side.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

_logger = logging.getLogger(__name__)


class Tiling(NamedTuple):
    """How a kernel cuts its work.

    Attributes:
        own: rows that a program owns; a power of two of at least 16, as the next two.
        other: rows of the other side in a tile.
        width: width of the features, which a kernel takes at once.
        num_warps: warps of a program.
        programs: at least so many are started, by splitting the other side: several for each of a
            large GPU's 132 to 148 multiprocessors.
    """

    own: int = 64
    other: int = 64
    width: int = 32
    num_warps: int = 8
    programs: int = 512


#: What `faster_tiling` tries: those that the compiler fits into the registers of capability 8.0
#: and 9.0 (at most 72 bytes of a thread spill; 128 x 128 spills hundreds).
TILINGS = (Tiling(), Tiling(width=16), Tiling(own=128, width=16))

#: As `FusedCrossEntropy.apply` without its tiling.
CrossEntropy = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor
]


def is_available(device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the kernels can be used: CUDA with tensor cores, Triton installed, no float64."""
    return (
        device.type == "cuda"
        and dtype in (torch.float32, torch.bfloat16, torch.float16)
        and importlib.util.find_spec("triton") is not None
        and torch.cuda.get_device_capability(device) >= (7, 5)
    )


class FusedCrossEntropy(torch.autograd.Function):
    """Mean over rows of the cross-entropy against evenly spread positives.

    ``FusedCrossEntropy.apply(query_BD, key_ND, scale, query_ids_B, key_ids_N, tiling)``: a float32
    scalar. Features are float32, bfloat16 or float16, both alike; ``scale`` is one element, already
    exponentiated; equal ids are positives of each other, and each query needs one at least.
    Gradients are in the dtypes of what they belong to; sums are taken in float32 and in a fixed
    order, so that they are the same at each run.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_BD: torch.Tensor,
        key_ND: torch.Tensor,
        scale: torch.Tensor,
        query_ids_B: torch.Tensor,
        key_ids_N: torch.Tensor,
        tiling: Tiling = TILINGS[0],
    ) -> torch.Tensor:
        """Keeps the log-sum-exp of each row, not the logits."""
        query_BD, key_ND = query_BD.contiguous(), key_ND.contiguous()
        lse_B, positive_B, count_B = row_statistics(
            query_BD, key_ND, scale, query_ids_B, key_ids_N, tiling=tiling
        )
        ctx.save_for_backward(query_BD, key_ND, scale, query_ids_B, key_ids_N, lse_B, count_B)
        ctx.tiling = tiling
        return (lse_B - positive_B).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Computes the tiles again."""
        query_BD, key_ND, scale, *ids_and_rows = ctx.saved_tensors
        weight = gradients[0] / len(query_BD)
        query_gradient_BD, key_gradient_ND, scale_gradient = feature_gradients(
            query_BD, key_ND, scale, *ids_and_rows, tiling=ctx.tiling
        )
        factor = _one(weight * scale)
        return (
            query_gradient_BD.mul_(factor).to(query_BD.dtype),
            key_gradient_ND.mul_(factor).to(key_ND.dtype),
            (scale_gradient * weight).to(scale.dtype).reshape(scale.shape),
            None,
            None,
            None,
        )


def row_statistics(
    query_BD: torch.Tensor,
    key_ND: torch.Tensor,
    scale: torch.Tensor,
    query_ids_B: torch.Tensor,
    key_ids_N: torch.Tensor,
    *,
    tiling: Tiling = TILINGS[0],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The log-sum-exp, the mean positive logit (float32) and the number of positives of each row.

    The cross-entropy of a row is the first minus the second. Contiguous features, no gradients.
    """
    from clipsys.training.losses import triton_kernels as fused_kernels

    num_queries, num_keys = len(query_BD), len(key_ND)
    grid, per_split = _grid(num_queries, num_keys, tiling)
    lse_SB = torch.empty(grid[1], num_queries, dtype=torch.float32, device=query_BD.device)
    positive_SB = torch.empty_like(lse_SB)
    count_SB = torch.empty_like(lse_SB, dtype=torch.int32)
    with _on(query_BD.device):
        fused_kernels.row_statistics[grid](
            query_BD, key_ND, _one(scale), query_ids_B, key_ids_N, lse_SB, positive_SB, count_SB,
            num_queries, num_keys, per_split,
            **_constants(query_BD, tiling),
        )  # fmt: skip
    count_B = count_SB.sum(dim=0)
    return torch.logsumexp(lse_SB, dim=0), positive_SB.sum(dim=0) / count_B, count_B


def feature_gradients(
    query_BD: torch.Tensor,
    key_ND: torch.Tensor,
    scale: torch.Tensor,
    query_ids_B: torch.Tensor,
    key_ids_N: torch.Tensor,
    lse_B: torch.Tensor,
    count_B: torch.Tensor,
    *,
    tiling: Tiling = TILINGS[0],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the *sum* of the rows' cross-entropies, from what `row_statistics` returned.

    Returns:
        (B, D) and (N, D) float32, to be multiplied with the scale; and that of the scale.
    """
    from clipsys.training.losses import triton_kernels as fused_kernels

    inverse_count_B = count_B.to(torch.float32).reciprocal()
    results = []
    sides = ((query_BD, query_ids_B), (key_ND, key_ids_N))
    for own_is_query, (own, other) in ((True, sides), (False, sides[::-1])):
        num_own, num_other = len(own[0]), len(other[0])
        grid, per_split = _grid(num_own, num_other, tiling)
        shape = (grid[1], num_own)
        gradient = torch.zeros(*shape, own[0].shape[1], device=lse_B.device)
        # Keys have no part in the scale's gradient; the kernel then leaves its place alone.
        scale_gradient = torch.zeros(shape if own_is_query else (1,), device=lse_B.device)
        with _on(lse_B.device):
            fused_kernels.feature_gradient[grid](
                own[0], other[0], _one(scale), own[1], other[1], lse_B, inverse_count_B,
                gradient, scale_gradient, num_own, num_other, per_split,
                **_constants(own[0], tiling),
                ERROR_PRECISION=_error_precision(own[0].dtype),
                OWN_IS_QUERY=own_is_query,
            )  # fmt: skip
        results.append((gradient.sum(dim=0) if grid[1] > 1 else gradient[0], scale_gradient.sum()))
    return results[0][0], results[1][0], results[0][1]


def _grid(num_own: int, num_other: int, tiling: Tiling) -> tuple[tuple[int, int], int]:
    """Blocks and splits, and how many rows of the other side are in a split; none is empty.

    A split costs another copy of the gradient: of float32, at most ``programs`` blocks of rows,
    which is 64 MiB of 64 rows at a width of 512.
    """
    blocks = -(-num_own // tiling.own)
    tiles = -(-num_other // tiling.other)
    splits = min(tiles, max(1, tiling.programs // blocks))
    tiles_per_split = -(-tiles // splits)
    return (blocks, -(-tiles // tiles_per_split)), tiles_per_split * tiling.other


def _constants(features: torch.Tensor, tiling: Tiling) -> dict[str, Any]:
    return {
        "WIDTH": features.shape[1],
        "BLOCK_OWN": tiling.own,
        "BLOCK_OTHER": tiling.other,
        "BLOCK_WIDTH": tiling.width,
        # TF32's 10 bits would put 1e-2 on a logit at scale 100. Features of 16 bits, however, are
        # exact in it, and so are their products in the float32 that adds them up.
        "PRECISION": "ieee" if features.dtype == torch.float32 else "tf32",
        "num_warps": tiling.num_warps,
        "num_stages": 2,
        # Triton 3.9 warns where its default, which is going to change, is relied upon.
        "enable_fp_fusion": True,
    }


def _error_precision(dtype: torch.dtype) -> str:
    """How the error, which is float32, is multiplied with features.

    With those of 16 bits, exact in TF32, three products of TF32 are as exact as one of float32.
    """
    return "ieee" if dtype == torch.float32 else "tf32x3"


def _one(scale: torch.Tensor) -> torch.Tensor:
    return scale.detach().to(torch.float32).reshape(1)


def _on(device: torch.device) -> Any:
    # Triton launches on the current device, whatever the tensors' is.
    return torch.cuda.device(device if device.type == "cuda" else -1)


#: Rows that are measured at most: time grows in proportion to them.
_MEASURED_ROWS = 8192

_choices: dict[tuple[torch.Size, int, torch.dtype, torch.device], Tiling | None] = {}


def faster_tiling(
    query_BD: torch.Tensor,
    key_ND: torch.Tensor,
    alternative: CrossEntropy,
    *,
    seconds: Callable[..., float] | None = None,
) -> Tiling | None:
    """Measures, once for each shape, dtype and device, whether to use the kernels, and how cut.

    Args:
        query_BD: features of this step; their values do not matter.
        key_ND: keys of this step.
        alternative: what the kernels stand in for.
        seconds: how long ``function(*arguments)`` takes with its backward; by default the median
            of five runs, by CUDA's events.

    Returns:
        The fastest tiling; None where the kernels are not available, or not faster.
    """
    key = (query_BD.shape, len(key_ND), query_BD.dtype, query_BD.device)
    if not is_available(query_BD.device, query_BD.dtype):
        return None
    if key not in _choices:
        _choices[key] = _measure(*key, alternative, seconds or _seconds)
    return _choices[key]


def _measure(
    query_shape: torch.Size,
    num_keys: int,
    dtype: torch.dtype,
    device: torch.device,
    alternative: CrossEntropy,
    seconds: Callable[..., float],
) -> Tiling | None:
    num_queries, width = min(query_shape[0], _MEASURED_ROWS), query_shape[1]
    query_BD, key_ND = (
        torch.full((rows, width), width**-0.5, dtype=dtype, device=device, requires_grad=True)
        for rows in (num_queries, num_keys)
    )
    scale = torch.tensor([1 / 0.07], device=device, requires_grad=True)
    ids_N = torch.arange(num_keys, device=device)
    arguments = (query_BD, key_ND, scale, ids_N[:num_queries], ids_N)
    usual_s = seconds(alternative, *arguments)
    best, best_s = None, float("inf")
    for tiling in TILINGS:
        try:
            tiling_s = seconds(FusedCrossEntropy.apply, *arguments, tiling)
        except Exception as error:  # compilers, drivers and small GPUs refuse in many ways
            _logger.info("the fused cross-entropy cannot run as %s: %s", tiling, error)
            continue
        if tiling_s < best_s:
            best, best_s = tiling, tiling_s
    chosen = best if best_s < usual_s else None
    _logger.info(
        "cross-entropy of %d x %d x %d, %s: PyTorch %.3g ms, fused kernels %s; using %s",
        num_queries,
        num_keys,
        width,
        str(dtype).removeprefix("torch."),
        usual_s * 1e3,
        f"{best_s * 1e3:.3g} ms" if best else "unavailable",
        "the fused kernels" if chosen else "PyTorch",
    )
    return chosen


def _seconds(function: Callable[..., torch.Tensor], *arguments: Any) -> float:
    """Median of five runs of forward and backward, after two that compile and warm up."""
    times_s: list[float] = []
    for _ in range(7):
        start: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        torch.autograd.grad(function(*arguments), arguments[:3])
        end.record()
        torch.cuda.synchronize()
        times_s.append(start.elapsed_time(end) / 1e3)
    return sorted(times_s[2:])[2]
