"""Real process groups for tests: a function runs in several processes, joined through gloo."""

from __future__ import annotations

import multiprocessing
import os
import queue
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# forkserver: torch and DeepSpeed are imported once for all tests, and no test forks a process that
# has threads.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "tests.preload"])

TIMEOUT_S = 240


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """Runs ``function(rank, world_size, *arguments)`` on every rank and returns the results."""
    with tempfile.TemporaryDirectory() as folder:
        results = CONTEXT.Queue()
        processes = [
            CONTEXT.Process(
                target=_enter, args=(function, rank, world_size, folder, results, arguments)
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        collected: dict[int, Any] = {}
        try:
            while len(collected) < world_size:
                rank, failure, value = results.get(timeout=TIMEOUT_S)
                if failure:
                    raise AssertionError(f"rank {rank} failed:\n{failure}")
                collected[rank] = value
        except queue.Empty:
            raise AssertionError("the ranks did not finish in time") from None
        finally:
            for process in processes:
                process.join(20)
                if process.is_alive():
                    process.kill()
        return [collected[rank] for rank in range(world_size)]


def _enter(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    folder: str,
    results: Any,
    arguments: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "GLOO_SOCKET_IFNAME": "lo",
        "DS_ACCELERATOR": "cpu",
    }
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{Path(folder, 'meet')}", rank=rank, world_size=world_size
        )
        value = function(rank, world_size, *arguments)
        results.put((rank, None, value))
        dist.barrier()
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
