"""Process groups: joining one, gathering through one with gradients, and what rank 0 says."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from clipsys.errors import TrainingError

T = TypeVar("T")

#: How often rank 0 says that it is at work while the others wait for it.
_HEARTBEAT_S = 5.0
#: How long the others wait without such a sign.
HEARTBEAT_LOST_S = 300.0
#: Numbers the waits, the same on every rank: all of them call `on_first_rank` in one order.
_WAITS = itertools.count()


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of ranks; 1 where no process group exists."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def rank(group: dist.ProcessGroup | None = None) -> int:
    """This process's rank; 0 where no process group exists."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def local_rank() -> int:
    """This process's rank on its machine, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def gather_rows(local_BX: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Stacks every rank's rows in rank order: (B, X) on each of W ranks -> (W·B, X) on all.

    Differentiable, and exactly so: backward *sums* what all ranks' losses contribute to this
    rank's rows. With each rank's loss a mean over its own rows, and gradients averaged over
    ranks as DDP and DeepSpeed do, that is the full-batch gradient. A backward that averages, or
    that keeps the local part only, is not. Every rank must bring the same number of rows.
    """
    if world_size(group) == 1:
        return local_BX
    if not local_BX.requires_grad:
        return _all_gather(local_BX, group)
    gathered: torch.Tensor = _GatherRows.apply(local_BX, group)
    return gathered


def _all_gather(local_BX: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    # all_gather rather than all_gather_into_tensor: gloo has no such call for every dtype.
    parts = [torch.empty_like(local_BX) for _ in range(world_size(group))]
    dist.all_gather(parts, local_BX.contiguous(), group=group)
    return torch.cat(parts)


def _all_reduce(local: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The sum over ranks as a new tensor."""
    total = local.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local_BX: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        ctx.group = group
        ctx.num_rows = len(local_BX)
        return _all_gather(local_BX, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient_NX,) = gradients
        # gloo has no reduce_scatter; an all_reduce of the same rows, then this rank's slice.
        total_NX = _all_reduce(gradient_NX, ctx.group)
        start = rank(ctx.group) * ctx.num_rows
        return total_NX[start : start + ctx.num_rows], None


def sum_over_ranks(local: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The sum of every rank's tensor, on all ranks.

    Differentiable: backward *sums* what all ranks' losses contribute, as that of `gather_rows`.
    With a loss that every rank computes alike from the sum, and gradients averaged over ranks, that
    is the gradient of one process. An all-reduce outside of autograd, as in the authors' code of
    Barlow Twins, gives that gradient divided by the number of ranks.
    """
    if world_size(group) == 1:
        return local
    if not local.requires_grad:
        return _all_reduce(local, group)
    summed: torch.Tensor = _SumOverRanks.apply(local, group)
    return summed


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        ctx.group = group
        return _all_reduce(local, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_reduce(gradients[0], ctx.group), None


def average_over_ranks(tensors: Sequence[torch.Tensor]) -> None:
    """Averages tensors over ranks, in place; doing it twice changes no bit.

    In float64: the mean of equal float32 values is that value, for any number of ranks.
    """
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    means = torch.split(flat, [tensor.numel() for tensor in tensors])
    for tensor, mean in zip(tensors, means, strict=True):
        tensor.copy_(mean.view_as(tensor))


def gather_objects(value: T) -> list[T]:
    """Every rank's picklable value, in rank order, on all ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: T) -> T:
    """Rank 0's picklable value, on all ranks."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_first_rank(action: Callable[[], T]) -> T:
    """Runs ``action()`` on rank 0 and gives its result, or raises its exception, on all ranks.

    Without this an exception on rank 0 leaves the others waiting in their next collective. The
    action may take longer than a collective waits: counting shards can take hours.
    """
    result: T | None = None
    failure: Exception | None = None
    with _first_rank_at_work():
        if rank() == 0:
            try:
                result = action()
            except Exception as error:
                failure = _picklable(error)
    result, failure = broadcast_object((result, failure))
    if failure is not None:
        raise failure
    return cast("T", result)


@contextlib.contextmanager
def _first_rank_at_work() -> Iterator[None]:
    """The other ranks wait at the end of it until rank 0 has left it, as long as rank 0 lives.

    Through the group's store rather than a collective, which has a time limit: rank 0 counts up in
    it every few seconds.

    Raises:
        TrainingError: rank 0 has not counted for `HEARTBEAT_LOST_S`.
    """
    if world_size() == 1:
        yield
        return
    store = dist.distributed_c10d._get_default_store()
    name = f"clipsys/first-rank/{next(_WAITS)}"
    if rank() != 0:
        yield
        _wait_for_first_rank(store, name)
        return
    done = threading.Event()

    def beat() -> None:
        count = 0
        while not done.wait(_HEARTBEAT_S):
            count += 1
            store.set(f"{name}/beat", str(count))

    thread = threading.Thread(target=beat, name="first-rank-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        store.set(f"{name}/done", "1")


def _wait_for_first_rank(store: Any, name: str) -> None:
    last, since, pause_s = b"", time.monotonic(), 0.005
    while not store.check([f"{name}/done"]):
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.25)
        beat = store.get(f"{name}/beat") if store.check([f"{name}/beat"]) else b""
        if beat != last:
            last, since = beat, time.monotonic()
        elif time.monotonic() - since > HEARTBEAT_LOST_S:
            raise TrainingError(
                f"rank 0 has not answered for {HEARTBEAT_LOST_S:g} s while the other ranks waited "
                "for it; its own output says why"
            )


def _picklable(error: Exception) -> Exception:
    try:
        pickle.dumps(error)
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
