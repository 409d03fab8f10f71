"""Starting the ranks of a run on this machine, and ending them together.

Under torchrun, the deepspeed launcher or SLURM the ranks exist already; `join_environment` makes
the variables of all three the same. Otherwise `launch` starts one process per rank: when one fails,
the others are ended and its error is the run's error.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clipsys import errors
from clipsys.errors import ClipsysError, ConfigError, TrainingError
from clipsys.probe.machine import SHARED_CORES, available_cores

_ERROR_FILE = "CLIPSYS_ERROR_FILE"
_PARENT = "CLIPSYS_LAUNCHER_PID"
_GRACE_S = 10.0


def join_environment() -> bool:
    """Whether a launcher has started this process as a rank; completes SLURM's variables."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return True
    tasks = int(os.environ.get("SLURM_NTASKS", "1"))
    # An interactive allocation has SLURM variables too; only `srun` gives a step of several tasks.
    if "SLURM_PROCID" not in os.environ or "SLURM_STEP_ID" not in os.environ or tasks < 2:
        return False
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")
    os.environ["WORLD_SIZE"] = str(tasks)
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _first_host()
    os.environ.setdefault(
        "MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20000)
    )
    return True


def _first_host() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        found = subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            f"cannot expand the SLURM node list {nodes!r} ({error}); "
            "set MASTER_ADDR to the first node"
        ) from error
    return found.stdout.split()[0]


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
        ClipsysError: the error of the rank that failed first, of its own class.
        KeyboardInterrupt: after the ranks have ended.
    """
    with tempfile.TemporaryDirectory(prefix="clipsys-launch-") as folder:
        environment = {
            **os.environ,
            "WORLD_SIZE": str(nproc),
            "LOCAL_WORLD_SIZE": str(nproc),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            _PARENT: str(os.getpid()),
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
                _ERROR_FILE: str(Path(folder, f"rank-{rank}.json")),
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
    """The cause of a failed run: a rank that lost its peer fails too, a moment later."""
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("rank-*.json")]
    reports.sort(key=lambda report: (not report["deliberate"], report["time"]))
    killed = [(rank, -code) for rank, code in codes.items() if code < 0]
    if reports and (reports[0]["deliberate"] or not killed):
        return _reported(reports[0])
    if killed:
        rank, number = killed[0]
        return TrainingError(
            f"rank {rank} was killed by {signal.Signals(number).name}"
            + (" (out of memory?)" if number == signal.SIGKILL else "")
            + "; go on with --resume"
        )
    rank, code = next(iter(codes.items()))
    return TrainingError(f"rank {rank} ended with status {code}; its output above says why")


def _reported(report: dict[str, Any]) -> ClipsysError:
    kind = getattr(errors, report["kind"], TrainingError)
    prefix = "" if report["deliberate"] else f"rank {report['rank']}: "
    if isinstance(kind, type) and issubclass(kind, ClipsysError):
        with contextlib.suppress(TypeError):  # ImageDecodeError wants more than a message
            return kind(prefix + str(report["message"]))
    return TrainingError(prefix + str(report["message"]))


@contextlib.contextmanager
def reporting() -> Iterator[None]:
    """Inside a rank: leaves word of an error for the launcher, and ends when the launcher dies."""
    path = os.environ.get(_ERROR_FILE)
    if path is None:
        yield
        return
    _watch_parent(int(os.environ[_PARENT]))
    try:
        yield
    except ClipsysError as error:
        _report(Path(path), error, deliberate=True)
        sys.stderr.flush()
        os._exit(1)  # peers wait in a collective: no time for the interpreter's own clean-up
    except Exception as error:
        if "--debug" in sys.argv or not _is_lost_peer(error):
            import traceback

            traceback.print_exc()
        _report(Path(path), error, deliberate=False)
        sys.stderr.flush()
        os._exit(1)


def _is_lost_peer(error: Exception) -> bool:
    text = str(error)
    return any(sign in text for sign in ("Connection closed by peer", "Connection reset by peer"))


def _report(path: Path, error: Exception, *, deliberate: bool) -> None:
    report = {
        "kind": type(error).__name__,
        "message": str(error) if deliberate else f"{type(error).__name__}: {error}".splitlines()[0],
        "rank": int(os.environ.get("RANK", "0")),
        "deliberate": deliberate,
        "time": time.time(),
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report), encoding="utf-8")
    partial.replace(path)


def _watch_parent(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
