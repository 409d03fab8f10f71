"""Starting the ranks of a run on this machine, and ending them together.

Under torchrun, the deepspeed launcher, SLURM or MPI the ranks exist already: `environment`. Else
`launch` starts one process per rank: when one fails, the others are ended and its error is the
run's error.

Why not torch.distributed.elastic's agent, which torchrun runs: it ends a run with a report of
forty lines, of all ranks, and its own traceback; the one line of the rank that failed first is
not what the user sees. Its form of error files is used.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from clipsys.errors import ClipsysError, TrainingError
from clipsys.probe.machine import SHARED_CORES, available_cores
from clipsys.training.distributed.rank_errors import ERROR_FILE, PARENT, as_error, read_reports

_GRACE_S = 10.0


def default_nproc() -> int:
    """One process per GPU, or one."""
    import torch

    return max(1, torch.cuda.device_count())


def free_port() -> int:
    """A TCP port that nothing listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def launch(arguments: Sequence[str], nproc: int) -> None:
    """Runs ``clipsys ARGUMENTS`` as ``nproc`` ranks and waits for them.

    Raises:
        ClipsysError: the error of the rank that failed first, of the class that it had.
        KeyboardInterrupt: after the ranks have ended.
    """
    with tempfile.TemporaryDirectory(prefix="clipsys-launch-") as folder:
        environment = {
            **os.environ,
            "WORLD_SIZE": str(nproc),
            "LOCAL_WORLD_SIZE": str(nproc),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            PARENT: str(os.getpid()),
        }
        # Gloo otherwise resolves the host's name, which fails on many laptops and containers.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
        if "OMP_NUM_THREADS" not in environment:
            threads = max(1, available_cores() // nproc)
            environment |= {"OMP_NUM_THREADS": str(threads), SHARED_CORES: str(nproc)}
        # A rank that is ended leaves semaphores to its tracker, which cleans up and complains.
        environment.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
        ranks = []
        for rank in range(nproc):
            own = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                ERROR_FILE: str(Path(folder, f"rank-{rank}.json")),
            }
            command = [sys.executable, "-m", "clipsys", *arguments]
            ranks.append(subprocess.Popen(command, env={**environment, **own}))
        try:
            codes = _wait(ranks)
        except KeyboardInterrupt:
            _end(ranks)
            raise KeyboardInterrupt(
                "interrupted: --resume goes on from the last checkpoint"
            ) from None
        if codes:
            _end(ranks)
            raise _read_error(Path(folder), codes)


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> dict[int, int]:
    """Waits for all to succeed; returns the status of each that failed, as soon as one has."""
    while True:
        codes = [process.poll() for process in ranks]
        if any(codes):
            time.sleep(0.5)  # the rank that failed first may still be writing why
            return {rank: code for rank, process in enumerate(ranks) if (code := process.poll())}
        if all(code == 0 for code in codes):
            return {}
        time.sleep(0.05)


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in ranks:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + _GRACE_S
    for process in ranks:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _read_error(folder: Path, codes: dict[int, int]) -> ClipsysError:
    """The cause of a failed run."""
    reports = read_reports(folder)
    killed = [(rank, -code) for rank, code in codes.items() if code < 0]
    if reports and (reports[0]["deliberate"] or not killed):
        return as_error(reports[0])
    if killed:
        rank, number = killed[0]
        return TrainingError(
            f"rank {rank} was killed by {signal.Signals(number).name}"
            + (" (out of memory?)" if number == signal.SIGKILL else "")
            + "; go on with --resume"
        )
    rank, code = next(iter(codes.items()))
    return TrainingError(f"rank {rank} ended with status {code}; its output above says why")
