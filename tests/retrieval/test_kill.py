"""A real writer is killed with SIGKILL at random moments; what it acknowledged must be there."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

#: A process is killed at a random moment of so long after it has begun to work.
_SPAN_S = 0.6


@dataclass
class Acknowledged:
    """What the writer said. ``unsure``: touched by the operation that the kill fell into."""

    live: set[str] = field(default_factory=set)
    unsure: set[str] = field(default_factory=set)

    def hear(self, lines: list[str]) -> None:
        self.unsure.clear()
        for line in lines:
            words = json.loads(line)
            for name, uris in words.get("begin", {}).items():
                # A changed item is there all the time, under its old or its new id.
                self.unsure = set(uris) if name in ("add", "remove") else set()
            for name, uris in words.get("done", {}).items():
                self.unsure = set()
                if name == "add":
                    self.live |= set(uris)
                elif name == "remove":
                    self.live -= set(uris)


def run_and_kill(
    collection: Path, pictures: Path, seed: int, after_s: float
) -> tuple[dict[str, Any], list[str]]:
    """What a fresh process found, and what it said before it was killed."""
    command = [sys.executable, "-m", "tests.retrieval.crasher", collection, pictures, seed]
    with subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        first = process.stdout.readline()  # it works from here on
        time.sleep(after_s)
        process.kill()
        lines = process.stdout.readlines()
    assert process.returncode == -9, "the writer ended by itself"
    return json.loads(first)["state"], [line for line in lines if line.endswith("\n")]


def check(state: dict[str, Any], said: Acknowledged) -> None:
    assert state["faults"] == []
    assert state["wrong"] == [], "vectors that are not those of their images"
    assert state["found"], "a search over everything gives other items"
    uris = set(state["uris"])
    assert len(uris) == len(state["uris"]), "a uri twice"
    assert said.live - said.unsure <= uris, "acknowledged and missing"
    assert uris <= said.live | said.unsure, "there and never added, or removed and back"
    said.live = uris


@pytest.mark.parametrize(
    "num_kills", [10, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_killed_writer_loses_nothing_that_it_acknowledged(tmp_path: Path, num_kills: int) -> None:
    generator = random.Random(num_kills)
    collection, pictures = tmp_path / "collection", tmp_path / "pictures"
    pictures.mkdir()
    said, done = Acknowledged(), Counter[str]()
    wanted = {"add", "change", "remove"} | ({"compact", "rebuild"} if num_kills >= 100 else set())
    span_s = _SPAN_S
    for seed in itertools.count():  # each process tells what the kill before it left
        # A slow machine does less between two kills: it gets more of them.
        if seed > 4 * num_kills or (seed > num_kills and wanted <= set(done)):
            break
        after_s = generator.uniform(0.0, span_s)
        state, lines = run_and_kill(collection, pictures, seed, after_s)
        check(state, said)
        said.hear(lines)
        finished = [name for line in lines for name in json.loads(line).get("done", {})]
        done.update(finished)
        # Nor may a machine be too slow, or too busy, for any operation between two kills.
        span_s = max(_SPAN_S, span_s / 1.5) if finished else min(1.5 * span_s, 30.0)
    assert wanted <= set(done), f"the test tested little: {done}"
