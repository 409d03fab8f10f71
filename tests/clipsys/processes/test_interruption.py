"""SIGTERM ends work within a bounded time, also where a read does not return."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

_WORK = """
import sys, threading, time
from clipsys.processes import interruption
from clipsys.processes.interruption import bounded_threads, ending_in_order, leave_if_abandoned
interruption.GRACE_S, interruption._THREADS_GRACE_S = 1.0, 0.2
try:
    with ending_in_order(lambda: "go on"):
        {work}
except KeyboardInterrupt as interrupt:
    print(interrupt, flush=True)
    leave_if_abandoned(interrupt.status)
    sys.exit(interrupt.status)
"""
#: A thread that reads from a file system that does not answer.
_IN_A_THREAD = """
        with bounded_threads(1, "reader") as pool:
            reading = pool.submit(threading.Event().wait)
            print("ready", flush=True)
            reading.result()
"""
#: A lock that is taken twice is a system call that no signal interrupts.
_IN_THE_MAIN_THREAD = """
        import ctypes
        libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)
        threading.Timer(1.0, print, ["ready"], {"flush": True}).start()  # from inside the lock
        libc.pthread_mutex_lock(lock)
        libc.pthread_mutex_lock(lock)
"""
_ASLEEP = """
        print("ready", flush=True)
        time.sleep(60)
"""


def start(work: str, *, ignoring_interrupts: bool = False) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _WORK.format(work=work.strip())]
    if ignoring_interrupts:
        command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("work", "said"),
    [
        (_IN_A_THREAD, "terminated: go on"),
        (_IN_THE_MAIN_THREAD, "terminated: the work did not end within 1 s"),
        (_ASLEEP, "terminated: go on"),
    ],
    ids=["thread", "main", "asleep"],
)
def test_termination_always_ends_the_work(work: str, said: str) -> None:
    with start(work) as process:
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=20)
    assert process.returncode == 143
    assert out.startswith(said)


@pytest.mark.timeout(30)
def test_inherited_ignored_interrupt_stays_ignored_and_termination_ends() -> None:
    with start(_ASLEEP, ignoring_interrupts=True) as process:
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=20)[0] == "terminated: go on\n"
    assert process.returncode == 143
