"""Freed memory stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

_COUNT_FAULTS = """
import resource, sys
from clipsys.processes.allocation import keep_freed_memory
keeps = sys.argv[1] == "keep" and keep_freed_memory()
assert keeps == (sys.argv[1] == "keep")
def touch():
    block = b"x" * (64 << 20)
    del block
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(mode: str) -> int:
    command = [sys.executable, "-c", _COUNT_FAULTS, mode]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_a_block_that_was_freed_is_used_again_without_new_pages() -> None:
    assert _faults("keep") < 1_000
